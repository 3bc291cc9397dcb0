"""A Llama model out of a GGUF file: configuration, dequantised weights, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from nas.tokenizer import tokenizer_from_gguf

#: GGUF's name of a tensor within a block -> the name in a Llama state dict.
_GGUF_BLOCK_NAMES = {
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
_GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def load_gguf(path: Path) -> tuple[Any, Any, str | None]:
    """A Llama model in fp32, its tokenizer and its licence; ValueError where the file is no sound GGUF of a Llama.

    transformers' own loading reads the metadata twice and builds a name table for every tensor: 16 s where
    this takes 4.
    """
    import gguf

    reader, metadata = _read(path)
    tokenizer = tokenizer_from_gguf(metadata)
    try:
        tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
        model = _llama_model(_llama_config(metadata, tied="output.weight" not in tensors), tensors)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return model, tokenizer, metadata.get("general.license")


def gguf_config(path: Path) -> Any:
    """The LlamaConfig of a GGUF file; raises as `load_gguf` does."""
    reader, metadata = _read(path)
    try:
        return _llama_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    except LookupError as error:
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
    if architecture != "llama":
        raise ValueError(
            f"wanted a GGUF of architecture llama, got {architecture}; load its Hugging Face folder instead"
        )
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"wanted plain rotary embeddings, got scaling {scaling}; load its Hugging Face folder instead")
    return reader, metadata


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"wanted a sound GGUF file, got {path}, which stops making sense: {error}; fetch it again")


def _llama_config(metadata: dict[str, Any], *, tied: bool) -> Any:
    from transformers import LlamaConfig

    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    hidden, heads = llama["embedding_length"], llama["attention.head_count"]
    tokens = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=llama.get("attention.head_count_kv", heads),
        head_dim=llama.get("attention.key_length", hidden // heads),
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": llama.get("rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        bos_token_id=tokens["bos"],
        eos_token_id=tokens["eos"],
        pad_token_id=tokens["padding"],
    )


def _llama_model(config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    from transformers import LlamaForCausalLM

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            state[f"{_GGUF_NAMES[name.removesuffix('.weight')]}.weight"] = tensor
            continue
        layer, part = match.groups()
        if part in heads:
            # GGUF interleaves the two halves of each rotary pair: [head, half, 2] back to [head, 2, half]
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads[part], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        state[f"model.layers.{layer}.{_GGUF_BLOCK_NAMES[part]}.weight"] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):  # no random initialisation of what is overwritten
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    return model
