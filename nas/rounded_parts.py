"""Rounded weights of parts, made once: kept in memory or, of models that would fill it, in files mapped into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from export.quantize import QuantizedWeight

#: Of one part, by name within its layer; below 16 bits matrices are integers, biases stay as they are.
RoundedWeights = dict[str, QuantizedWeight | torch.Tensor]


class RoundedParts:
    """By name; with a `folder` in files there, whose pages the system drops where memory is short."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._made: dict[str, RoundedWeights] = {}

    def get(self, name: str, bits: int, make: Callable[[], RoundedWeights]) -> RoundedWeights:
        """What `make` gave, or gives now, for that name and number of bits; ValueError where its file is damaged."""
        if self._folder is None:
            key = f"{name} {bits}"
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]
        file = self._folder / f"{name}-{bits}.safetensors"
        if not file.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            save_file(pack_rounded(make()), partial)
            partial.replace(file)
        try:
            return unpack_rounded(load_file(file), bits)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"wanted rounded weights in {file}, got: {error}; delete it to have it made anew"
            ) from error


def pack_rounded(weights: RoundedWeights) -> dict[str, torch.Tensor]:
    """As plain tensors: of a quantised matrix its integers and its scales, by its name and these words."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight):
            tensors[f"{name}|integers"] = weight.integers.contiguous()
            tensors[f"{name}|scales"] = weight.scales.contiguous()
        else:
            tensors[name] = weight.contiguous()
    return tensors


def unpack_rounded(tensors: dict[str, torch.Tensor], bits: int) -> RoundedWeights:
    weights: RoundedWeights = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition("|")
        if kind == "integers":
            weights[name] = QuantizedWeight(tensor, tensors[f"{name}|scales"], bits)
        elif not kind:
            weights[name] = tensor
    return weights
