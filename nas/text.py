"""Windows of tokens cut from text files, and the text slices in `data/`.

A file is plain UTF-8 text, or `.jsonl` with an object a line: `text`, or an instruction with its answer as `messages`
(role and content) or as `instruction`, `input` and `output`, which are put into the tokenizer's chat template if it has
one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.gguf_tokenizer import adds_bos

DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"
#: Mixed corpora: what a pruned model was calibrated on decides what it stays good at.
CALIBRATION_FILES = (DATA_FOLDER / "wikitext2_calibration.txt", DATA_FOLDER / "c4_calibration.txt")
#: Training takes more text than moments do: what a few passes over it teach is its own words.
TUNING_FILES = (*CALIBRATION_FILES, DATA_FOLDER / "wikitext2_tuning.txt", DATA_FOLDER / "c4_tuning.txt")
SEARCH_FILES = (DATA_FOLDER / "wikitext2_search.txt", DATA_FOLDER / "c4_search.txt")
TEST_FILES = (DATA_FOLDER / "wikitext2_test.txt",)


def token_windows(
    tokenizer: Any, text: str, windows: int, length: int, *, seed: int | None = None, skipped: int = 0
) -> torch.Tensor:
    """Token ids int64 [windows, length], not overlapping: the text's first, or with a seed a random choice.

    Each begins as the model's texts do: without its first token Gemma 3 270M has a perplexity of 56 in place of 21. The
    first `skipped` tokens of the text are left out. Raises ValueError where it is too short.
    """
    first = _first(tokenizer)
    own = length - len(first)
    if own < 1:
        raise ValueError(f"wanted windows of more than {len(first)} tokens, got {length}; ask for longer ones")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][skipped:]
    available = len(ids) // own
    if windows < 1 or available < windows:
        raise ValueError(
            f"wanted {windows} windows of {length} tokens{f' after {skipped} others' if skipped else ''}, got text for "
            f"{available}; give more text or ask less"
        )
    if seed is None:
        chosen = np.arange(windows)
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(available, windows, replace=False))
    rows = np.array(ids[: available * own], dtype=np.int64).reshape(available, own)[chosen]
    return torch.from_numpy(np.column_stack([np.tile(np.array(first, dtype=np.int64), (windows, 1)), rows]))


def _first(tokenizer: Any) -> list[int]:
    """What every text of the model begins with."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def file_windows(
    tokenizer: Any,
    files: Sequence[Path],
    windows: int,
    length: int,
    *,
    seed: int | None = None,
    after: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Token ids int64 [windows, length], as many from each file; the first files give what is left over.

    None of them is in the windows (number, length) `after` which they come, taken from the same files.
    """
    skipped = [share * after[1] for share in shares(after[0], len(files))]
    parts = [
        token_windows(tokenizer, read_text(file, tokenizer), share, length, seed=seed, skipped=skip)
        for file, share, skip in zip(files, shares(windows, len(files)), skipped, strict=True)
        if share
    ]
    return torch.cat(parts)


def all_windows(tokenizer: Any, files: Sequence[Path], length: int) -> torch.Tensor:
    """Every whole window of every file, int64 [windows, length]; ValueError where a file has none."""
    parts = []
    for file in files:
        text = read_text(file, tokenizer)
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        own = max(1, length - len(_first(tokenizer)))
        parts.append(token_windows(tokenizer, text, max(1, tokens // own), length))
    return torch.cat(parts)


def shares(windows: int, files: int) -> list[int]:
    """As many from each, the first ones giving what is left over."""
    return [windows // files + (i < windows % files) for i in range(files)]


def read_text(file: Path, tokenizer: Any) -> str:
    """All that a file says, in the form that the model reads; ValueError where it is none of those that we know."""
    try:
        text = _content(file).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"wanted UTF-8 text in {file}, got something else at byte {error.start}; convert it"
        ) from error
    if file.suffix != ".jsonl":
        return text
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return "\n\n".join(_said(line, f"{file}, line {number}", tokenizer) for number, line in lines)


def text_digest(file: Path) -> str:
    """Sixteen hex digits, equal for files of equal content."""
    return sha256(_content(file)).hexdigest()[:16]


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise ValueError(f"wanted a text file, but there is no {file}; name one with UTF-8 text")
    return file.read_bytes()


def _said(line: str, where: str, tokenizer: Any) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"wanted a JSON object in {where}, got something else ({error}); mend the line") from error
    match fields:
        case {"text": str(text)}:
            return text
        case {"messages": [*messages]} if all(_is_message(message) for message in messages):
            pass
        case {"instruction": str(instruction), "output": str(output)}:
            asked = "\n".join(filter(None, (instruction, str(fields.get("input") or ""))))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        case _:
            raise ValueError(
                f"wanted text, messages, or instruction and output in {where}, got none; rename its fields"
            )
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise ValueError(f"wanted messages that the chat template takes in {where}, got: {error}") from error
    return "\n".join(message["content"] for message in messages)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
