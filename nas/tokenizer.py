"""A fast tokenizer out of a GGUF file's own metadata.

transformers' conversion adds a beginning-of-sequence token that the file says not to add and drops the pre-tokenizer,
so that digits and spaces come out as other tokens than the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from export.gguf_tokenizer import PRE_TOKENIZERS

#: `tokenizer.ggml.token_type` values (gguf.TokenType): those merged, and, control and user-defined tokens, those that
#: are matched before.
_NORMAL, _MATCHED_FIRST = 1, (3, 4)
#: What SentencePiece writes for a space.
_SPACE = "▁"
_WHITE_SPACE = " \n\t" + _SPACE


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Any:
    """The PreTrainedTokenizerFast that `metadata` (GGUF keys -> values) describes.

    Raises ValueError where the file's tokenizer is neither byte-level BPE with a pre-tokenizer of the table nor
    SentencePiece's BPE with bytes to fall back on (Llama 2, Gemma).
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    control, user_defined = ([t for t, own in zip(tokens, types, strict=True) if own == k] for k in _MATCHED_FIRST)
    if kind == "llama":
        runs = [token for token in user_defined if not token.strip(_WHITE_SPACE)]
        tokenizer = _falling_back_on_bytes(metadata, tokens, types, runs)
        user_defined = [token for token in user_defined if token.strip(_WHITE_SPACE)]
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        tokenizer = _byte_level(metadata, tokens, pre)
    else:
        raise ValueError(
            f"wanted a GGUF tokenizer of model llama, or gpt2 with pre-tokenizer "
            f"{' or '.join(sorted(PRE_TOKENIZERS))}, got {kind} and {pre}; load the model's Hugging Face folder instead"
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = tokens[metadata["tokenizer.ggml.bos_token_id"]]
        before = [tokenizer.post_processor] if tokenizer.post_processor else []
        with_bos = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([*before, with_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length", 1 << 20),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({"chat_template": template} if (template := metadata.get("tokenizer.chat_template")) else {}),
        **_special_tokens(metadata, tokens),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], pre: str) -> Tokenizer:
    """Bytes are merged within words."""
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _falling_back_on_bytes(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], runs: Sequence[str]
) -> Tokenizer:
    """Characters are merged by their tokens' scores, spaces being letters of their own.

    The file holds no merges: any two tokens that make a third may merge, the third of the best score first, and `runs`
    of white space, which it lists among those matched before all else, before any other, the short first.
    """
    with_spaces = set(runs)
    spelled = [token.replace(" ", _SPACE) if token in with_spaces else token for token in tokens]
    vocab: dict[str, int] = {}
    for index, token in enumerate(spelled):
        vocab.setdefault(token, index)
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    normal = sorted((i for i, kind in enumerate(types) if kind == _NORMAL), key=lambda i: -scores[i])
    merged = [*sorted((run.replace(" ", _SPACE) for run in runs), key=len), *(tokens[i] for i in normal)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[pair for token in merged for pair in _halves(token, vocab)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _halves(token: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make this one, those of the least ids first, as transformers orders them."""
    pairs = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
    return sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    keys = {name: f"tokenizer.ggml.{short}_token_id" for name, short in names.items()}
    return {name: tokens[metadata[key]] for name, key in keys.items() if key in metadata}
