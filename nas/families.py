"""Where each family of decoders keeps its parts, and how a model is loaded: one row per `model_type`.

A model is a Hugging Face id, a local folder, or a .gguf file. Shape letters: N windows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hw_profiles.devices import detect
from hw_profiles.shapes import HIDDEN_ACTS, VALUE_BYTES, ModelShape
from nas.distillation import capped
from nas.fingerprint import fingerprint
from nas.fused import unfused, unfused_config
from nas.gguf_model import gguf_config, load_gguf
from nas.space import model_shape
from nas.subnet import Part


@dataclass(frozen=True)
class Family:
    """Attribute paths, from the model for the first group and from one layer for the second."""

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    #: Empty where MLPs have none.
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    #: Of what the parts add to the residual stream, where there are such norms.
    attention_post_norm: str = ""
    mlp_post_norm: str = ""

    #: The config attribute, where there is one, that limits attention in all layers to a window.
    sliding_window: str = ""
    #: Whether layers are of two kinds, one of which has a window, and whether each has a rotary embedding of its own.
    layer_types: bool = False
    rotary_by_kind: bool = False
    #: Of a learned embedding of positions, where there is one.
    positions: str = ""
    #: The family as which it is computed: fused or transposed maps are taken apart when it is loaded.
    computed_as: str = ""

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The MLP's projections that read the residual stream."""
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def read_together(self) -> tuple[tuple[str, ...], ...]:
        """A layer's projections, those together that read the same."""
        return (self.query, self.key, self.value), (self.output,), self.mlp_inputs, (self.down,)

    def norms(self, part: Part) -> tuple[str, ...]:
        """Within a layer, before the part and, where there is one, behind it."""
        found = {
            "attention": (self.attention_norm, self.attention_post_norm),
            "mlp": (self.mlp_norm, self.mlp_post_norm),
        }
        return tuple(filter(None, found[part]))


_GEMMA = Family(
    "gemma",
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    layer_types=True,
)
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral", sliding_window="sliding_window"),
        Family("qwen2", sliding_window="sliding_window"),
        Family("qwen3", sliding_window="sliding_window"),
        Family("phi3", sliding_window="sliding_window", computed_as="llama"),
        Family("gpt2", computed_as="heterogeneous_gpt"),
        Family("gpt_neox", computed_as="heterogeneous_gpt"),
        Family("opt", computed_as="heterogeneous_gpt"),
        replace(_GEMMA, model_type="gemma2"),
        replace(_GEMMA, model_type="gemma3_text", rotary_by_kind=True),
    )
}


#: As which the others are computed.
_FORMS = FAMILIES | {"heterogeneous_gpt": Family("heterogeneous_gpt", gate="", positions="model.embed_positions")}

#: Of the memory there is, the share that a model in fp32 may take.
_ROOMY = 1 / 3
#: Rotary embeddings that are the same whatever the number of positions.
_ROPE_OF_ANY_LENGTH = ("default", "linear", "llama3")


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its tokenizer; `fingerprint` is equal for equal configs and weights.

    In fp32, or where that would fill the memory in the type that it is stored in: then a layer computes only within a
    `nas.supernet.Supernet`, which gives it fp32 weights while it runs.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    family: Family
    #: As the model's own files name it.
    licence: str | None = None
    #: Positions that the model was left with because its attention is limited to a window of as many.
    window: int | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.family.layers))

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self.model.get_submodule(self.family.head)
        return head

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.config)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [N, T] -> the hidden states [N, T, D] that enter layer 0.

        ValueError for texts longer than the positions that were learned.
        """
        hidden: torch.Tensor = self.model.get_submodule(self.family.embedding)(tokens).float()
        if self.has_learned_positions:
            if tokens.shape[1] > (most := self.config.max_position_embeddings):
                raise ValueError(
                    f"wanted texts of at most {most} tokens, which {self.name} has positions for, got "
                    f"{tokens.shape[1]}; take another model"
                )
            hidden = hidden + self.model.get_submodule(self.family.positions)(torch.arange(tokens.shape[1]))
        return hidden

    @property
    def has_learned_positions(self) -> bool:
        """A family may have models whose positions rotate queries and keys instead."""
        return bool(self.family.positions) and not self.config.rotary_dim

    def run_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, T, D] through layer `index` as it is now, causally, without a cache."""
        layer, positions = self.layers[index], torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary, mask = self.model.get_submodule(self.family.rotary), None
        if self.family.layer_types:
            kind = getattr(layer, "layer_type", None) or self.config.layer_types[index]
            mask = self._mask(hidden, positions, kind)
            embeddings = rotary(hidden, positions, *([kind] if self.family.rotary_by_kind else []))
        else:
            embeddings = rotary(hidden, positions)
        out: torch.Tensor = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)
        return out

    def _mask(self, hidden: torch.Tensor, positions: torch.Tensor, kind: str) -> torch.Tensor | None:
        """Of a layer of this kind; None where the attention is causal by itself and no text longer than a window."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        mask: torch.Tensor | None = make(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return mask

    @property
    def logit_cap(self) -> float:
        """c, where logits are c tanh(x / c) of what the head computes; 0 where they are that."""
        return float(getattr(self.config, "final_logit_softcapping", None) or 0)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.get_submodule(self.family.final_norm)(hidden)
        return normed

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of token ids [N, T], as layers are now: fp32 [N, T, V]."""
        hidden = self.embed(tokens)
        for index in range(len(self.layers)):
            hidden = self.run_layer(index, hidden)
        return capped(nn.functional.linear(self.final_norm(hidden), self.head.weight.float()), self.logit_cap)


