from dataclasses import replace

import numpy as np
import pytest

from hw_profiles.shapes import Workload
from predictors.features import STEP_COLUMNS, latency_features
from predictors.step_costs import StepCosts, find_knots

KNOTS = (16, 128, 512)


@pytest.mark.parametrize(
    ("tokens", "knots"),
    [
        ([1], (1,)),
        ([16, 16, 512, 128], (16, 128, 512)),
        ([128, 160], (128, 160)),
        ([16, 32, 64, 128, 256, 512, 1024, 2048], (16, 64, 256, 2048)),
    ],
)
def test_knots_span_what_was_measured_and_lie_apart(tokens: list[int], knots: tuple[int, ...]) -> None:
    assert find_knots(np.array(tokens, dtype=np.float64)) == knots


def features(shapes, works) -> tuple[tuple[str, ...], np.ndarray]:
    pairs = [(shape, work) for shape in shapes for work in works]
    return latency_features([shape for shape, _ in pairs], [work for _, work in pairs], "int8")


@pytest.fixture
def device(sample_shapes):
    """Attention's efficiency rises with the tokens, the MLPs' falls: no curve common to both can tell."""
    works = [Workload("prefill", knot) for knot in KNOTS]
    names, X = features(sample_shapes(24, seed=0), works)
    costs = StepCosts.between(names, X)
    per_unit = dict.fromkeys(costs.columns, 0.0)
    for knot, of_group, of_channel in zip(KNOTS, (0.02, 0.1, 0.2), (2e-4, 1e-3, 9e-3), strict=True):
        per_unit |= {f"constant at {knot}": 2.0, f"kv_groups at {knot}": of_group}
        per_unit[f"intermediate_size at {knot}"] = of_channel
    return StepCosts(costs.knots, (), True, (), np.array(list(per_unit.values()))), names, X


def test_costs_that_bend_are_learned(device, sample_shapes) -> None:
    true, names, X = device
    y = np.exp(true.log_ms(names, X))
    fitted = StepCosts.between(names, X).fitted(names, X, y, np.ones(len(y)))
    _, new = features(sample_shapes(40, seed=1), [Workload("prefill", tokens) for tokens in (16, 60, 128, 300, 512)])
    assert np.abs(fitted.log_ms(names, new) - true.log_ms(names, new)).max() < 0.04


def test_other_samples_bend_them_or_scale_them(device) -> None:
    true, names, X = device
    y = 1.5 * np.exp(true.log_ms(names, X[:3]))
    for ridge in (1e-2, 1e3):
        scaled = true.refitted(names, X[:3], y, np.ones(3), ridge)
        np.testing.assert_allclose(scaled.log_ms(names, X), true.log_ms(names, X) + np.log(1.5), atol=1e-3)


def test_one_workload_has_the_costs_of_a_step_alone(sample_shapes) -> None:
    names, X = features(sample_shapes(9, seed=0), [Workload("prefill", 128)])
    assert StepCosts.between(names, X).columns == STEP_COLUMNS


def test_no_decoder_is_read_twice_as_fast_as_the_fastest_sample(sample_shapes) -> None:
    """What has no layers costs its head, though a latency that grows with their square leaves nothing for it."""
    names, X = features(sample_shapes(24, seed=0), [Workload("decode", 128)])
    of_bytes = names.index("read_weight_bytes")
    y = (X[:, of_bytes] * 1e-7) ** 2
    fitted = StepCosts.between(names, X).fitted(names, X, y, np.ones(len(y)))
    empty = np.zeros((1, len(names)))
    empty[0, of_bytes] = head_bytes = X[:, of_bytes].min() / 2
    assert np.exp(fitted.log_ms(names, empty)) == pytest.approx(head_bytes * (y / X[:, of_bytes]).min() / 2)


def test_a_small_decoder_in_the_cache_is_faster_than_its_share(sample_shapes) -> None:
    """A cache of 60 % of the largest model: weights in it come four times as fast as those beyond."""
    names, X = features(sample_shapes(24, seed=0), [Workload("decode", 128)])
    _, new = features(sample_shapes(40, seed=1), [Workload("decode", 128)])
    of_bytes = names.index("read_weight_bytes")
    cache_bytes = 0.6 * X[:, of_bytes].max()

    def latency_ms(rows: np.ndarray) -> np.ndarray:
        return (rows[:, of_bytes] + 3 * np.maximum(rows[:, of_bytes] - cache_bytes, 0)) * 1e-6

    def error(unfitted: StepCosts) -> float:
        fitted = unfitted.fitted(names, X, latency_ms(X), np.ones(len(X)))
        return float(np.abs(fitted.log_ms(names, new) - np.log(latency_ms(new))).mean())

    costs = StepCosts.between(names, X)
    assert error(costs) < 0.03
    assert error(replace(costs, thresholds_bytes=())) > 0.08
