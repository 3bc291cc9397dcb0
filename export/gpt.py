"""GPT-2, GPT-NeoX and OPT as the one form of `export.heterogeneous_gpt`, and back.

Their weights are fused, transposed or named in ways of their own; in the one form each projection can shrink alone.
Folders whose layers are alike and keep all heads are written in the family's own form again.

Shapes: H hidden, h heads of d dimensions, of which r rotate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from export.heterogeneous_gpt import HeterogeneousGptConfig, HeterogeneousGptForCausalLM

State = dict[str, torch.Tensor]

#: The least that a row of OPT's positions is above the position.
_OPT_OFFSET = 2
_COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_QUERY, _KEY, _VALUE = (f"self_attn.{name}_proj" for name in "qkv")


@dataclass(frozen=True)
class _Row:
    """One family: names of modules, those outside the layers whole, those within a layer from the layer on.

    `fused` holds queries, keys and values in one module, by head where `interleaved`; otherwise `names` has them.
    `fields` are the config's names of ours, `constants` what of ours it has no field for, `rotates` whether some
    dimensions of heads do. `refused` are values of its fields that the one form does not compute.
    """

    layers: str
    ends: Mapping[str, str]
    names: Mapping[str, str]
    fields: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    fused: str = ""
    interleaved: bool = False
    transposed: bool = False
    position_offset: int = 0
    rotates: bool = False
    refused: tuple[tuple[str, Any], ...] = ()


_ROWS: dict[str, _Row] = {
    "gpt2": _Row(
        layers="transformer.h",
        ends={"embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "norm": "transformer.ln_f"},
        names={
            "input_layernorm": "ln_1",
            "self_attn.o_proj": "attn.c_proj",
            "post_attention_layernorm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fields={
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "layer_norm_eps": "layer_norm_epsilon",
        },
        constants={"attention_bias": True, "mlp_bias": True},
        fused="attn.c_attn",
        transposed=True,
        refused=(("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)),
    ),
    "opt": _Row(
        layers="model.decoder.layers",
        ends={
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm",
        },
        names={
            "input_layernorm": "self_attn_layer_norm",
            _QUERY: "self_attn.q_proj",
            _KEY: "self_attn.k_proj",
            _VALUE: "self_attn.v_proj",
            "self_attn.o_proj": "self_attn.out_proj",
            "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
        fields={
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias",
            "hidden_size": "word_embed_proj_dim",
        },
        position_offset=_OPT_OFFSET,
        refused=(
            ("do_layer_norm_before", False),
            ("_remove_final_layer_norm", True),
            ("layer_norm_elementwise_affine", False),
        ),
    ),
    "gpt_neox": _Row(
        layers="gpt_neox.layers",
        ends={"embed_tokens": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm"},
        names={
            "input_layernorm": "input_layernorm",
            "self_attn.o_proj": "attention.dense",
            "post_attention_layernorm": "post_attention_layernorm",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fields={
            "intermediate_size": "intermediate_size",
            "hidden_act": "hidden_act",
            "layer_norm_eps": "layer_norm_eps",
            "attention_bias": "attention_bias",
            "parallel_residual": "use_parallel_residual",
        },
        constants={"mlp_bias": True},
        fused="attention.query_key_value",
        interleaved=True,
        rotates=True,
    ),
}

#: transformers' names of one function.
_SAME_ACTIVATION = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


def gpt_config(config: PreTrainedConfig) -> HeterogeneousGptConfig:
    """The same model's config in the one form; ValueError for what that does not compute."""
    row = _ROWS[config.model_type]
    for name, value in row.refused:
        if getattr(config, name, None) == value:
            raise ValueError(f"wanted a model of {config.model_type} without {name} = {value}; take another model")
    fields = {**{ours: getattr(config, theirs) for ours, theirs in row.fields.items()}, **row.constants}
    if (size := fields.get("hidden_size", config.hidden_size)) != config.hidden_size:
        raise ValueError(f"wanted embeddings of the hidden size {config.hidden_size}, got {size}; take another model")
    fields |= {name: getattr(config, name) for name in _COMMON_FIELDS}
    fields["intermediate_size"] = fields["intermediate_size"] or 4 * config.hidden_size  # None in most GPT-2s
    head_dim = config.hidden_size // config.num_attention_heads
    if row.rotates:
        rope = config.rope_parameters
        if rope["rope_type"] != "default":
            raise ValueError(
                f"wanted rotary embeddings as trained, got a rope_type of {rope['rope_type']!r}; take another model"
            )
        fields["rotary_dim"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    fields["hidden_act"] = _SAME_ACTIVATION.get(fields["hidden_act"], fields["hidden_act"])
    heads = fields["num_attention_heads"]
    block = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": fields["intermediate_size"],
    }
    return HeterogeneousGptConfig(
        [block] * fields["num_hidden_layers"],
        config.model_type,
        head_dim=head_dim,
        num_key_value_heads=heads,
        **fields,
    )


def gpt_model(model: PreTrainedModel) -> HeterogeneousGptForCausalLM:
    """The model in fp32 that computes the same in the one form; raises as `gpt_config`."""
    config, row = gpt_config(model.config), _ROWS[model.config.model_type]
    state = {name: tensor.float() for name, tensor in _to_gpt(model.state_dict(), row, config)}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        made = HeterogeneousGptForCausalLM(config)
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    made.eval()
    return made