def wrap(model: Any, tokenizer: Any, name: str, licence: str | None = None, window: int | None = None) -> LoadedModel:
    """A Hugging Face model that is already in memory as a LoadedModel.

    ValueError where its family has no row, or its attention a window.
    """
    row = _family(model.config)
    if row.sliding_window and getattr(model.config, row.sliding_window, None):
        raise ValueError(f"wanted full attention in every layer, got a config with {row.sliding_window} set; unset it")
    if row.computed_as:
        model = _rewritten(model, row)
    _check_activation(model.config)
    model.requires_grad_(False).eval()
    form = _FORMS[row.computed_as or row.model_type]
    return LoadedModel(model, tokenizer, name, fingerprint(model), form, licence, window)


def load_model(model: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load a Hugging Face id, a local folder or a .gguf file, ready for evaluation.

    Raises ValueError where there is nothing of that name, the file is no sound GGUF, or the family is not supported.
    """
    source = _locate(model)
    if isinstance(source, Path):
        model_, tokenizer, licence = load_gguf(source)
        return wrap(model_, tokenizer, source.stem, licence)
    return _load_huggingface(source, trust_remote_code)


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The config of what `load_model` would load, without its weights; raises as that does."""
    from transformers import AutoConfig

    source = _locate(model)
    if isinstance(source, Path):
        config = gguf_config(source)
    else:
        with _sound(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    config, _ = within_window(config)
    config = _rewritten_config(config, _family(config))
    _check_activation(config)
    return config


def fills_memory(shape: ModelShape) -> bool:
    """Whether a model of that shape in fp32 leaves no room for subnets beside it."""
    return VALUE_BYTES["fp32"] * shape.parameters > _ROOMY * detect().memory_bytes


def _kept_as_stored(config: Any) -> bool:
    """Where memory is short; not of families that are rewritten in fp32, or whose embedding half precision rounds."""
    row = _family(config)
    return not row.computed_as and not (shape := model_shape(config)).scaled_embedding and fills_memory(shape)


def _rewritten(model: Any, row: Family) -> Any:
    """As the family that it is computed as; ValueError for what that does not compute."""
    if row.computed_as == "llama":
        return unfused(model)
    from export.gpt import gpt_model  # of transformers' models, which take a second to import

    return gpt_model(model)


def _rewritten_config(config: Any, row: Family) -> Any:
    if row.computed_as == "llama":
        return unfused_config(config)
    if row.computed_as:
        from export.gpt import gpt_config

        return gpt_config(config)
    return config


def within_window(config: Any) -> tuple[Any, int | None]:
    """A config of full attention over as many positions as the window has, for texts that short the same; the window.

    None where the config has no window, or one that no text within its positions is longer than. ValueError where its
    rotary embedding depends on the number of positions.
    """
    row = _family(config)
    window = getattr(config, row.sliding_window, None) if row.sliding_window else None
    if not window:
        return config, None
    config = copy.deepcopy(config)
    setattr(config, row.sliding_window, None)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    if window >= config.max_position_embeddings:
        return config, None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_OF_ANY_LENGTH:
        raise ValueError(
            f"wanted a sliding window beside a rotary embedding of type {', '.join(_ROPE_OF_ANY_LENGTH)}, got {rope}, "
            "which depends on the number of positions; take another model"
        )
    config.max_position_embeddings = window
    return config, window


def _locate(model: str) -> Path | str:
    """The GGUF file that `model` names, otherwise the folder or Hugging Face id for transformers."""
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(
                f"wanted a folder with config.json or one .gguf file, got {path} with {len(found)} of them"
            )
        path = found[0]
    if path.is_file():
        return path
    looks_like_path = model.endswith(".gguf") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith(".")
    if not path.exists() and looks_like_path:
        raise ValueError(f"wanted a Hugging Face id, a folder or a .gguf file, but there is no {path}; check the path")
    return str(path) if path.exists() else model


def _family(config: Any) -> Family:
    row = FAMILIES.get(config.model_type)
    if row is None:
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(f"wanted a model of one of the families {supported}, got model_type {config.model_type!r}")
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError("wanted a causal decoder, got use_bidirectional_attention = True; take another model")
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(f"wanted heads that divide the hidden size, as transformers does, got {heads} for {hidden}")
    return row


def _check_activation(config: Any) -> None:
    if (activation := model_shape(config).hidden_act) not in HIDDEN_ACTS:
        raise ValueError(f"wanted {', '.join(HIDDEN_ACTS)} in the MLPs, got {activation!r}; take another model")


def _load_huggingface(source: str, trust_remote_code: bool) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours tell what a user waits for
    options = {"trust_remote_code": trust_remote_code}
    with _sound(source):
        config = AutoConfig.from_pretrained(source, **options)
    config, window = within_window(config)
    dtype = "auto" if _kept_as_stored(config) else torch.float32
    with _sound(source):
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    name = Path(source).name if Path(source).exists() else source  # an id with its owner is what a card links to
    return wrap(model, tokenizer, name, _licence(source), window)


def _licence(source: str) -> str | None:
    """What the model card of a folder, or of a Hugging Face id in the cache, names; nothing is fetched for it."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card = Path(source, "README.md") if Path(source).is_dir() else try_to_load_from_cache(source, "README.md")
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):  # no text, or no card's format
        return None
    return licence if isinstance(licence, str) else None


@contextmanager
def _sound(source: str) -> Iterator[None]:
    """ValueError for whatever transformers raises for files that are not there, damaged, or of another kind."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"wanted a Hugging Face model with its tokenizer at {source}, got: {reason}") from error
