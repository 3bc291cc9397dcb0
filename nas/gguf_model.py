"""A Llama, Gemma 2 or Gemma 3 out of a GGUF file: configuration, dequantised weights, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from nas.tokenizer import tokenizer_from_gguf

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = _BLOCK_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
#: Of Gemma 2's and of Gemma 3's.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
#: By which frequencies are divided: what made them the file does not say.
_ROTARY_FACTORS = "rope_freqs.weight"
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class _Architecture:
    """What a GGUF's architecture is in transformers.

    `own_config` makes the config fields that are the family's own from the file's, without their prefix.
    """

    model_type: str
    own_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    #: GGUF's name of a tensor within a block -> the name in the state dict.
    block_names: Mapping[str, str] = field(default_factory=lambda: _BLOCK_NAMES)
    #: Whether the two halves of each rotary pair are interleaved.
    rotates_neighbours: bool = False
    #: What the file's norm weights have more than the state dict's.
    norm_offset: int = 0
    #: Of its rotary embedding.
    scalings: tuple[str, ...] = ("none",)


def _llama_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": _rope(values.get("rope.freq_base", 10_000.0))}


def _gemma2_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp knows by heart: every second layer without a window, the 27B's scale of scores, caps of 50 and 30."""
    return {
        "rope_parameters": _rope(values.get("rope.freq_base", 10_000.0)),
        "sliding_window": values.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": values.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(values, "gemma2"),
    }


def _gemma3_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp knows by heart: one layer in six without a window, their other base, the 27B's scale of scores."""
    pattern = values.get("attention.sliding_window_pattern", 6)
    return {
        "rope_parameters": {
            "full_attention": _rope(values.get("rope.freq_base", 1_000_000.0), values.get("rope.scaling.factor")),
            "sliding_attention": _rope(values.get("rope.freq_base_swa", 10_000.0)),
        },
        "sliding_window": values["attention.sliding_window"],
        "sliding_window_pattern": pattern or values["block_count"] + 1,
        "query_pre_attn_scalar": _query_scalar(values, "gemma3"),
    }


def _query_scalar(values: Mapping[str, Any], architecture: str) -> int:
    """What scores are divided by the square root of: a head's size, in the 27B as if heads made the hidden size."""
    largest = values["block_count"] == _LAYERS_OF_27B[architecture]
    scalar: int = (
        values["embedding_length"] // values["attention.head_count"] if largest else values["attention.key_length"]
    )
    return scalar


def _rope(theta: float, factor: float | None = None) -> dict[str, Any]:
    if factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


_ARCHITECTURES = {
    "llama": _Architecture("llama", _llama_fields, rotates_neighbours=True),
    "gemma2": _Architecture("gemma2", _gemma2_fields, block_names=_GEMMA_NAMES, norm_offset=1),
    "gemma3": _Architecture(
        "gemma3_text",
        _gemma3_fields,
        block_names=_GEMMA_NAMES,
        norm_offset=1,
        scalings=("none", "linear"),
    ),
}


def load_gguf(path: Path) -> tuple[Any, Any, str | None]:
    """A model in fp32, its tokenizer and its licence; ValueError where the file is no sound GGUF of a known family.

    transformers' own loading reads the metadata twice and builds a name table for every tensor: 16 s where
    this takes 4.
    """
    import gguf

    reader, metadata = _read(path)
    try:
        tokenizer = tokenizer_from_gguf(metadata)
    except (LookupError, TypeError) as error:  # a ValueError says what is not supported
        raise _damaged(path, error) from error
    try:
        tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
        model = _model(metadata, tensors)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return model, tokenizer, metadata.get("general.license")


def gguf_config(path: Path) -> Any:
    """The config of a GGUF file's model; raises as `load_gguf` does."""
    reader, metadata = _read(path)
    try:
        return _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """gguf's reader and the metadata, of a file that this module can load."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"wanted a GGUF file, got {path} without the GGUF mark; give a .gguf file or a model folder"
            )
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        architecture = metadata["general.architecture"]
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise _damaged(path, error) from error
    if architecture not in _ARCHITECTURES:
        wanted = " or ".join(_ARCHITECTURES)
        raise ValueError(
            f"wanted a GGUF of architecture {wanted}, got {architecture}; load its Hugging Face folder instead"
        )
    scaling, known = metadata.get(f"{architecture}.rope.scaling.type", "none"), _ARCHITECTURES[architecture].scalings
    if scaling not in known:
        raise ValueError(
            f"wanted rotary embeddings with scaling {' or '.join(known)}, got {scaling}; load its Hugging Face folder "
            "instead"
        )
    layers = {name.split(".")[1] for tensor in reader.tensors if (name := tensor.name).startswith("blk.")}
    if metadata.get(f"{architecture}.block_count") != len(layers):  # looked at before a model of so many is built
        said = metadata.get(f"{architecture}.block_count")
        raise _damaged(path, ValueError(f"it says {said} layers, and has tensors of {len(layers)}"))
    if any(tensor.name == _ROTARY_FACTORS for tensor in reader.tensors):
        raise ValueError(
            f"wanted rotary embeddings without factors of their own, got {_ROTARY_FACTORS} (Llama 3.1 and later have "
            "them); load its Hugging Face folder instead"
        )
    return reader, metadata


def _damaged(path: Path, error: Exception) -> ValueError:
    said = shorten(str(error), 200)  # of missing tensors there may be thousands
    return ValueError(f"wanted a sound GGUF file, got {path}, which stops making sense: {said}; fetch it again")


def _config(metadata: Mapping[str, Any], *, tied: bool) -> Any:
    from transformers import AutoConfig

    name = metadata["general.architecture"]
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    tokens = {token: metadata.get(f"tokenizer.ggml.{token}_token_id") for token in ("bos", "eos", "eot", "padding")}
    ends = [end for end in dict.fromkeys((tokens["eos"], tokens["eot"])) if end is not None]
    architecture = _ARCHITECTURES[name]
    return AutoConfig.for_model(
        architecture.model_type,
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("attention.head_count_kv", heads),
        head_dim=values.get("attention.key_length", hidden // heads),
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=tied,
        bos_token_id=tokens["bos"],
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=tokens["padding"],
        **architecture.own_config(values),
    )


def _model(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    from transformers import AutoModelForCausalLM

    from export.huggingface import compute_buffers

    config = _config(metadata, tied="output.weight" not in tensors)
    architecture = _ARCHITECTURES[metadata["general.architecture"]]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor = tensor - architecture.norm_offset
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            state[f"{_NAMES[name.removesuffix('.weight')]}.weight"] = tensor
            continue
        layer, part = match.groups()
        if architecture.rotates_neighbours and part in heads:
            # [head, half, 2] back to [head, 2, half]
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads[part], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        state[f"model.layers.{layer}.{architecture.block_names[part]}.weight"] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):  # no random initialisation of what is overwritten
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    compute_buffers(model)
    model.tie_weights()
    return model
