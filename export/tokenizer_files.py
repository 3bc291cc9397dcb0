"""A tokenizer's own files in an exported folder, as all that reads them understands them."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Add the tokenizer's files to a folder, as transformers 4 and onnxruntime-genai read them, too.

    Both choose by the name of the class: transformers 4 does not know the newer one of fast tokenizers, and genai takes
    pieces with bytes to fall back on for such of whole words unless they are Gemma's.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if value is not None}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "GemmaTokenizer" if _has_gemmas_pieces(directory) else "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def is_read_by_genai(directory: Path) -> bool:
    """Whether onnxruntime-genai's own tokenizer gives the tokens of the one in a folder.

    Not where pieces with bytes to fall back on begin with a space put before the text, as Llama 2's do.
    """
    if not (directory / "tokenizer.json").is_file():
        return False
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    return not tokenizer["model"].get("byte_fallback") or _has_gemmas_pieces(directory)


def adds_first_token(directory: Path) -> bool:
    """Whether texts begin with a token of their own, which onnxruntime-genai's tokenizer has to be told."""
    file = directory / "tokenizer.json"
    processor = (json.loads(file.read_text())["post_processor"] if file.is_file() else None) or {}
    return any(step.get("special_tokens") for step in (processor, *processor.get("processors", ())))


def _has_gemmas_pieces(directory: Path) -> bool:
    """Whether spaces become a letter of the pieces, and none is put before a text."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    return bool(tokenizer["model"].get("byte_fallback")) and (tokenizer["normalizer"] or {}).get("type") == "Replace"
