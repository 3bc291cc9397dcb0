"""Which graphs to time next: those that a fit on what was timed so far is least sure of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hw_profiles.shapes import ModelShape, Workload
from predictors.features import latency_features, select_columns
from predictors.latency import LatencyPredictor


def most_informative(
    predictor: LatencyPredictor,
    timed: Sequence[ModelShape],
    candidates: Sequence[ModelShape],
    workload: Workload,
    count: int,
) -> list[ModelShape]:
    """The `count` candidates to time next, in order: each the one whose prediction has the largest variance by then.

    For the linear model b, fitted for relative errors on rows r = x / latency, the relative variance of a prediction is
    proportional to r (R^T R)^-1 r^T; timing one adds its row to R. This is the greedy D-optimal design (Fedorov 1972).
    """
    rows, pool = (_rows(predictor, shapes, workload) for shapes in (timed, candidates))
    scale = np.sqrt((rows**2).mean(axis=0))
    scale[scale == 0] = 1.0
    rows, pool = rows / scale, pool / scale
    # the ridge stands for columns that nothing timed so far has moved, say a padding of widths
    covariance = np.linalg.inv(rows.T @ rows + 1e-3 * np.eye(rows.shape[1]))
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        variances = np.einsum("nf,fg,ng->n", pool, covariance, pool)
        variances[chosen] = -np.inf
        best = int(variances.argmax())
        chosen.append(best)
        step = covariance @ pool[best]
        covariance -= np.outer(step, step) / (1 + pool[best] @ step)
    return [candidates[index] for index in chosen]


def _rows(predictor: LatencyPredictor, shapes: Sequence[ModelShape], workload: Workload) -> np.ndarray:
    """[n, f]: the columns of one step, in parts of the latency expected of it."""
    names, X = latency_features(shapes, [workload] * len(shapes), predictor.provenance.precision)
    columns = select_columns(names, X, predictor.costs.step_columns)
    return columns / predictor.predict(shapes, workload).value_ms[:, None]
