"""Gemma 2 and 3 with layers of different sizes. This file travels with every exported folder as remote code.

`block_configs` has one entry per layer: `num_attention_heads` and `num_key_value_heads` (0: no attention there),
`intermediate_size` (0: no MLP there) and `layer_type`. `layer_types` and `num_hidden_layers`, from which transformers
makes the KV cache, count the layers that have attention.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3ForCausalLM,
    Gemma3MLP,
    Gemma3RMSNorm,
    Gemma3TextModel,
)


def _attending(block_configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kinds = [block["layer_type"] for block in block_configs if block["num_attention_heads"]]
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)} if block_configs else {}


class HeterogeneousGemma2Config(Gemma2Config):
    model_type = "heterogeneous_gemma2"
    base_model_type = "gemma2"

    def __init__(self, block_configs: Sequence[Mapping[str, Any]] = (), **kwargs: Any) -> None:
        self.block_configs = [dict(block) for block in block_configs]
        super().__init__(**kwargs | _attending(block_configs))


class HeterogeneousGemma3Config(Gemma3TextConfig):
    model_type = "heterogeneous_gemma3"
    base_model_type = "gemma3_text"

    def __init__(self, block_configs: Sequence[Mapping[str, Any]] = (), **kwargs: Any) -> None:
        self.block_configs = [dict(block) for block in block_configs]
        super().__init__(**kwargs | _attending(block_configs))


class HeterogeneousGemmaLayer(nn.Module):
    """Norms and MLPs are the same in both."""

    def __init__(self, config: Any, block: Mapping[str, Any], cache_index: int, attention: type[nn.Module]) -> None:
        super().__init__()
        own = copy.copy(config)
        own.intermediate_size = block["intermediate_size"]
        own.num_attention_heads = block["num_attention_heads"]
        own.num_key_value_heads = block["num_key_value_heads"]
        self.layer_type = block["layer_type"]
        if block["num_attention_heads"]:
            self.input_layernorm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = attention(own, cache_index)
            # the attention implementation is chosen on the shared config after construction; a copy would not see it
            self.self_attn.config = config
            self.post_attention_layernorm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if block["intermediate_size"]:
            self.pre_feedforward_layernorm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = Gemma3MLP(own)
            self.post_feedforward_layernorm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if hasattr(self, "self_attn"):
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
        if hasattr(self, "mlp"):
            added = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            hidden_states = hidden_states + self.post_feedforward_layernorm(added)
        return hidden_states


class _OfDifferentLayers:
    """What both models have in common; goes before Hugging Face's class."""

    attention: type[nn.Module]
    config: Any
    embed_tokens: Any
    norm: Any
    post_init: Any
    rotary_emb: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        cache_index, layers = 0, []
        for block in config.block_configs:
            layers.append(HeterogeneousGemmaLayer(config, block, cache_index, self.attention))
            cache_index += bool(block["num_attention_heads"])
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def rotary(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Any:
        """Of layers of this kind; Gemma 2 has one for both."""
        return self.rotary_emb(hidden_states, position_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
            position_ids = positions.unsqueeze(0)
        if isinstance(attention_mask, dict):  # `generate` may have made them
            masks = attention_mask
        else:
            given = {
                "config": self.config,
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {kind: make[kind](**given) for kind in set(self.config.layer_types)}
        rotary = {kind: self.rotary(hidden_states, position_ids, kind) for kind in set(self.config.layer_types)}
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(layer.layer_type),
                position_embeddings=rotary.get(layer.layer_type),
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class HeterogeneousGemma2Model(_OfDifferentLayers, Gemma2Model):
    config_class = HeterogeneousGemma2Config
    attention = Gemma2Attention


class HeterogeneousGemma3Model(_OfDifferentLayers, Gemma3TextModel):
    config_class = HeterogeneousGemma3Config
    attention = Gemma3Attention

    def rotary(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Any:
        return self.rotary_emb(hidden_states, position_ids, kind)


class HeterogeneousGemma2ForCausalLM(Gemma2ForCausalLM):
    config_class = HeterogeneousGemma2Config
    _no_split_modules = ("HeterogeneousGemmaLayer",)

    def __init__(self, config: HeterogeneousGemma2Config) -> None:
        super().__init__(config)
        self.model = HeterogeneousGemma2Model(config)
        self.post_init()


class HeterogeneousGemma3ForCausalLM(Gemma3ForCausalLM):
    config_class = HeterogeneousGemma3Config
    _no_split_modules = ("HeterogeneousGemmaLayer",)

    def __init__(self, config: HeterogeneousGemma3Config) -> None:
        super().__init__(config)
        self.model = HeterogeneousGemma3Model(config)
        self.post_init()
