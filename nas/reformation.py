"""Least-squares weights for every width at once.

Shapes: W [out, in] the map, H [in, in] the sum of x x^T of its inputs, damped as in importance.normalise, `order` [in]
the inputs, most important first; W_k [out, k] reads the first k of them.

W_k minimises |W x - W_k x_:k|^2, so W_k^T = (H_:k,:k)^-1 (H W^T)_:k. With H = L L^T in keep-order the prefix L_k of L
factors the prefix of H, and (H W^T)_:k = L_k (L^T W^T)_:k: one factorisation and Y = L^T W^T serve all widths,
W_k^T = L_k^-T Y_:k, and what is lost is the tail of Y, |Y_k:|^2, which can only fall as k grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nas.importance import DAMPING, normalise


@dataclass(frozen=True)
class Reformed:
    """`weight` fp32 [out, k] over the first k inputs of the keep-order; `error` the share of tr(W H W^T) lost."""

    weight: torch.Tensor
    error: float


def reform(
    W: torch.Tensor, H: torch.Tensor, order: torch.Tensor, widths: Sequence[int], *, damping: float = DAMPING
) -> dict[int, Reformed]:
    """The best weights for each of `widths` inputs kept; all of them gives W's own numbers back, in keep-order."""
    C, scale = normalise(H[order][:, order], damping)
    L = torch.linalg.cholesky(C)
    del C
    Y = L.T @ (W[:, order].double() * scale).T  # [in, out]
    energy = Y.square().sum(1)
    reformed = {}
    for k in widths:
        if k == len(order):
            reformed[k] = Reformed(W[:, order].float(), 0.0)
            continue
        W_k = torch.linalg.solve_triangular(L[:k, :k].T, Y[:k], upper=True).T / scale[:k]
        reformed[k] = Reformed(W_k.float().contiguous(), float(energy[k:].sum() / energy.sum()))
    return reformed
