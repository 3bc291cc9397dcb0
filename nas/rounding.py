"""Rounding with error feedback (GPTQ, Frantar et al., arXiv 2210.17323), on the grid of `export.quantize`.

Shapes: W [out, in] the map, H [in, in] the sum of x x^T over calibration tokens. Columns are rounded one after the
other, and those after it make up for what column j loses. With H = R R^T, R upper triangular, a rounding that is off by
D loses |D R|^2. Of its column j, sum over i <= j of D_i R_ij, the columns before j have decided all but D_j, so
W_j + (sum over i < j of D_i R_ij) / R_jj is what is rounded. That is GPTQ's step, w_k -= e_j U_jk / U_jj with
H^-1 = U^T U, for U = R^-1, in half of the time: H is factored once and never inverted (the view of GPTQ as Babai's
nearest plane algorithm, Chen et al., arXiv 2507.18553).
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from export.quantize import QuantizedWeight, dequantize, find_scales, quantize
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE

#: Ridge relative to the mean energy of the inputs. Relative to each input's own it would let faint inputs make up for
#: loud ones with huge weights, which spoil the scale of their whole block.
DAMPING = 0.01


def round_with_feedback(W: torch.Tensor, H: torch.Tensor, bits: int) -> QuantizedWeight:
    """Quantise W so that W x, not W, changes little. Scales are chosen block by block, on the weights as updated."""
    W, H = W.float(), H.float()
    damped = H.flip(0, 1).double()
    damped.diagonal().add_(DAMPING * H.diagonal().mean())
    R = torch.linalg.cholesky(damped).float().flip(0, 1)
    del damped
    D = torch.empty_like(W)
    blocks: list[QuantizedWeight] = []
    for start in range(0, W.shape[1], QUANTIZATION_BLOCK_SIZE):
        block = slice(start, start + QUANTIZATION_BLOCK_SIZE)
        U = torch.linalg.solve_triangular(R[block, block], torch.eye(QUANTIZATION_BLOCK_SIZE), upper=True)
        aim = W[:, block] + D[:, :start] @ R[:start, block] @ U
        # scales for the block as it stands; its integers are then made one column at a time
        scales = find_scales(aim, bits)
        blocks.append(QuantizedWeight(_round_block(aim, U, scales.float(), bits), scales, bits))
        D[:, block] = W[:, block] - dequantize(blocks[-1])
    joined = QuantizedWeight(torch.cat([b.integers for b in blocks], 1), torch.cat([b.scales for b in blocks], 1), bits)
    nearest = quantize(W, bits)
    # feedback is greedy, so on an odd matrix it may lose to plain rounding
    return joined if output_error(W, joined, H) <= output_error(W, nearest, H) else nearest


def output_error(W: torch.Tensor, rounded: QuantizedWeight, H: torch.Tensor) -> float:
    """|(W - rounded) x|^2 summed over the calibration tokens: tr(D H D^T) with D the difference."""
    difference = (W - dequantize(rounded)).float()
    return float(((difference @ H.float()) * difference).sum())


def _round_block(W: torch.Tensor, U: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers int8 [out, 32] of one block."""
    limit = 2 ** (bits - 1)
    columns = W.T.contiguous()  # [32, out]: a column of W becomes one run of memory, which halves the time
    scale = scales.squeeze(1)
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    integers = torch.empty_like(columns)
    ratios = U / U.diagonal().unsqueeze(1)
    for j in range(len(columns)):
        torch.div(columns[j], step, out=integers[j]).round_().clamp_(-limit, limit - 1)
        lost = torch.addcmul(columns[j], integers[j], scale, value=-1)
        columns[j + 1 :].addr_(ratios[j, j + 1 :], lost, alpha=-1)
    return integers.to(torch.int8).T


def round_together(weights: dict[str, torch.Tensor], H: torch.Tensor, bits: int) -> dict[str, QuantizedWeight]:
    """`round_with_feedback` of several maps of one input: rows do not meet, so one pass does for all."""
    rounded = round_with_feedback(torch.cat(list(weights.values())), H, bits)
    sizes = [len(weight) for weight in weights.values()]
    parts = zip(weights, torch.split(rounded.integers, sizes), torch.split(rounded.scales, sizes), strict=True)
    return {name: QuantizedWeight(integers, scales, bits) for name, integers, scales in parts}


def round_inputs(
    weights: dict[str, torch.Tensor], H: torch.Tensor, bits: int, nearest: Collection[str]
) -> dict[str, QuantizedWeight]:
    """The maps of one part that read the residual stream: with feedback, but those in `nearest` to the nearest.

    Those are keys and values: feedback moves a value's error to rare inputs, and the rarest is the first token, which
    most heads attend to. On SmolLM2 it took the KL of rounding all attention from 0.13 to 0.20 nats, and gains 0.001 on
    keys.
    """
    fed_back = {name: weight for name, weight in weights.items() if name not in nearest}
    plain = {name: quantize(weight, bits) for name, weight in weights.items() if name in nearest}
    return {**round_together(fed_back, H, bits), **plain}
