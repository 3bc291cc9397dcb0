"""Weights that one subnet holds in place of those it would share, in memory and as a folder of files layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.quantize import fake_quantize
from hw_profiles.shapes import BLOCK_BITS
from nas.calibration import is_complete, load_layer, save_layer
from nas.rounded_parts import RoundedWeights, pack_rounded, unpack_rounded
from nas.subnet import PARTS, Part, Subnet


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """What one part of one subnet holds in place of what it would share: fp32, and as rounded to the subnet's bits."""

    exact: dict[str, torch.Tensor]
    rounded: RoundedWeights


#: A dict for each layer; parts that a dict lacks are the shared ones.
OwnLayers = list[dict[Part, OwnWeights]]


def save_own(folder: Path, layers: Sequence[dict[Part, OwnWeights]]) -> None:
    for index, parts in enumerate(layers):
        save_own_layer(folder, index, parts)


def save_own_layer(folder: Path, index: int, parts: dict[Part, OwnWeights]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for part, own in parts.items():
        tensors |= {f"{part}|{name}": tensor.contiguous() for name, tensor in own.exact.items()}
        # what is no integer is made anew from the exact weights
        integers = {key: tensor for key, tensor in pack_rounded(own.rounded).items() if key not in own.exact}
        tensors |= {f"{part}|{key}": tensor for key, tensor in integers.items()}
    save_layer(folder, index, tensors)


def has_own(folder: Path, depth: int) -> bool:
    """Whether all layers of a subnet were written there."""
    return is_complete(folder, depth, set())


def load_own(folder: Path, subnet: Subnet) -> OwnLayers:
    """What was written of that subnet; ValueError where a file is missing or damaged."""
    return [load_own_layer(folder, index, subnet) for index in range(len(subnet.layers))]


def load_own_layer(folder: Path, index: int, subnet: Subnet) -> dict[Part, OwnWeights]:
    tensors = load_layer(folder, index, set())
    parts: dict[Part, OwnWeights] = {}
    for part in PARTS:
        stored = {key.removeprefix(f"{part}|"): t for key, t in tensors.items() if key.startswith(f"{part}|")}
        if stored:
            precision = subnet.part_precision(index, part)
            exact = {key: tensor for key, tensor in stored.items() if "|" not in key}
            halved = BLOCK_BITS[precision] == 16
            rounded: RoundedWeights = {
                name: fake_quantize(tensor, precision) if halved and tensor.dim() == 2 else tensor
                for name, tensor in exact.items()
            }
            integers = {key: tensor for key, tensor in stored.items() if key not in exact}
            parts[part] = OwnWeights(exact, rounded | unpack_rounded(integers, BLOCK_BITS[precision]))
    return parts