def _to_gpt(state: Mapping[str, torch.Tensor], row: _Row, config: HeterogeneousGptConfig) -> Iterator[Any]:
    ends = {theirs: _end(ours) for ours, theirs in row.ends.items()} | {"lm_head": "lm_head"}
    names = {theirs: ours for ours, theirs in row.names.items()}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in ends:
            yield f"{ends[module]}.{kind}", tensor[row.position_offset :] if "positions" in ends[module] else tensor
        elif found := re.fullmatch(rf"{re.escape(row.layers)}\.(\d+)\.(.+)", module):
            path, within = f"model.layers.{found[1]}", found[2]
            tensor = tensor.T if row.transposed and tensor.dim() == 2 else tensor
            if within == row.fused:
                for ours, rows in zip((_QUERY, _KEY, _VALUE), _split(tensor, row, config), strict=True):
                    yield f"{path}.{ours}.{kind}", rows.contiguous()
            else:
                yield f"{path}.{names[within]}.{kind}", tensor.contiguous()


def family_config(config: HeterogeneousGptConfig) -> PreTrainedConfig | None:
    """What `gpt_config` makes this of, without layers that are skipped whole; None where the family has no such one."""
    kept = [block for block in config.block_configs if any(block.values())]
    if not kept or any(block != kept[0] for block in kept) or not kept[0]["intermediate_size"]:
        return None
    if kept[0]["num_attention_heads"] * config.head_dim != config.hidden_size:
        return None
    row, own = _ROWS[config.base_model_type], AutoConfig.for_model(config.base_model_type)
    for ours, theirs in (*zip(_COMMON_FIELDS, _COMMON_FIELDS, strict=True), *row.fields.items()):
        setattr(own, theirs, getattr(config, ours))
    setattr(own, row.fields["intermediate_size"], kept[0]["intermediate_size"])
    own.num_hidden_layers = len(kept)
    if row.rotates:
        own.rope_parameters = config.rope_parameters | {"partial_rotary_factor": config.rotary_dim / config.head_dim}
    return own


def family_model(model: HeterogeneousGptForCausalLM) -> PreTrainedModel | None:
    """The model that computes the same in its family's own form, where there is one."""
    config = family_config(model.config)
    if config is None:
        return None
    row = _ROWS[config.model_type]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(dict(_from_gpt(model.state_dict(), row, model.config)), strict=True, assign=True)
    made.tie_weights()
    for path, module in list(made.named_modules()):
        if path.endswith("rotary_emb"):  # whose frequencies are in no state dict
            made.set_submodule(path, type(module)(config))
    made.generation_config = model.generation_config
    return made.eval()


def _from_gpt(state: Mapping[str, torch.Tensor], row: _Row, config: HeterogeneousGptConfig) -> Iterator[Any]:
    kept = [index for index, block in enumerate(config.block_configs) if any(block.values())]
    for ours, theirs in (*row.ends.items(), ("lm_head", "lm_head")):
        for kind in ("weight", "bias"):
            if (name := f"{_end(ours)}.{kind}") in state:
                tensor = state[name]
                if "positions" in ours:  # those of padding are read by nobody
                    tensor = torch.cat([tensor.new_zeros(row.position_offset, tensor.shape[1]), tensor])
                yield f"{theirs}.{kind}", tensor
    for number, index in enumerate(kept):
        for kind in ("weight", "bias"):
            layer = {n: state.get(f"model.layers.{index}.{n}.{kind}") for n in (*row.names, _QUERY, _KEY, _VALUE)}
            found = {row.names[n]: tensor for n, tensor in layer.items() if n in row.names and tensor is not None}
            if row.fused and (parts := [t for t in (layer[n] for n in (_QUERY, _KEY, _VALUE)) if t is not None]):
                found[row.fused] = _fuse(parts, row, config)
            for name, tensor in found.items():
                plain = tensor.T.contiguous() if row.transposed and tensor.dim() == 2 else tensor
                yield f"{row.layers}.{number}.{name}.{kind}", plain


def _end(ours: str) -> str:
    return ours if ours == "lm_head" else f"model.{ours}"


def _split(fused: torch.Tensor, row: _Row, config: HeterogeneousGptConfig) -> list[torch.Tensor]:
    """Rows [3 H, ...] of a fused map as those of queries, keys and values [H, ...], rotary halves moved apart."""
    if not row.interleaved:
        return list(fused.chunk(3))
    by_head = fused.reshape(-1, 3, config.head_dim, *fused.shape[1:])
    order = _rotary_order(config)
    return [by_head[:, 0, order].flatten(0, 1), by_head[:, 1, order].flatten(0, 1), by_head[:, 2].flatten(0, 1)]


def _fuse(parts: list[torch.Tensor], row: _Row, config: HeterogeneousGptConfig) -> torch.Tensor:
    """What `_split` took apart."""
    if not row.interleaved:
        return torch.cat(parts)
    back = _rotary_order(config).argsort()
    q, k, v = (part.reshape(-1, config.head_dim, *part.shape[1:]) for part in parts)
    return torch.stack([q[:, back], k[:, back], v], 1).flatten(0, 2)


def _rotary_order(config: HeterogeneousGptConfig) -> torch.Tensor:
    """Of a head's dimensions: with the two rotary halves half a head apart.

    Scores are sums over the dimensions, so that queries and keys may change their order together.
    """
    r, d = config.rotary_dim, config.head_dim
    middle = r + (d - r) // 2
    return torch.cat(
        [torch.arange(0, r // 2), torch.arange(r, middle), torch.arange(r // 2, r), torch.arange(middle, d)]
    )
