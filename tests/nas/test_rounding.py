"""Rounding with error feedback against plain rounding and against brute force."""

import itertools

import pytest
import torch

from export.quantize import dequantize, quantize
from nas.rounding import output_error, round_together, round_with_feedback


@pytest.fixture
def correlated():
    """Inputs [tokens, in] that share a few directions, as activations do, and a map of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.3 * torch.randn(2048, 96, generator=generator)
    return x, torch.randn(40, 96, generator=generator)


def test_output_error_is_that_of_the_outputs(correlated):
    x, W = correlated
    rounded = quantize(W, 4)
    wanted = (x @ (W - dequantize(rounded)).T).square().sum()
    assert output_error(W, rounded, x.T @ x) == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_feedback_beats_plain_rounding_on_correlated_inputs(correlated, bits):
    x, W = correlated
    H = x.T @ x
    rounded = round_with_feedback(W, H, bits)
    limit = 2 ** (bits - 1)
    assert -limit <= int(rounded.integers.min()) < int(rounded.integers.max()) < limit
    assert output_error(W, rounded, H) < {4: 0.6, 8: 0.9}[bits] * output_error(W, quantize(W, bits), H)


def test_first_column_errors_go_where_brute_force_puts_them(correlated):
    """With the scales given, no other choice of the last two columns' integers does better by much."""
    x, W = correlated
    x, W = x[:, :32], W[:3, :32]
    H = x.T @ x
    rounded = round_with_feedback(W, H, 4)
    got = output_error(W, rounded, H)
    best = got
    for row, (first, second) in itertools.product(range(3), itertools.product(range(-8, 8), repeat=2)):
        integers = rounded.integers.clone()
        integers[row, -2:] = torch.tensor([first, second], dtype=torch.int8)
        best = min(best, output_error(W, type(rounded)(integers, rounded.scales, 4), H))
    assert got <= 1.05 * best


def test_uncorrelated_inputs_leave_plain_rounding(correlated):
    _, W = correlated
    rounded, nearest = round_with_feedback(W, torch.eye(96), 4), quantize(W, 4)
    assert torch.equal(rounded.integers, nearest.integers)
    assert torch.equal(rounded.scales, nearest.scales)


def test_maps_rounded_together_are_those_rounded_alone(correlated):
    x, W = correlated
    H = x.T @ x
    together = round_together({"a": W[:16], "b": W[16:]}, H, 4)
    alone = round_with_feedback(W[16:], H, 4)
    assert torch.equal(together["b"].integers, alone.integers)
