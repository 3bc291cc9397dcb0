"""What stands in a decoder's layer: modules for parts that are skipped, weights put into others, calls around a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Owner = TypeVar("Owner")


class SkippedAttention(nn.Module):
    """Adds nothing to the residual stream and owns no slot in a KV cache."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class SkippedMlp(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def put_tensor(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """In place of the layer's parameter of that name, also under an adapter; a linear map takes on its size."""
    path, _, attribute = name.rpartition(".")
    module = layer.get_submodule(path)
    linear = getattr(module, "base_layer", module)
    weight = linear.get_parameter("weight")  # there is one also where a bias is new
    setattr(linear, attribute, nn.Parameter(tensor.to(weight.device), requires_grad=False))
    if isinstance(linear, nn.Linear) and attribute == "weight":
        linear.out_features, linear.in_features = tensor.shape


def call_around(
    layer: nn.Module, owner: weakref.ref[Owner], before: Callable[[Owner], None], after: Callable[[Owner], None]
) -> None:
    """Call both around every run of the layer, for as long as there is the owner."""

    def at_start(*_: Any) -> None:
        if (there := owner()) is not None:
            before(there)

    def at_end(*_: Any) -> None:
        if (there := owner()) is not None:
            after(there)

    layer.register_forward_pre_hook(at_start)
    layer.register_forward_hook(at_end, always_call=True)
