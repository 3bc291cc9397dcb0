from __future__ import annotations

import numpy as np

from hw_profiles.shapes import ModelShape, Workload
from predictors import LatencyPredictor, latency_features, most_informative
from predictors.features import STEP_COLUMNS

DECODE = Workload("decode", 128)


def information(shapes: list[ModelShape], latency_ms: np.ndarray) -> float:
    """log det of R^T R, R the columns of one step in parts of the latency: how well all coefficients are known."""
    names, X = latency_features(shapes, [DECODE] * len(shapes), "int8")
    rows = X[:, [names.index(name) for name in STEP_COLUMNS]] / latency_ms[:, None]
    rows = rows[:, np.ptp(X[:, [names.index(name) for name in STEP_COLUMNS]], axis=0) > 0]
    return float(np.linalg.slogdet(rows.T @ rows)[1])


def test_what_is_chosen_tells_more_than_random_graphs(sample_shapes, device) -> None:
    timed, candidates = sample_shapes(12, seed=0), sample_shapes(100, seed=1)
    predictor = LatencyPredictor.fit(timed, device(timed, noise=0.0), DECODE, "int8", seed=0)
    chosen = most_informative(predictor, timed, candidates, DECODE, 6)
    assert len(set(chosen)) == 6
    assert set(chosen) <= set(candidates)

    def of(more: list[ModelShape]) -> float:
        return information(timed + more, device(timed + more, noise=0.0))

    rng = np.random.default_rng(2)
    at_random = [of([candidates[i] for i in rng.choice(100, 6, replace=False)]) for _ in range(200)]
    assert of(chosen) > np.max(at_random)


def test_the_first_is_where_the_prediction_is_least_certain(sample_shapes, device) -> None:
    """The spread of predictions over fits to many noisy timings of the same graphs is largest there."""
    timed, candidates = sample_shapes(14, seed=3), sample_shapes(40, seed=4)
    predictor = LatencyPredictor.fit(timed, device(timed, noise=0.0), DECODE, "int8", seed=0)
    first = most_informative(predictor, timed, candidates, DECODE, 1)[0]
    predictions = [
        LatencyPredictor.fit(timed, device(timed, seed=seed, noise=0.02), DECODE, "int8", seed=0)
        .predict(candidates, DECODE)
        .value_ms
        for seed in range(40)
    ]
    spread = np.log(predictions).std(axis=0)
    assert spread[candidates.index(first)] > np.quantile(spread, 0.9)


def test_no_more_than_there_are(sample_shapes, device) -> None:
    timed, candidates = sample_shapes(12, seed=0), sample_shapes(3, seed=1)
    predictor = LatencyPredictor.fit(timed, device(timed), DECODE, "int8", seed=0)
    assert sorted(s.id for s in most_informative(predictor, timed, candidates, DECODE, 9)) == sorted(
        s.id for s in candidates
    )
