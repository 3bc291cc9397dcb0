"""PEFT's LoRA layer with an active rank, a mask and an integer grid; stock PEFT where it has none of them.

W' = W + s (B[:, :r] A[:r]) * M, rounded to the grid where there is one. s = alpha / R is that of the whole adapter
whatever r is (NLS, Munoz et al., arXiv 2404.10934), M keeps the zeros of a sparse W (SparsePEFT, arXiv 2410.03750), and
the gradient passes the rounding as if it were not there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from export.quantize import QuantizedWeight, dequantize, quantize_to


class ElasticLinear(lora.Linear):
    """One adapter over one linear map. `active_rank` is its prefix in use, None for all of it."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.active_rank: int | None = None
        #: Indices of the outputs and inputs that the active subnet keeps; None where it keeps all.
        self.rows: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None
        # not in a checkpoint: they belong to the base
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)
        self.bits = 32

    def constrain(self, mask: torch.Tensor | None, grid: QuantizedWeight | None) -> None:
        """Keep zeros where `mask` [out, in] is False, and round to the scales of `grid`."""
        self.mask = mask
        if grid is not None:
            self.scales, self.bits = grid.scales, grid.bits

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, in] and B [out, R] of the largest rank."""
        name = self.active_adapters[0]
        return self.lora_A[name].weight, self.lora_B[name].weight

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of the active rank, and of the outputs and inputs that are kept."""
        A, B = self.matrices()
        A, B = A[: self.active_rank], B[:, : self.active_rank]
        return A if self.columns is None else A[:, self.columns], B if self.rows is None else B[self.rows]

    @property
    def scale(self) -> float:
        return float(self.scaling[self.active_adapters[0]])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged:
            return self.get_base_layer()(x)
        A, B = self.factors()
        dropout = self.lora_dropout[self.active_adapters[0]]
        if self.scales is not None:
            # as an argument each factor is the one of this pass, even if the rank is another when it is recomputed
            return self._recomputed(self._merged_product, x, A, B)
        if self.mask is not None:
            return self.get_base_layer()(x) + self._recomputed(self._masked_product, dropout(x), A, B)
        return self.get_base_layer()(x) + F.linear(F.linear(dropout(x), A), B) * self.scale

    def merged_weight(self) -> torch.Tensor:
        """W' of the active rank before it is rounded, [out, in]."""
        merged: torch.Tensor = self.get_base_layer().weight.detach() + self.delta()
        return merged

    def delta(self) -> torch.Tensor:
        """What the active rank adds to W, [out, in]."""
        A, B = self.factors()
        return self._delta(A.detach(), B.detach())

    def _delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        delta = (B @ A) * self.scale
        return delta if self.mask is None else delta * self.mask

    def _masked_product(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._delta(A, B))

    def _merged_product(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        return F.linear(x, rounded_through(base.weight + self._delta(A, B), self.scales, self.bits), base.bias)

    @staticmethod
    def _recomputed(product: Any, *factors: torch.Tensor) -> torch.Tensor:
        """Dense [out, in] matrices are made again for the backward pass: one at a time in memory, not one a layer."""
        return checkpoint(product, *factors, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class GridLinear(nn.Linear):
    """A linear map whose weight is rounded to fixed scales as it is used, and trained as if it were not."""

    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, grid: QuantizedWeight) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("scales", grid.scales, persistent=False)
        self.bits = grid.bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._product, x, self.weight, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, rounded_through(weight, self.scales, self.bits), self.bias)


def rounded_through(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` on the grid, with the gradient of `weight` (straight-through, Bengio et al., arXiv 1308.3432)."""
    return weight + (dequantize(quantize_to(weight.detach(), scales, bits)) - weight).detach()
