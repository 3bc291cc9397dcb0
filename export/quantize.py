"""Weights as integers and scales, made once: the supernet evaluates and every writer packs these same numbers.

Symmetric, blocks of 32 along the input, fp16 scales: what ONNX Runtime's MatMulNBits, OpenVINO's compressed constants
and GGUF's Q4_0 and Q8_0 blocks can all hold exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hw_profiles.shapes import BLOCK_BITS, QUANTIZATION_BLOCK_SIZE, Precision

#: What matrices of two bytes a weight are.
HALF_TYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Shrunken scales tried for each 4-bit block; the one with the least squared error is kept.
_SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82)
#: Weights whose scales are found together: with all shrinks they stay in the processor's cache.
_WEIGHTS_AT_ONCE = 2**16


@dataclass(frozen=True)
class QuantizedWeight:
    """`weight` = `integers` x `scales`: int8 [out, in] within -2^(bits-1)..2^(bits-1)-1 and fp16 [out, in / 32]."""

    integers: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape


def quantize(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    """Round a matrix [out, in] to 4 or 8 bits, nearest first.

    Raises ValueError where `in` is no multiple of 32, bits are neither 4 nor 8, or no fp16 scale can hold a weight.
    """
    columns = weight.shape[1]
    if columns % QUANTIZATION_BLOCK_SIZE:
        raise ValueError(f"a quantised matrix needs inputs in multiples of {QUANTIZATION_BLOCK_SIZE}, got {columns}")
    if bits not in (4, 8):
        raise ValueError(f"weights quantise to 4 or 8 bits, got {bits}")
    return quantize_to(weight, find_scales(weight, bits), bits)


def find_scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The scales that `quantize` takes, fp16 [out, in / 32]; ValueError where no fp16 scale can hold a weight."""
    blocks = weight.detach().float().reshape(len(weight), -1, QUANTIZATION_BLOCK_SIZE)
    rows_at_once = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    scales = torch.cat([_scales(rows, bits) for rows in torch.split(blocks, rows_at_once)])
    if not scales.isfinite().all():
        worst = weight.abs().max().item()
        raise ValueError(f"weights to quantise must be finite, and small enough for fp16 scales, got {worst}")
    return scales


def _scales(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 [rows, n] for [rows, n, 32]."""
    most, least = blocks.amax(-1), blocks.amin(-1)
    largest = torch.where(most > -least, most, least)
    if bits == 8:
        return (largest / 127).half()
    # the block's extreme value lands on -8, so that all sixteen levels are in use (GGUF's Q4_0 does the same)
    tried = (largest / -8 * torch.tensor(_SHRINKS).reshape(-1, 1, 1)).half()  # [shrinks, rows, n]
    steps = tried.float().unsqueeze(-1)
    errors = _round(blocks, steps, bits).mul_(steps).sub_(blocks).square_().sum(-1)
    return tried.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def quantize_to(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest integers of given fp16 scales [out, in / 32]; where they are 0, to 0."""
    rows, columns = weight.shape
    blocks = weight.detach().float().reshape(rows, -1, QUANTIZATION_BLOCK_SIZE)
    integers = _round(blocks, scales.float().unsqueeze(-1), bits)
    return QuantizedWeight(integers.reshape(rows, columns).to(torch.int8), scales, bits)


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """The fp32 matrix [out, in] that the runtimes compute with."""
    rows, columns = quantized.shape
    blocks = quantized.integers.reshape(rows, -1, QUANTIZATION_BLOCK_SIZE).float()
    return (blocks * quantized.scales.float().unsqueeze(-1)).reshape(rows, columns)


def is_rounded(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of this name in a state dict is rounded at all: matrices, but not an embedding of positions."""
    return tensor.dim() == 2 and "embed_positions" not in name


def fake_quantize(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """A block's matrix in its own type as it will be after rounding to `precision`; at fp32 as it is.

    Raises ValueError at fp16 for what that cannot hold.
    """
    if precision in HALF_TYPES:
        return as_half(weight, precision).to(weight.dtype)
    return weight if precision == "fp32" else dequantize(quantize(weight, BLOCK_BITS[precision]))


def as_half(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """`weight` as bf16 or fp16; ValueError where a finite number is too large for fp16."""
    half = weight.to(HALF_TYPES[precision])
    if not half.isfinite().all() and weight.isfinite().all():
        raise ValueError(
            f"wanted weights up to {torch.finfo(half.dtype).max:.0f} for {precision}, got "
            f"{weight.abs().max().item():.0f}; take bf16 or fp32"
        )
    return half


def _round(blocks: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    limit = 2 ** (bits - 1)
    return (blocks / torch.where(scales == 0, torch.ones_like(scales), scales)).round_().clamp_(-limit, limit - 1)
