"""Hugging Face folders of decoders: safetensors, config, tokenizer and, where layers differ, the modelling file."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from export.gpt import family_model
from export.heterogeneous import HeterogeneousLlamaConfig, HeterogeneousLlamaForCausalLM
from export.heterogeneous_gemma import (
    HeterogeneousGemma2Config,
    HeterogeneousGemma2ForCausalLM,
    HeterogeneousGemma3Config,
    HeterogeneousGemma3ForCausalLM,
)
from export.heterogeneous_gpt import HeterogeneousGptConfig, HeterogeneousGptForCausalLM
from export.tokenizer_files import write_tokenizer
from hw_profiles.shapes import BlockShape, ModelShape

#: Of one safetensors file: what file systems, hubs and resumed downloads are at ease with.
MAX_SHARD_SIZE = "4GB"
#: Classes of models whose layers differ.
_HETEROGENEOUS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    HeterogeneousLlamaConfig: HeterogeneousLlamaForCausalLM,
    HeterogeneousGemma2Config: HeterogeneousGemma2ForCausalLM,
    HeterogeneousGemma3Config: HeterogeneousGemma3ForCausalLM,
    HeterogeneousGptConfig: HeterogeneousGptForCausalLM,
}
_GEMMAS = {c.base_model_type: c for c in (HeterogeneousGemma2Config, HeterogeneousGemma3Config)}
#: Families that compute as another one does.
_SAME_AS = {"mistral": "llama"}
#: Keys of a config that describe where it came from, not what it is, or windows that no layer has.
_ORIGIN_KEYS = (
    "model_type",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
    "auto_map",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
)


def register() -> None:
    """Let `AutoModelForCausalLM` load our folders without remote code where llm-nas is installed."""
    for config_class, model_class in _HETEROGENEOUS.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def heterogeneous_model(base_config: PreTrainedConfig, blocks: Sequence[BlockShape]) -> PreTrainedModel:
    """An fp32 model with these blocks and uninitialised weights, named as in the base model minus what is skipped."""
    fields = {key: value for key, value in base_config.to_dict().items() if key not in _ORIGIN_KEYS}
    block_configs = [block.sizes for block in blocks]
    config: PreTrainedConfig
    if base_config.model_type in _GEMMAS:
        kinds = ({"layer_type": kind} for kind in base_config.layer_types)
        with_kinds = [block | kind for block, kind in zip(block_configs, kinds, strict=True)]
        config = _GEMMAS[base_config.model_type](with_kinds, **fields)
    elif isinstance(base_config, HeterogeneousGptConfig):
        config = HeterogeneousGptConfig(**fields | {"block_configs": block_configs, "num_hidden_layers": len(blocks)})
    else:
        fields["num_hidden_layers"] = len(blocks)
        family = _SAME_AS.get(base_config.model_type, base_config.model_type)
        config = HeterogeneousLlamaConfig(block_configs, family, **fields)
    with torch.device("meta"):
        model = _HETEROGENEOUS[type(config)](config)
    return _on_cpu(model)


def is_plain(config: PreTrainedConfig, blocks: Sequence[BlockShape]) -> bool:
    """Whether the family's own architecture can say these blocks: alike, and others skipped whole."""
    kept = {BlockShape(**block.sizes) for block in blocks} - {BlockShape(0, 0, 0)}
    if len(kept) != 1 or isinstance(config, HeterogeneousGptConfig):  # whose form is chosen when it is written
        return False
    (block,) = kept
    # transformers refuses heads that do not divide the hidden size, though they have a dimension of their own
    heads = block.num_attention_heads
    return heads > 0 and block.intermediate_size > 0 and config.hidden_size % heads == 0


def plain_model(base_config: PreTrainedConfig, blocks: Sequence[BlockShape]) -> PreTrainedModel:
    """The same in the family's own architecture, layers renumbered without those skipped; for `is_plain` blocks."""
    kept = [index for index, block in enumerate(blocks) if block.num_attention_heads]
    config = copy.deepcopy(base_config)
    config.head_dim = ModelShape.from_config(base_config, ()).head_dim
    for field, value in blocks[kept[0]].sizes.items():
        setattr(config, field, value)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _on_cpu(model)


def _on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """A model built without memory, with its weights uninitialised."""
    model.to_empty(device="cpu")
    compute_buffers(model)
    model.tie_weights()
    model.eval()
    return model


def compute_buffers(model: PreTrainedModel) -> None:
    """Fill in what is not in the state dict of a model built without memory: rotary frequencies, Gemma's scale."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    embedding = model.model.embed_tokens
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)


def write_huggingface(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Write the folder that `AutoModelForCausalLM.from_pretrained` loads, in fp32, and return it."""
    logging.disable_progress_bar()  # of a second's work
    if isinstance(model, HeterogeneousGptForCausalLM):
        model = family_model(model) or model
    model.config.architectures = [type(model).__name__]
    if type(model.config) in _HETEROGENEOUS:
        module = Path(inspect.getfile(type(model)))
        shutil.copy(module, directory / module.name)
        model.config.auto_map = {
            "AutoConfig": f"{module.stem}.{type(model.config).__name__}",
            "AutoModelForCausalLM": f"{module.stem}.{type(model).__name__}",
        }
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    # transformers 4 reads rope_theta and rope_scaling, and without them would silently take 10,000 and none; of a
    # layer's kind, Gemma's, too
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text())
    rope = config.get("rope_parameters")
    if rope is not None and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    elif rope is not None:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tokenizer(tokenizer, directory)
    return directory
