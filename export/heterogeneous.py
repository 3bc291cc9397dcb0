"""Llama, Qwen2 or Qwen3 with layers of different sizes. This file travels with every exported folder as remote code.

`block_configs` has one entry per layer: `num_attention_heads` and `num_key_value_heads` (0: no attention there) and
`intermediate_size` (0: no MLP there). Attention layers are numbered densely in the KV cache. `base_model_type` names
the family whose attention it is; all else is the same in these families.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

_ATTENTIONS = {"llama": LlamaAttention, "qwen2": Qwen2Attention, "qwen3": Qwen3Attention}


class HeterogeneousLlamaConfig(LlamaConfig):
    model_type = "heterogeneous_llama"

    def __init__(
        self, block_configs: Sequence[Mapping[str, int]] = (), base_model_type: str = "llama", **kwargs: Any
    ) -> None:
        self.block_configs = [dict(block) for block in block_configs]
        self.base_model_type = base_model_type
        super().__init__(**kwargs)


class HeterogeneousLlamaLayer(nn.Module):
    def __init__(self, config: HeterogeneousLlamaConfig, block: Mapping[str, int], cache_index: int) -> None:
        super().__init__()
        own = copy.copy(config)
        own.intermediate_size = block["intermediate_size"]
        own.num_attention_heads = block["num_attention_heads"]
        own.num_key_value_heads = block["num_key_value_heads"]
        if block["num_attention_heads"]:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = _ATTENTIONS[config.base_model_type](own, cache_index)
            # the attention implementation is chosen on the shared config after construction; a copy would not see it
            self.self_attn.config = config
        if block["intermediate_size"]:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(own)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if hasattr(self, "self_attn"):
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if hasattr(self, "mlp"):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class HeterogeneousLlamaModel(LlamaModel):
    config_class = HeterogeneousLlamaConfig

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        with _no_uniform_layers(config):
            super().__init__(config)
        cache_index, layers = 0, []
        for block in config.block_configs:
            layers.append(HeterogeneousLlamaLayer(config, block, cache_index))
            cache_index += bool(block["num_attention_heads"])
        self.layers = nn.ModuleList(layers)
        self.post_init()


class HeterogeneousLlamaForCausalLM(LlamaForCausalLM):
    config_class = HeterogeneousLlamaConfig
    _no_split_modules = ("HeterogeneousLlamaLayer",)

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        with _no_uniform_layers(config):
            super().__init__(config)
        self.model = HeterogeneousLlamaModel(config)
        self.post_init()


@contextmanager
def _no_uniform_layers(config: HeterogeneousLlamaConfig) -> Iterator[None]:
    """Keep the parent's constructor from building its own layers.

    On the config itself, not on a copy: the parent resolves the attention implementation there, and a model whose
    config misses it is silently not causal.
    """
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = len(config.block_configs)
