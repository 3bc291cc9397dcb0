from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from export import QuantizedWeight, dequantize, fake_quantize, quantize
from hw_profiles.shapes import Precision

BLOCK = 32
PRECISION_OF: dict[int, Precision] = {8: "int8", 4: "int4"}


def _weights(kind: str) -> torch.Tensor:
    """[48, 96], three blocks a row: bell-shaped, one-sided, with outliers, and small where fp16 scales get coarse."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(48, 96, generator=generator)
    return {
        "normal": normal,
        "one-sided": normal.abs(),
        "outliers": normal * (1 + 9 * (torch.rand(48, 96, generator=generator) > 0.97)),
        "small": normal * 1e-3,
    }[kind]


KINDS = ("normal", "one-sided", "outliers", "small")


def _block_errors(weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (weight - other).double().square().reshape(-1, BLOCK).sum(-1)


def _rounded_with(weight: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    scales = scales.half().float()
    blocks = weight.reshape(-1, BLOCK)
    return (torch.round(blocks / scales).clamp(low, high) * scales).reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_fill_their_range_and_no_more(kind: str, bits: int) -> None:
    packed = quantize(_weights(kind), bits)
    assert packed.integers.dtype == torch.int8
    assert packed.scales.dtype == torch.float16
    assert packed.scales.shape == (48, 3)
    integers = packed.integers.int().reshape(-1, BLOCK)
    limit = 2 ** (bits - 1)
    assert -limit <= int(integers.min())
    assert int(integers.max()) <= limit - 1
    # a block's extreme sits at the end of the range, or just short of it where the scale was rounded up
    assert int(integers.abs().amax(-1).min()) >= limit * 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_of_4_bits_is_worse_than_plain_rounding(kind: str) -> None:
    weight = _weights(kind)
    blocks = weight.reshape(-1, BLOCK)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    errors = _block_errors(weight, fake_quantize(weight, "int4"))
    plain = _block_errors(weight, _rounded_with(weight, extreme / -8, -8, 7))
    assert (errors <= plain * (1 + 1e-6)).all()
    symmetric = _block_errors(weight, _rounded_with(weight, extreme.abs() / 7, -7, 7))
    assert errors.sum() < 0.95 * symmetric.sum()
    assert errors.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "reference"), [(4, GGMLQuantizationType.Q4_0), (8, GGMLQuantizationType.Q8_0)], ids=["Q4_0", "Q8_0"]
)
def test_error_against_ggufs_own_quantiser(kind: str, bits: int, reference: GGMLQuantizationType) -> None:
    weight = _weights(kind)
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), reference), reference))
    ours = _block_errors(weight, fake_quantize(weight, PRECISION_OF[bits]))
    ratio = float(ours.sum() / _block_errors(weight, theirs).sum())
    assert (0.5 < ratio < 0.98) if bits == 4 else (0.95 < ratio < 1.05)


@pytest.mark.parametrize(("bits", "reference"), [(4, GGMLQuantizationType.Q4_0), (8, GGMLQuantizationType.Q8_0)])
def test_gguf_blocks_hold_the_same_numbers(bits: int, reference: GGMLQuantizationType) -> None:
    """Packed by hand into GGUF's blocks and read by GGUF's reader, the weights are bit for bit the same."""
    packed = quantize(_weights("normal"), bits)
    integers = packed.integers.numpy().reshape(-1, BLOCK)
    if bits == 4:
        nibbles = (integers + 8).astype(np.uint8)
        payload = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    else:
        payload = integers.view(np.uint8)
    scales = packed.scales.numpy().reshape(-1, 1).view(np.uint8)
    raw = np.concatenate([scales, payload], axis=1)
    assert raw.shape[1] == gguf.GGML_QUANT_SIZES[reference][1]
    np.testing.assert_array_equal(quants.dequantize(raw.reshape(48, -1), reference), dequantize(packed).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_miss_by_half_a_step_at_most(kind: str) -> None:
    weight = _weights(kind)
    packed = quantize(weight, 8)
    # 127 steps of a scale that fp16 rounds by up to 2^-11, or by a whole subnormal step
    step = packed.scales.float().abs().repeat_interleave(BLOCK, dim=1)
    allowed = step / 2 + 127 * torch.maximum(step * 2**-11, torch.tensor(2.0**-25))
    assert ((dequantize(packed) - weight).abs() <= allowed * 1.0001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_come_back_as_they_are(bits: int) -> None:
    once = fake_quantize(_weights("normal"), PRECISION_OF[bits])
    again = fake_quantize(once, PRECISION_OF[bits])
    # the extreme may have been shrunk off the grid's end, and then the block is not its own best grid at the start
    exact = (once == again).reshape(-1, BLOCK).all(-1)
    assert exact.all()


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_times_powers_of_two_are_exact(bits: int) -> None:
    """The extreme is -2^(bits-1) at 4 bits and 127 at 8, so the grid is known beforehand."""
    generator = torch.Generator().manual_seed(0)
    extreme = -8 if bits == 4 else 127
    integers = torch.randint(-7, 8, (5, 64), generator=generator).float()
    integers[:, ::BLOCK] = extreme
    scales = torch.tensor([0.5, -0.25, 2.0, 1.0, 2.0**-10]).unsqueeze(1)
    packed = quantize(integers * scales, bits)
    assert torch.equal(dequantize(packed), integers * scales)
    assert torch.equal(packed.scales, scales.half().expand(5, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks(bits: int) -> None:
    weight = _weights("normal")
    weight[3, 32:64] = 0
    weight[7] = 0
    rounded = fake_quantize(weight, PRECISION_OF[bits])
    assert torch.isfinite(rounded).all()
    assert not rounded[3, 32:64].any()
    assert not rounded[7].any()
    assert rounded[3, :32].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_too_small_for_an_fp16_scale_become_zero(bits: int) -> None:
    assert not fake_quantize(torch.full((2, 64), 1e-9), PRECISION_OF[bits]).any()


def test_half_precision_and_non_contiguous_weights() -> None:
    weight = _weights("normal").half()
    assert torch.equal(fake_quantize(weight, "int4"), fake_quantize(weight.float(), "int4"))
    transposed = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(fake_quantize(transposed, "int8"), fake_quantize(transposed.contiguous(), "int8"))


def test_halves_are_the_nearest_numbers_and_fp32_leaves_weights_alone() -> None:
    weight = _weights("normal")
    kept = (weight.view(torch.int32) & -(2**16)).view(torch.float32)  # the upper half: rounded towards 0
    away = ((weight.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    nearest = torch.where((weight - kept).abs() < (away - weight).abs(), kept, away)
    assert torch.equal(fake_quantize(weight, "bf16"), nearest)
    assert not torch.equal(nearest, weight)
    steps = 2.0 ** (weight.abs().log2().floor().clamp(min=-14) - 10)  # between fp16's numbers, the least being 2^-24
    assert torch.equal(fake_quantize(weight, "fp16"), (weight / steps).round() * steps)
    assert torch.equal(fake_quantize(weight, "fp32"), weight)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    weight = _weights("normal")
    weight[2, 3] = 1e5
    with pytest.raises(ValueError, match="wanted weights up to 65504 for fp16, got 100000; take bf16 or fp32"):
        fake_quantize(weight, "fp16")
    assert fake_quantize(weight, "bf16")[2, 3] == pytest.approx(1e5, rel=2**-8)


@pytest.mark.parametrize("columns", [1, 31, 48])
def test_inputs_that_are_no_whole_blocks_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32, got {columns}"):
        quantize(torch.ones(4, columns), 8)


@pytest.mark.parametrize("bits", [-4, 0, 2, 3, 5, 7])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"4 or 8 bits, got {bits}"):
        quantize(torch.ones(4, 32), bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_what_no_fp16_scale_can_hold_is_refused(bits: int, value: float) -> None:
    weight = _weights("normal")
    weight[2, 40] = value
    with pytest.raises(ValueError, match="finite"):
        quantize(weight, bits)


def test_shape_of_a_quantised_weight() -> None:
    packed = QuantizedWeight(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 2, dtype=torch.float16), 8)
    assert packed.shape == (3, 64)
    assert dequantize(packed).shape == (3, 64)
