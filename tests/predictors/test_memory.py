from __future__ import annotations

import numpy as np
import pytest

from hw_profiles.shapes import BlockShape, ModelShape, Workload
from predictors.memory import COLUMNS, MINIMUM_SAMPLES, MemoryPredictor, memory_features
from predictors.metrics import coverage, mape

WORKLOADS = [Workload("prefill", 16), Workload("prefill", 512), Workload("decode", 0), Workload("decode", 1024)]


def peaks(shapes: list[ModelShape], workloads: list[Workload], seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """A runtime of 90 MB that holds int8 blocks twice, in fp32 once more what is cached and fed."""
    exact = np.array(
        [
            90e6
            + 2 * shape.weight_bytes("int8")
            + shape.kv_cache_bytes(work.tokens)
            + (6000 * 4 * work.tokens if work.phase == "prefill" else 0)
            for shape, work in zip(shapes, workloads, strict=True)
        ]
    )
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(exact)))


def in_turn(count: int) -> list[Workload]:
    return [WORKLOADS[i % len(WORKLOADS)] for i in range(count)]


def test_columns_by_hand() -> None:
    """Two layers of 64 channels, heads of 16: attention 2 x 16 x (4 + 2) = 192 values a token, the MLP 3 x 96."""
    shape = ModelShape(64, 16, 1000, True, (BlockShape(4, 2, 32), BlockShape(2, 1, 96)))
    matrices = 2 * 64 * 16 * (6 + 3) + 3 * 64 * (32 + 96)
    blocks = matrices * 8.5 / 8 + 5 * 64 * 4
    found = memory_features([shape] * 2, [Workload("prefill", 20, 3), Workload("decode", 10)], "int8")
    named = [dict(zip(COLUMNS, row, strict=True)) for row in found]
    kv = 2 * 3 * 16 * 4  # bytes a position: keys and values of three heads
    assert named[0] == pytest.approx(
        {
            "constant": 1,
            "block_weight_bytes": blocks,
            "kv_cache_bytes": kv * 20 * 3,
            "activation_bytes": (2 * 64 + 3 * 96) * 4 * 20 * 3,
            "attention_bytes": 4 * 20 * 20 * 4 * 3,
            "logits_bytes": 1000 * 4 * 3,
        },
        rel=1e-4,
    )
    assert named[1] == pytest.approx(
        {
            "constant": 1,
            "block_weight_bytes": blocks,
            "kv_cache_bytes": kv * 11,
            "activation_bytes": (2 * 64 + 3 * 96) * 4 * 16,
            "attention_bytes": 4 * 16 * 11 * 4,
            "logits_bytes": 1000 * 4,
        },
        rel=1e-4,
    )
    assert memory_features([], [], "int8").shape == (0, len(COLUMNS))


@pytest.mark.parametrize("seed", range(3))
def test_a_dozen_processes_predict_any_model_and_workload_between(sample_shapes, seed: int) -> None:
    shapes = sample_shapes(12, seed)
    predictor = MemoryPredictor.fit(shapes, peaks(shapes, in_turn(12), seed, 0.005), in_turn(12), "int8")
    others = sample_shapes(50, seed=100 + seed)
    between = [Workload("prefill", 200), Workload("decode", 700)] * 25
    found = predictor.predict(others, between)
    assert mape(found.value_bytes, peaks(others, between)) < 0.02
    assert (found.low_bytes < found.value_bytes).all()
    assert (found.value_bytes < found.high_bytes).all()


def test_intervals_hold_what_they_promise(sample_shapes) -> None:
    """Over 40 fits of 16 samples, four graphs' worth of errors each seen by a fit without that graph."""
    held = []
    for seed in range(40):
        shapes = [shape for shape in sample_shapes(8, seed) for _ in range(2)]
        predictor = MemoryPredictor.fit(shapes, peaks(shapes, in_turn(16), seed, 0.02), in_turn(16), "int8")
        others = sample_shapes(40, seed=100 + seed)
        found = predictor.predict(others, in_turn(40))
        held.append(coverage(found.low_bytes, found.high_bytes, peaks(others, in_turn(40), 1000 + seed, 0.02)))
    assert 0.83 < np.mean(held) < 0.97


def test_held_out_errors_are_of_graphs_that_the_fit_had_not_seen(sample_shapes) -> None:
    """One graph's peaks are all half as large again: measured twice, it must not explain itself."""
    shapes = [shape for shape in sample_shapes(8, seed=1) for _ in range(2)]
    odd = peaks(shapes, in_turn(16))
    odd[:2] *= 1.5
    predictor = MemoryPredictor.fit(shapes, odd, in_turn(16), "int8")
    assert predictor.held_out_log_errors[:2] == pytest.approx([np.log(1.5)] * 2, rel=0.3)


def test_what_was_not_measured_is_refused(sample_shapes) -> None:
    shapes = sample_shapes(12, seed=0)
    predictor = MemoryPredictor.fit(shapes, peaks(shapes, in_turn(12)), in_turn(12), "int8")
    for workload in (Workload("prefill", 513), Workload("decode", 1025), Workload("decode", 16, 2)):
        assert not predictor.covers(workload)
        with pytest.raises(ValueError, match=rf"not measured for {workload.phase} at {workload.tokens} tokens"):
            predictor.predict(shapes[:1], [workload])
    assert predictor.covers(Workload("prefill", 1))


def test_bad_measurements_are_refused(sample_shapes) -> None:
    shapes = sample_shapes(12, seed=0)
    good = peaks(shapes, in_turn(12))
    with pytest.raises(ValueError, match="one peak and one workload a shape"):
        MemoryPredictor.fit(shapes, good[1:], in_turn(12), "int8")
    for failed in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="leave failed measurements out"):
            MemoryPredictor.fit(shapes, [*good[1:], failed], in_turn(12), "int8")
    few = MINIMUM_SAMPLES - 1
    with pytest.raises(ValueError, match="at least 9 measurements of several models, got 8 of 8"):
        MemoryPredictor.fit(shapes[:few], good[:few], in_turn(few), "int8")
    with pytest.raises(ValueError, match="got 12 of 1"):
        MemoryPredictor.fit(shapes[:1] * 12, good, in_turn(12), "int8")
