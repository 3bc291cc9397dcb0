"""GPT-2, GPT-NeoX and OPT in one form, with layers of different sizes. This file travels with exported folders.

`block_configs` has one entry per layer: `num_attention_heads` and `num_key_value_heads` (0: no attention there) and
`intermediate_size` (0: no MLP there). Attention layers are numbered densely in the KV cache.

Every projection is a linear map of its own, named as Llama's; norms take off the mean and have biases; MLPs have no
gate. `rotary_dim` dimensions of each head rotate, the first half of them at the start of the head and the second in its
middle, as if all did and the others at frequency 0; with 0 of them positions have a learned embedding.
`base_model_type` names the family that it was.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel


class HeterogeneousGptConfig(LlamaConfig):
    model_type = "heterogeneous_gpt"

    def __init__(
        self,
        block_configs: Sequence[Mapping[str, int]] = (),
        base_model_type: str = "gpt2",
        layer_norm_eps: float = 1e-5,
        rotary_dim: int = 0,
        parallel_residual: bool = False,
        **kwargs: Any,
    ) -> None:
        self.block_configs = [dict(block) for block in block_configs]
        self.base_model_type = base_model_type
        self.layer_norm_eps = layer_norm_eps
        self.rotary_dim = rotary_dim
        self.parallel_residual = parallel_residual
        super().__init__(**kwargs)


class PartialRotaryEmbedding(nn.Module):
    """Cosines and sines [B, T, head_dim]. Computed from the config, so that there is no buffer to be loaded."""

    def __init__(self, config: HeterogeneousGptConfig) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.theta = config.rope_parameters["rope_theta"]

    @property
    def inv_freq(self) -> torch.Tensor:
        """[head_dim / 2]."""
        frequencies = torch.zeros(self.head_dim // 2)
        exponents = torch.arange(0, self.rotary_dim, 2).float() / max(1, self.rotary_dim)
        frequencies[: self.rotary_dim // 2] = 1 / self.theta**exponents
        return frequencies

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        both_halves = torch.cat([angles, angles], -1)
        return both_halves.cos().to(x.dtype), both_halves.sin().to(x.dtype)


class UngatedMlp(nn.Module):
    def __init__(self, config: HeterogeneousGptConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.act_fn(self.up_proj(x)))
        return down


class HeterogeneousGptLayer(nn.Module):
    def __init__(self, config: HeterogeneousGptConfig, block: Mapping[str, int], cache_index: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        own = copy.copy(config)
        own.intermediate_size = block["intermediate_size"]
        own.num_attention_heads = block["num_attention_heads"]
        own.num_key_value_heads = block["num_key_value_heads"]
        if block["num_attention_heads"]:
            self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.self_attn = LlamaAttention(own, cache_index)
            # the attention implementation is chosen on the shared config after construction; a copy would not see it
            self.self_attn.config = config
        if block["intermediate_size"]:
            self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.mlp = UngatedMlp(own)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        before = hidden_states
        if hasattr(self, "self_attn"):
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(before), **kwargs)
            hidden_states = before + attended
        if hasattr(self, "mlp"):
            read = before if self.parallel_residual else hidden_states
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(read))
        return hidden_states


class HeterogeneousGptModel(LlamaModel):
    config_class = HeterogeneousGptConfig

    def __init__(self, config: HeterogeneousGptConfig) -> None:
        with _no_uniform_layers(config):
            super().__init__(config)
        cache_index, layers = 0, []
        for block in config.block_configs:
            layers.append(HeterogeneousGptLayer(config, block, cache_index))
            cache_index += bool(block["num_attention_heads"])
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = PartialRotaryEmbedding(config)
        if not config.rotary_dim:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if hasattr(self, "embed_positions") and inputs_embeds is None and input_ids is not None:
            if position_ids is None:
                past = 0 if past_key_values is None else past_key_values.get_seq_length()
                position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            inputs_embeds = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class HeterogeneousGptForCausalLM(LlamaForCausalLM):
    config_class = HeterogeneousGptConfig
    _no_split_modules = ("HeterogeneousGptLayer",)

    def __init__(self, config: HeterogeneousGptConfig) -> None:
        with _no_uniform_layers(config):
            super().__init__(config)
        self.model = HeterogeneousGptModel(config)
        self.post_init()


@contextmanager
def _no_uniform_layers(config: HeterogeneousGptConfig) -> Iterator[None]:
    """Keep the parent's constructor from building its own layers.

    On the config itself, not on a copy: the parent resolves the attention implementation there, and a model whose
    config misses it is silently not causal.
    """
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = len(config.block_configs)
