"""A Hugging Face tokenizer as the metadata from which llama.cpp makes its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import Regex, pre_tokenizers

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

#: Words with their space, numbers in groups, punctuation and line ends: how Llama 3 and Qwen cut text.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, _byte_level(use_regex=False)])


#: `tokenizer.ggml.pre` -> how text is cut before byte-pair merging. The names are llama.cpp's
#: (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, `tokenizer_pre ==`).
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _split("{1,3}"),
    "qwen2": lambda: _split(""),
}


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, generation: GenerationConfig
) -> dict[str, Any]:
    """GGUF keys and values of a fast tokenizer, for a model of `vocab_size` rows that ends texts as `generation` says.

    Raises ValueError for one that is neither byte-level byte-pair encoding with a way to cut text of PRE_TOKENIZERS nor
    byte-pair encoding with bytes to fall back on, as Llama 2's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"wanted a fast tokenizer, got {type(tokenizer).__name__}; export to openvino or onnx")
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(
            f"wanted a tokenizer by byte-pair encoding, got {state['model']['type']}; export to openvino or onnx"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [int(TokenType.NORMAL if index in names else TokenType.UNUSED) for index in range(vocab_size)]
    for added in (token for token in state["added_tokens"] if token["id"] < vocab_size):
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if state["model"]["byte_fallback"]:
        metadata |= _falling_back_on_bytes(state, tokens, types, merges)
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer_name(state),
            "tokenizer.ggml.merges": merges,
        }
    return metadata | _special_tokens(tokenizer, generation)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every text of this model begins with its token for that."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def prepends_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text, by the JSON of a fast tokenizer."""
    normalizers = (state["normalizer"] or {}).get("normalizers", [state["normalizer"]])
    return any(step and step["type"] == "Prepend" for step in normalizers) or any(
        step.get("prepend_scheme") in ("first", "always") for step in _cuts(state["pre_tokenizer"])
    )


def _pre_tokenizer_name(state: dict[str, Any]) -> str:
    found = _cuts(state["pre_tokenizer"])
    for name, make in PRE_TOKENIZERS.items():
        if found == _cuts(json.loads(make().__getstate__())):
            return name
    raise ValueError(
        f"wanted text cut as by one of {', '.join(PRE_TOKENIZERS)}, got {json.dumps(found)}; export to openvino or onnx"
    )


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what only concerns offsets."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in (step or {}).items() if key != "trim_offsets"} for step in steps]


def _falling_back_on_bytes(
    state: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> dict[str, Any]:
    """llama.cpp merges the pair whose token has the highest score, which is that of the earliest merge."""
    scores = [0.0] * len(tokens)
    index = {token: i for i, token in enumerate(tokens)}
    for rank, merge in reversed(list(enumerate(merges, start=1))):
        scores[index[merge.replace(" ", "")]] = -float(rank)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            types[i] = int(TokenType.BYTE)
    if (unknown := state["model"]["unk_token"]) is not None:
        types[index[unknown]] = int(TokenType.UNKNOWN)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prepends_space(state),
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> dict[str, Any]:
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0],
        "eot": ends[1] if len(ends) > 1 else None,  # any other end that it knows by name ends a text as well
        "unknown": tokenizer.unk_token_id,
        "padding": generation.pad_token_id,
    }
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": int(index) for name, index in ids.items() if index is not None
    }
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name: for tools, say
        template = template.get("default")
    if template:
        metadata["tokenizer.chat_template"] = template
    return metadata
