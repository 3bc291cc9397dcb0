"""Windows of tokens cut from text files, and the text slices in `data/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"
#: Mixed corpora: what a pruned model was calibrated on decides what it stays good at.
CALIBRATION_FILES = (DATA_FOLDER / "wikitext2_calibration.txt", DATA_FOLDER / "c4_calibration.txt")
SEARCH_FILES = (DATA_FOLDER / "wikitext2_search.txt", DATA_FOLDER / "c4_search.txt")
TEST_FILES = (DATA_FOLDER / "wikitext2_test.txt",)


def token_windows(tokenizer: Any, text: str, windows: int, length: int, *, seed: int | None = None) -> torch.Tensor:
    """Token ids int64 [windows, length], not overlapping: the text's first, or with a seed a random choice.

    Raises ValueError where the text is too short.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    if windows < 1 or available < windows:
        raise ValueError(
            f"wanted {windows} windows of {length} tokens, got text for {available}; give more text or ask less"
        )
    if seed is None:
        chosen = np.arange(windows)
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(available, windows, replace=False))
    return torch.tensor(ids[: available * length], dtype=torch.int64).reshape(available, length)[
        torch.from_numpy(chosen)
    ]


def file_windows(
    tokenizer: Any, files: Sequence[Path], windows: int, length: int, *, seed: int | None = None
) -> torch.Tensor:
    """Token ids int64 [windows, length], as many from each file; the first files give what is left over."""
    shares = [windows // len(files) + (i < windows % len(files)) for i in range(len(files))]
    parts = [
        token_windows(tokenizer, _read(file), share, length, seed=seed)
        for file, share in zip(files, shares, strict=True)
        if share
    ]
    return torch.cat(parts)


def _read(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"wanted a text file, but there is no {file}; name one with UTF-8 text")
    return file.read_text(encoding="utf-8")
