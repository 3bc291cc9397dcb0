"""Models whose projections are fused, as the Llama that computes the same: its maps can shrink one by one.

Phi-3 holds queries, keys and values in one matrix [heads and twice the KV heads x head_dim, hidden], gate and up in
another [2 x width, hidden]; all else is Llama's.
"""

from __future__ import annotations

from typing import Any

import torch

#: What a LlamaConfig takes over from a Phi3Config.
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def unfused_config(config: Any) -> Any:
    """The LlamaConfig of a Phi3Config; ValueError where only some dimensions of a head rotate, as in Phi-4-mini."""
    from transformers import LlamaConfig

    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise ValueError(
            f"wanted rotary embeddings over whole heads, got partial_rotary_factor {rotated}; take another model"
        )
    head_dim = getattr(config, "head_dim", None)
    return LlamaConfig(head_dim=head_dim, **{name: getattr(config, name) for name in _CONFIG_FIELDS})


def unfused(model: Any) -> Any:
    """The Llama in fp32 that computes as `model`, a Phi-3, does; raises as `unfused_config`."""
    from transformers import LlamaForCausalLM

    config = unfused_config(model.config)
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".qkv_proj." in name:
            split = zip(("q_proj", "k_proj", "v_proj"), tensor.split([n * config.head_dim for n in heads]), strict=True)
            state |= {name.replace("qkv_proj", part): rows.float() for part, rows in split}
        elif ".gate_up_proj." in name:
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            state |= {name.replace("gate_up_proj", part): rows.float() for part, rows in halves}
        else:
            state[name] = tensor.float()
    with torch.device("meta"):  # no random initialisation of what is overwritten
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
