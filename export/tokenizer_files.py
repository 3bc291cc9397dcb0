"""A tokenizer's own files in an exported folder, as all that reads them understands them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from export.gguf_tokenizer import adds_bos, prepends_space


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Add the tokenizer's files to a folder, as transformers 4 and onnxruntime-genai read them, too.

    Both choose by the name of the class: transformers 4 does not know the newer one of fast tokenizers, and genai takes
    pieces with bytes to fall back on for such of whole words unless they are Gemma's.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if value is not None}
    if config.get("tokenizer_class") == "TokenizersBackend":
        like_gemmas = _has_pieces(tokenizer) and genai_special_tokens(tokenizer) is not None
        config["tokenizer_class"] = "GemmaTokenizer" if like_gemmas else "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def genai_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """What onnxruntime-genai's own tokenizer needs as `add_special_tokens` to give this one's tokens; None where it
    gives others.

    That is where pieces with bytes to fall back on begin with a space put before the text, as Llama 2's do.
    """
    if _has_pieces(tokenizer) and prepends_space(_state(tokenizer)):
        return None
    return adds_bos(tokenizer)


def _has_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what is no piece of the vocabulary is said in bytes, as by SentencePiece."""
    return bool(_state(tokenizer)["model"].get("byte_fallback"))


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The JSON of a fast tokenizer, and of another one of no kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {"model": {}} if backend is None else json.loads(backend.to_str())
    return state
