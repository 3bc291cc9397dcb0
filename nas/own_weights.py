"""Weights that one subnet holds in place of those it would share, in memory and as a folder of files layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.quantize import QuantizedWeight, fake_quantize
from hw_profiles.shapes import BLOCK_BITS
from nas.calibration import is_complete, load_layer, save_layer
from nas.space import Part, Subnet

#: Of one part, by name within its layer; below 16 bits matrices are integers, biases stay as they are.
RoundedWeights = dict[str, QuantizedWeight | torch.Tensor]


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """What one part of one subnet holds in place of what it would share: fp32, and as rounded to the subnet's bits."""

    exact: dict[str, torch.Tensor]
    rounded: RoundedWeights


#: A dict for each layer; parts that a dict lacks are the shared ones.
OwnLayers = list[dict[Part, OwnWeights]]


def save_own(folder: Path, layers: Sequence[dict[Part, OwnWeights]]) -> None:
    for index, parts in enumerate(layers):
        save_layer(folder, index, _pack(parts))


def has_own(folder: Path, depth: int) -> bool:
    """Whether `save_own` wrote all layers there."""
    return is_complete(folder, depth, set())


def load_own(folder: Path, subnet: Subnet) -> OwnLayers:
    """What `save_own` wrote of that subnet; ValueError where a file is missing or damaged."""
    return [_unpack(load_layer(folder, index, set()), subnet, index) for index in range(len(subnet.layers))]


def _pack(parts: dict[Part, OwnWeights]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for part, own in parts.items():
        for name, tensor in own.exact.items():
            tensors[f"{part}|{name}"] = tensor.contiguous()
            rounded = own.rounded[name]
            if isinstance(rounded, QuantizedWeight):
                tensors[f"{part}|{name}|integers"] = rounded.integers.contiguous()
                tensors[f"{part}|{name}|scales"] = rounded.scales.contiguous()
    return tensors


def _unpack(tensors: dict[str, torch.Tensor], subnet: Subnet, layer: int) -> dict[Part, OwnWeights]:
    parts: dict[Part, OwnWeights] = {}
    for key, tensor in tensors.items():
        prefix, name, *kind = key.split("|")
        if kind:
            continue
        part: Part = "attention" if prefix == "attention" else "mlp"
        precision = subnet.part_precision(layer, part)
        own = parts.setdefault(part, OwnWeights({}, {}))
        own.exact[name] = tensor
        if f"{key}|integers" in tensors:
            integers, scales = tensors[f"{key}|integers"], tensors[f"{key}|scales"]
            own.rounded[name] = QuantizedWeight(integers, scales, BLOCK_BITS[precision])
        else:
            halved = tensor.dim() == 2 and BLOCK_BITS[precision] == 16
            own.rounded[name] = fake_quantize(tensor, precision) if halved else tensor
    return parts
