"""What a latency predictor has to beat: a line in FLOPs, a linear model of what a search changes, and XGBoost alone.

Each is fitted on graphs of one precision with their milliseconds and says those of other graphs, [n].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xgboost
from numpy.typing import NDArray

from hw_profiles import Workload
from hw_profiles.shapes import ModelShape, Precision
from predictors import latency_features

Floats = NDArray[np.float64]
Graphs = Sequence[tuple[ModelShape, Workload]]


def flops_line(fitted_on: Graphs, latency_ms: Floats, asked: Graphs, precision: Precision) -> Floats:
    """a + b FLOPs, for relative errors."""

    def columns(graphs: Graphs) -> Floats:
        return np.array([[1.0, shape.flops(work)] for shape, work in graphs])

    return _relative_least_squares(columns(fitted_on), latency_ms, columns(asked))


def raw_linear(fitted_on: Graphs, latency_ms: Floats, asked: Graphs, precision: Precision) -> Floats:
    """Linear in every layer's KV groups and width and in the workload, as a search sees them; ridge."""
    return _relative_least_squares(_knobs(fitted_on), latency_ms, _knobs(asked))


def plain_xgboost(fitted_on: Graphs, latency_ms: Floats, asked: Graphs, precision: Precision) -> Floats:
    """XGBoost with its own defaults on the log latency of the physics columns, without the linear model beneath."""

    def columns(graphs: Graphs) -> Floats:
        return latency_features([shape for shape, _ in graphs], [work for _, work in graphs], precision)[1]

    trees = xgboost.XGBRegressor(n_estimators=200, nthread=1).fit(columns(fitted_on), np.log(latency_ms))
    return np.exp(np.asarray(trees.predict(columns(asked)), dtype=np.float64))


def _knobs(graphs: Graphs) -> Floats:
    rows = []
    for shape, work in graphs:
        sizes = [size for block in shape.blocks for size in (block.num_key_value_heads, block.intermediate_size)]
        rows.append([1.0, work.tokens, *sizes, *(work.tokens * size for size in sizes)])
    return np.array(rows, dtype=np.float64)


def _relative_least_squares(columns: Floats, latency_ms: Floats, asked: Floats, ridge: float = 1e-3) -> Floats:
    scale = np.sqrt((columns**2).mean(axis=0))
    scale[scale == 0] = 1.0
    rows = columns / scale / latency_ms[:, None]
    penalty = ridge * np.trace(rows.T @ rows) / rows.shape[1] * np.eye(rows.shape[1])
    solution = np.linalg.solve(rows.T @ rows + penalty, rows.T @ np.ones(len(rows)))
    return np.asarray(asked / scale @ solution)
