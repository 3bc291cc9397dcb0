"""SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024): fewer dimensions of the residual stream, by principal components.

Before each norm the stream is turned to its principal components on calibration text, and the least of them are cut
off: of every matrix of a block one side shrinks, and each shortcut gets a matrix that leads from one basis to the next.
Here the stream is projected instead, which computes the same logits with the model as wide as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from structured_peers import kept_parameters
from torch import nn

from nas.arithmetic import computing, fast_dtype
from nas.calibration import moments
from nas.subnet import PARTS
from nas.supernet import Supernet

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Sliced:
    """A projection [hidden, hidden] before each norm in turn, the last one's included; of `dimensions` each."""

    supernet: Supernet
    dimensions: int
    projections: list[torch.Tensor]

    @property
    def kept_parameters(self) -> int:
        """Of the blocks' matrices, those of the shortcuts included."""
        return _kept(self.supernet, self.dimensions)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the full model computes as the sliced one."""
        self.supernet.activate(self.supernet.space.full(32))
        pairs = zip(_norms(self.supernet), self.projections, strict=True)
        hooks = [norm.register_forward_pre_hook(_projecting(projection)) for norm, projection in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def slicegpt(supernet: Supernet, windows: torch.Tensor, removed: float) -> Sliced:
    """Calibrated on token windows [N, T], each basis on the stream as those before it leave it."""
    loaded = supernet.loaded
    limit = (1 - removed) * kept_parameters(supernet, [{}] * supernet.space.depth)
    dimensions = max(d for d in range(1, loaded.shape.hidden_size + 1) if _kept(supernet, d) <= limit)
    batches = [loaded.embed(batch) for batch in windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))]
    projections = []
    for layer in range(supernet.space.depth):
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            projections.append(_principal(batches, dimensions))
            supernet.activate_part(layer, part, supernet.full_size(part), "fp32")
            supernet.activate_part(layer, other, 0, "fp32")
            batches = [batch @ projections[-1] for batch in batches]
            with computing(fast_dtype()):
                batches = [loaded.run_layer(layer, batch) for batch in batches]
    projections.append(_principal(batches, dimensions))
    return Sliced(supernet, dimensions, projections)


def _kept(supernet: Supernet, dimensions: int) -> int:
    shape, parts = supernet.loaded.shape, len(PARTS) * supernet.space.depth
    share = dimensions / shape.hidden_size
    whole = kept_parameters(supernet, [{}] * supernet.space.depth)
    return math.ceil(share * whole) + (parts * dimensions**2 if share < 1 else 0)


def _principal(batches: list[torch.Tensor], dimensions: int) -> torch.Tensor:
    """Onto the leading components of the normed stream, as the paper has it."""
    total = torch.zeros(())
    for batch in batches:
        x = batch.flatten(0, -2).float()
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        total = total + moments(x, x)
    leading = torch.linalg.eigh(total.double()).eigenvectors[:, -dimensions:]
    return (leading @ leading.T).float()


def _norms(supernet: Supernet) -> list[nn.Module]:
    loaded, family = supernet.loaded, supernet.loaded.family
    names = (family.attention_norm, family.mlp_norm)
    return [layer.get_submodule(name) for layer in loaded.layers for name in names] + [
        loaded.model.get_submodule(family.final_norm)
    ]


def _projecting(projection: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # in place: what the norm reads is also what the shortcut around the part carries on
        with torch.autocast("cpu", enabled=False):
            inputs[0].copy_(inputs[0].float() @ projection)

    return hook
