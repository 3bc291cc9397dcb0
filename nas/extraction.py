"""Subnets taken out of a supernet: as Hugging Face models that stand alone, and as the integers that are shipped."""

from __future__ import annotations

import copy
from typing import Any

from export.huggingface import heterogeneous_model, is_plain, plain_model
from export.quantize import QuantizedWeight
from nas.subnet import PARTS, SKIPPED, Subnet
from nas.supernet import Supernet


def extract(supernet: Supernet, subnet: Subnet, *, shared: bool = False) -> Any:
    """A Hugging Face model with `subnet`'s weights in fp32, not yet rounded; standing alone, or with `shared` made of
    the supernet's own tensors, which nobody may then change in place.

    Of the family's own architecture where that can say it, with the layers kept renumbered; else heterogeneous. A head
    that is rounded to other bits than the embedding is not tied to it.
    """
    loaded, blocks = supernet.loaded, supernet.space.model_shape(subnet).blocks
    make = plain_model if is_plain(loaded.config, blocks) else heterogeneous_model
    config = copy.deepcopy(loaded.config)
    config.tie_word_embeddings = supernet.ends.tied and not subnet.head_bits
    model = make(config, blocks)
    family = loaded.family
    state = {
        f"{path}.{name}": tensor
        for index, path in extracted_layers(supernet, subnet).items()
        for name, tensor in supernet.layer_weights(subnet, index).items()
    }
    embedding, head = supernet.ends.exact()
    for path in (family.final_norm, *([family.positions] if loaded.has_learned_positions else [])):
        state |= {f"{path}.{name}": t.float() for name, t in loaded.model.get_submodule(path).state_dict().items()}
    state |= {f"{family.embedding}.weight": embedding, f"{family.head}.weight": head}
    model.load_state_dict(state, strict=True, assign=shared)
    model.tie_weights()
    model.generation_config = copy.deepcopy(loaded.model.generation_config)
    model.requires_grad_(False).eval()
    return model


def extracted_layers(supernet: Supernet, subnet: Subnet) -> dict[int, str]:
    """Paths in `extract`'s model of the layers that are there."""
    loaded, kept = supernet.loaded, list(range(supernet.space.depth))
    if is_plain(loaded.config, supernet.space.model_shape(subnet).blocks):
        kept = [index for index in kept if subnet.layers[index] != SKIPPED]
        return {index: f"{loaded.family.layers}.{number}" for number, index in enumerate(kept)}
    return {index: f"{loaded.family.layers}.{index}" for index in kept}


def rounded_matrices(supernet: Supernet, subnet: Subnet) -> dict[str, QuantizedWeight]:
    """The integers and scales of every matrix that `subnet` rounds, by name in the state dict of `extract`."""
    if subnet.bits >= 16:
        return {}
    rounded: dict[str, QuantizedWeight] = {}
    for index, path in extracted_layers(supernet, subnet).items():
        for part in PARTS:
            if subnet.layers[index].size(part):
                for name, tensor in supernet.rounded_part(subnet, index, part).items():
                    if isinstance(tensor, QuantizedWeight):
                        rounded[f"{path}.{name}"] = tensor
    return rounded | supernet.ends.quantized(subnet.precision, subnet.head_bits)
