"""References: what they are, and what they say of a machine that is not as fast as it was."""

from __future__ import annotations

import math
from statistics import geometric_mean

import numpy as np
import pytest

from hw_profiles.references import UNEVEN_NOISE, at_profile_speed, reference_shapes
from hw_profiles.shapes import BlockShape, ModelShape

BLOCK = BlockShape(4, 2, 64)
PROFILE_MS = {"full": 16.0, "half": 8.0, "quarter": 4.0}


def full(layers: int) -> ModelShape:
    return ModelShape(16, 4, 32, True, (BLOCK,) * layers)


@pytest.mark.parametrize(
    ("layers", "kept"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (4, [4, 2, 1]), (30, [30, 15, 8]), (32, [32, 16, 8])]
)
def test_references_keep_layers_evenly_spread(layers: int, kept: list[int]) -> None:
    shapes = reference_shapes(full(layers))
    assert shapes[0] == full(layers)
    assert [sum(block == BLOCK for block in shape.blocks) for shape in shapes] == kept
    for shape, count in zip(shapes, kept, strict=True):
        assert len(shape.blocks) == layers
        assert shape.attention_blocks == (BLOCK,) * count
        gaps = np.diff([i for i, block in enumerate(shape.blocks) if block == BLOCK])
        assert all(abs(gap - layers / count) < 1 for gap in gaps)


def test_a_reference_without_attention_is_left_out() -> None:
    mixed = ModelShape(16, 4, 32, True, (BLOCK, *[BlockShape(0, 0, 64)] * 7))
    assert [len(shape.attention_blocks) for shape in reference_shapes(mixed)] == [1]


def test_a_machine_as_fast_as_then() -> None:
    assert at_profile_speed(0.5, PROFILE_MS, PROFILE_MS) == pytest.approx(4.0)
    assert at_profile_speed(0.5, {"full": 16.0}, {"full": 16.0}) == pytest.approx(8.0)


def test_one_reference_scales_all() -> None:
    assert at_profile_speed(0.5, {"full": 24.0}, {"full": 16.0}) == pytest.approx(8.0)


@pytest.mark.parametrize("own_ms", [2.0, 4.0, 7.0, 16.0, 30.0])
def test_a_change_of_clock_scales_all(own_ms: float) -> None:
    slower_ms = {name: 1.5 * value_ms for name, value_ms in PROFILE_MS.items()}
    ratio = 1.5 * own_ms / geometric_mean(slower_ms.values())
    assert at_profile_speed(ratio, slower_ms, PROFILE_MS) == pytest.approx(own_ms)


def test_a_lost_cache_is_told_by_size() -> None:
    """The middle one takes a third longer than it did, the others as long; UNEVEN_NOISE of that counts as noise."""
    now_ms = {"full": 16.0, "half": 8.0 * 4 / 3, "quarter": 4.0}
    mean_ms = geometric_mean(now_ms.values())
    mean, low, high = -math.log(4 / 3) / 3, 0.0, -math.log(4 / 3)
    at_ends, at_middle = (math.exp(mean + (change - mean) / (1 + UNEVEN_NOISE)) for change in (low, high))
    between = math.sqrt(at_ends * at_middle)
    middle_of_both_ms = math.sqrt(4.0 * 8.0 * 4 / 3)
    cases = ((4.0, at_ends), (1.0, at_ends), (8.0 * 4 / 3, at_middle), (middle_of_both_ms, between), (99.0, at_ends))
    for own_ms, factor in cases:
        told_ms = at_profile_speed(own_ms / mean_ms, now_ms, PROFILE_MS)
        assert told_ms == pytest.approx(own_ms * factor)
    assert at_ends == pytest.approx(1.0, abs=0.03)
    assert 0.75 < at_middle < 0.81


def test_only_what_both_know_counts() -> None:
    now_ms = {"full": 20.0, "half": 8.0, "other": 3.0}
    ratio = 10.0 / geometric_mean(now_ms.values())
    assert at_profile_speed(ratio, now_ms, {"full": 16.0, "quarter": 4.0}) == pytest.approx(8.0)
    assert at_profile_speed(ratio, now_ms, {"quarter": 4.0}) == pytest.approx(10.0)
