"""Timed models as what a fit needs: checked, and turned into physics columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hw_profiles.shapes import ModelShape, Precision, Workload
from predictors.features import MIXED_COLUMNS, STEP_COLUMNS, latency_features, mixed_columns, select_columns
from predictors.metrics import FloatArray


@dataclass(frozen=True, eq=False)
class LatencySamples:
    """Models [n] timed each on its workload, checked: `X` [n, f], `y` in ms [n], `weights` of mean 1 [n]."""

    names: tuple[str, ...]
    X: FloatArray
    y: FloatArray
    weights: FloatArray
    workloads: list[Workload]
    precision: Precision
    dimensions: tuple[int, int, int, bool]

    @property
    def of_shapes(self) -> FloatArray:
        """[n, 10]: equal rows are timings of one model."""
        return select_columns(self.names, self.X, (*STEP_COLUMNS, *MIXED_COLUMNS))

    @property
    def mixed_columns(self) -> tuple[str, ...]:
        return mixed_columns(self.names, self.X)

    @property
    def distinct(self) -> int:
        return len(np.unique(self.of_shapes, axis=0))


def latency_samples(
    shapes: Sequence[ModelShape],
    latency_ms: npt.ArrayLike,
    workloads: Workload | Sequence[Workload],
    precision: Precision,
    weights: npt.ArrayLike | None,
) -> LatencySamples:
    works = [workloads] * len(shapes) if isinstance(workloads, Workload) else list(workloads)
    y = np.asarray(latency_ms, dtype=np.float64)
    w = np.ones(len(shapes)) if weights is None else np.asarray(weights, dtype=np.float64)
    if y.shape != (len(shapes),) or w.shape != y.shape or len(works) != len(shapes):
        raise ValueError(
            f"wanted one latency, one weight and one workload a shape, got {len(shapes)} shapes, {y.shape}, "
            f"{w.shape} and {len(works)}"
        )
    if not works:
        raise ValueError("wanted models to fit on, got none: measure some")
    if len({work.phase for work in works}) > 1:
        raise ValueError("prefill and decode have predictors of their own, got both in one fit")
    if not (np.isfinite(y).all() and np.isfinite(w).all() and (y > 0).all() and (w > 0).all()):
        raise ValueError("latencies and weights must be finite and above 0: leave failed measurements out")
    names, X = latency_features(shapes, works, precision)
    return LatencySamples(names, X, y, w / w.mean(), works, precision, only_dimensions(shapes))


def only_dimensions(shapes: Sequence[ModelShape]) -> tuple[int, int, int, bool]:
    """hidden_size, head_dim, vocab_size and tie_word_embeddings that they share; ValueError where they differ."""
    found = {(s.hidden_size, s.head_dim, s.vocab_size, s.tie_word_embeddings) for s in shapes}
    if len(found) > 1:
        raise ValueError(
            f"models must differ only in their blocks, got {len(found)} sets of dimensions {sorted(found)}"
        )
    return found.pop()
