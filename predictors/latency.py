"""Latency of a decoder on one target at one workload, learned from a few tens of whole-model measurements.

    log latency  =  log(x . b)  +  shrinkage * trees(x)

b >= 0 minimises sum(((x . b - y) / y)^2) over `LINEAR_COLUMNS`: relative errors, since a budget is missed in per cent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xgboost
from scipy.optimize import nnls

from hw_profiles.shapes import ModelShape, Precision, Workload
from predictors.boosting import ResidualBoost, fit_residual_boost
from predictors.features import LINEAR_COLUMNS, latency_features
from predictors.intervals import log_interval
from predictors.metrics import FloatArray

#: One sample a coefficient and two to judge them by; also the fewest for which a 90 % interval is finite.
MINIMUM_SAMPLES = len(LINEAR_COLUMNS) + 2

_FORMAT = 1
#: Penalty on coefficients of columns scaled to unit mean square: it only splits what the samples cannot tell apart.
_RIDGE = 1e-6


@dataclass(frozen=True)
class LatencyPrediction:
    """One entry a model: the expected latency and its interval."""

    value_ms: FloatArray
    low_ms: FloatArray
    high_ms: FloatArray


@dataclass(frozen=True)
class Provenance:
    """What a fit holds for. `target` is the key of a device, runtime, precision and thread count."""

    target: str
    runtime_version: str
    workload: Workload
    precision: Precision
    samples: int
    #: Mean |log error| of samples held out in turn, which for small errors is the mean relative error.
    held_out_error: float
    #: The same for the linear model alone.
    linear_held_out_error: float


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """Made by `fit` or `load`; holds for models that differ only in their blocks."""

    provenance: Provenance
    #: hidden_size, head_dim, vocab_size, tie_word_embeddings of the models fitted on.
    dimensions: tuple[int, int, int, bool]
    feature_names: tuple[str, ...]
    #: One a column of `LINEAR_COLUMNS`, in ms per unit.
    coefficients: FloatArray
    boost: ResidualBoost

    @classmethod
    def fit(
        cls,
        shapes: Sequence[ModelShape],
        latency_ms: npt.ArrayLike,
        workload: Workload,
        precision: Precision,
        seed: int,
        weights: npt.ArrayLike | None = None,
        *,
        target: str = "",
        runtime_version: str = "",
    ) -> LatencyPredictor:
        """Fit on whole models; `weights` (say 1 / spread^2) are relative, repeats of a shape stay in one fold."""
        y = np.asarray(latency_ms, dtype=np.float64)
        w = np.ones(len(shapes)) if weights is None else np.asarray(weights, dtype=np.float64)
        if y.shape != (len(shapes),) or w.shape != y.shape:
            raise ValueError(
                f"wanted one latency and one weight a shape, got {len(shapes)} shapes, {y.shape} and {w.shape}"
            )
        if not (np.isfinite(y).all() and np.isfinite(w).all() and (y > 0).all() and (w > 0).all()):
            raise ValueError("latencies and weights must be finite and above 0: leave failed measurements out")
        names, X = latency_features(shapes, workload, precision)
        distinct = len(np.unique(X, axis=0))
        if distinct < MINIMUM_SAMPLES:
            raise ValueError(
                f"{len(LINEAR_COLUMNS)} coefficients need at least {MINIMUM_SAMPLES} different models, got {distinct}: "
                "measure more"
            )
        dimensions = _only_dimensions(shapes)
        w = w / w.mean()
        linear = X[:, [names.index(name) for name in LINEAR_COLUMNS]]

        def fit_base(train: npt.NDArray[np.bool_]) -> FloatArray:
            return _log_linear(linear, _fit_linear(linear[train], y[train], w[train]))

        boost = fit_residual_boost(X, np.log(y), fit_base, seed, w)
        provenance = Provenance(
            target=target,
            runtime_version=runtime_version,
            workload=workload,
            precision=precision,
            samples=len(shapes),
            held_out_error=float(np.abs(boost.held_out_log_errors).mean()),
            linear_held_out_error=float(np.abs(boost.base_held_out_log_errors).mean()),
        )
        return cls(provenance, dimensions, names, _fit_linear(linear, y, w), boost)

    def predict(self, shapes: Sequence[ModelShape], coverage: float = 0.9) -> LatencyPrediction:
        """Latencies [n] with intervals, symmetric in log space, that hold the truth with probability `coverage`."""
        if shapes and _only_dimensions(shapes) != self.dimensions:
            raise ValueError(
                f"this predictor was fitted on models of (hidden_size, head_dim, vocab_size, tie_word_embeddings) = "
                f"{self.dimensions}, got {_only_dimensions(shapes)}: fit one on measurements of that model"
            )
        names, X = latency_features(shapes, self.provenance.workload, self.provenance.precision)
        linear = X[:, [names.index(name) for name in LINEAR_COLUMNS]]
        value_ms = np.exp(_log_linear(linear, self.coefficients) + self.boost.log_correction(X))
        return LatencyPrediction(value_ms, *log_interval(value_ms, self.boost.held_out_log_errors, coverage))

    def save(self, path: Path) -> None:
        """Write one JSON file, trees in XGBoost's own JSON inside; nothing in it is executed on load."""
        booster = self.boost.booster
        content = {
            "format": _FORMAT,
            "provenance": asdict(self.provenance),
            "dimensions": self.dimensions,
            "feature_names": self.feature_names,
            "coefficients": dict(zip(LINEAR_COLUMNS, self.coefficients.tolist(), strict=True)),
            "shrinkage": self.boost.shrinkage,
            "held_out_log_errors": self.boost.held_out_log_errors.tolist(),
            "linear_held_out_log_errors": self.boost.base_held_out_log_errors.tolist(),
            "booster": None if booster is None else json.loads(booster.save_raw("json")),
        }
        Path(path).write_text(json.dumps(content))

    @classmethod
    def load(cls, path: Path, *, target: str, workload: Workload, runtime_version: str) -> LatencyPredictor:
        """Read what `save` wrote; ValueError unless it was fitted for just this target, workload and version."""
        content = json.loads(Path(path).read_text())
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path}: wanted format {_FORMAT}, got {content.get('format')}: fit the predictor again")
        found = content["provenance"]
        found["workload"] = Workload(**found["workload"])
        wanted = {"target": target, "workload": workload, "runtime_version": runtime_version}
        for field, value in wanted.items():
            if found[field] != value:
                raise ValueError(f"{path}: wanted {field} {value!r}, got {found[field]!r}: profile and fit that one")
        names, _ = latency_features((), workload, found["precision"])
        if tuple(content["feature_names"]) != names or tuple(content["coefficients"]) != LINEAR_COLUMNS:
            raise ValueError(f"{path}: its columns are not those of this version of llm-nas: fit the predictor again")
        errors = np.asarray(content["held_out_log_errors"], dtype=np.float64)
        if errors.shape != (found["samples"],):
            raise ValueError(f"{path}: wanted {found['samples']} held-out errors, got {errors.size}: fit it again")
        booster = None
        if content["booster"] is not None:
            booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(json.dumps(content["booster"]).encode()))
        boost = ResidualBoost(
            content["shrinkage"],
            booster,
            errors,
            np.asarray(content["linear_held_out_log_errors"], dtype=np.float64),
        )
        coefficients = np.array(list(content["coefficients"].values()), dtype=np.float64)
        hidden_size, head_dim, vocab_size, tied = content["dimensions"]
        return cls(Provenance(**found), (hidden_size, head_dim, vocab_size, tied), names, coefficients, boost)


def _only_dimensions(shapes: Sequence[ModelShape]) -> tuple[int, int, int, bool]:
    found = {(s.hidden_size, s.head_dim, s.vocab_size, s.tie_word_embeddings) for s in shapes}
    if len(found) > 1:
        raise ValueError(
            f"models must differ only in their blocks, got {len(found)} sets of dimensions {sorted(found)}"
        )
    return found.pop()


def _fit_linear(columns: FloatArray, y: FloatArray, weights: FloatArray) -> FloatArray:
    """b >= 0 minimising sum(w ((x . b - y) / y)^2) + ridge, a non-negative least-squares problem on rows x / y."""
    rows = columns / y[:, None]
    scale = np.sqrt((rows**2).mean(axis=0))
    scale[scale == 0] = 1.0  # a column that is 0 in every sample: the ridge alone decides, for 0
    root = np.sqrt(weights)
    A = np.vstack([rows / scale * root[:, None], np.sqrt(_RIDGE * len(y)) * np.eye(columns.shape[1])])
    solution, _ = nnls(A, np.concatenate([root, np.zeros(columns.shape[1])]))
    return np.asarray(solution / scale, dtype=np.float64)


def _log_linear(columns: FloatArray, coefficients: FloatArray) -> FloatArray:
    return np.asarray(np.log(np.maximum(columns @ coefficients, 1e-9)), dtype=np.float64)  # 1e-9 ms: nothing is free
