"""Latency of decoders on one target in one phase, learned from a few tens of whole-model measurements.

    log latency  =  log(x . b)  +  curve(workload)  +  shrinkage * trees(x)

b >= 0 minimises sum(((x . b - y) / y)^2) over `STEP_COLUMNS` and, where more than one workload was measured,
`WORKLOAD_COLUMNS`: relative errors, since a budget is missed in per cent. Kernels are not equally efficient at every
prompt length or batch; the curve is the mean log error left at each measured workload, interpolated between them
linearly in log tokens and log batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xgboost
from scipy.interpolate import RBFInterpolator
from scipy.optimize import nnls

from hw_profiles.shapes import ModelShape, Precision, Workload
from predictors.boosting import ResidualBoost, fit_residual_boost
from predictors.features import STEP_COLUMNS, WORKLOAD_COLUMNS, latency_features
from predictors.intervals import log_interval
from predictors.metrics import FloatArray

#: One sample a coefficient and two to judge them by; also the fewest for which a 90 % interval is finite.
MINIMUM_SAMPLES = len(STEP_COLUMNS) + 2

_FORMAT = 2
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
    #: Those measured, all of one phase.
    workloads: tuple[Workload, ...]
    precision: Precision
    samples: int
    #: Mean |log error| of samples held out in turn, which for small errors is the mean relative error.
    held_out_error: float
    #: The same for the linear model alone.
    linear_held_out_error: float

    def covers(self, workload: Workload) -> bool:
        """Whether a workload lies between those measured, in tokens and in batch."""
        tokens, batches = ([getattr(w, name) for w in self.workloads] for name in ("tokens", "batch_size"))
        return (
            workload.phase == self.workloads[0].phase
            and min(tokens) <= workload.tokens <= max(tokens)
            and min(batches) <= workload.batch_size <= max(batches)
        )


@dataclass(frozen=True, eq=False)
class WorkloadCurve:
    """What the linear model is off at each workload measured: `log_offsets` [k], one each of `workloads`."""

    workloads: tuple[Workload, ...]
    log_offsets: FloatArray

    @classmethod
    def fit(cls, workloads: Sequence[Workload], log_errors: FloatArray) -> WorkloadCurve:
        """Mean errors, drawn to 0 where few were measured. A single workload needs none: the linear model has it."""
        distinct = tuple(sorted(set(workloads)))
        if len(distinct) == 1:
            return cls(distinct, np.zeros(1))
        index = {work: i for i, work in enumerate(distinct)}
        rows = np.array([index[work] for work in workloads])
        sums, counts = (np.bincount(rows, weights, len(distinct)) for weights in (log_errors, None))
        return cls(distinct, sums / (counts + 1))

    def __call__(self, workloads: Sequence[Workload]) -> FloatArray:
        """Offsets [n], constant beyond the workloads measured."""
        if len(self.workloads) == 1 or not workloads:
            return np.full(len(workloads), self.log_offsets[0])
        distinct = sorted(set(workloads))
        interpolate = RBFInterpolator(_positions(self.workloads), self.log_offsets, kernel="linear", degree=0)
        offsets = dict(zip(distinct, interpolate(_positions(distinct)), strict=True))
        return np.array([offsets[work] for work in workloads])


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """Made by `fit` or `load`; holds for models that differ only in their blocks."""

    provenance: Provenance
    #: hidden_size, head_dim, vocab_size, tie_word_embeddings of the models fitted on.
    dimensions: tuple[int, int, int, bool]
    feature_names: tuple[str, ...]
    #: In ms per unit of each column of the linear model.
    coefficients: dict[str, float]
    curve: WorkloadCurve
    boost: ResidualBoost

    @classmethod
    def fit(
        cls,
        shapes: Sequence[ModelShape],
        latency_ms: npt.ArrayLike,
        workloads: Workload | Sequence[Workload],
        precision: Precision,
        seed: int,
        weights: npt.ArrayLike | None = None,
        *,
        target: str = "",
        runtime_version: str = "",
    ) -> LatencyPredictor:
        """Fit on whole models, each timed on its own workload of `workloads` or all on one.

        `weights` (say 1 / spread^2) are relative; all measurements of a shape stay in one fold.
        """
        works = [workloads] * len(shapes) if isinstance(workloads, Workload) else list(workloads)
        y = np.asarray(latency_ms, dtype=np.float64)
        w = np.ones(len(shapes)) if weights is None else np.asarray(weights, dtype=np.float64)
        if y.shape != (len(shapes),) or w.shape != y.shape or len(works) != len(shapes):
            raise ValueError(
                f"wanted one latency, one weight and one workload a shape, got {len(shapes)} shapes, {y.shape}, "
                f"{w.shape} and {len(works)}"
            )
        if len({work.phase for work in works}) > 1:
            raise ValueError("prefill and decode have predictors of their own, got both in one fit")
        if not (np.isfinite(y).all() and np.isfinite(w).all() and (y > 0).all() and (w > 0).all()):
            raise ValueError("latencies and weights must be finite and above 0: leave failed measurements out")
        names, X = latency_features(shapes, works, precision)
        of_shapes = X[:, [names.index(name) for name in STEP_COLUMNS]]
        distinct = len(np.unique(of_shapes, axis=0))
        if distinct < MINIMUM_SAMPLES:
            raise ValueError(
                f"{len(STEP_COLUMNS)} coefficients need at least {MINIMUM_SAMPLES} different models, got {distinct}: "
                "measure more"
            )
        dimensions = _only_dimensions(shapes)
        w = w / w.mean()
        columns = STEP_COLUMNS + (WORKLOAD_COLUMNS if len(set(works)) > 1 else ())
        linear = X[:, [names.index(name) for name in columns]]

        def fit_linear_and_curve(train: npt.NDArray[np.bool_]) -> tuple[FloatArray, WorkloadCurve]:
            coefficients = _fit_linear(linear[train], y[train], w[train])
            log_errors = np.log(y[train]) - _log_linear(linear[train], coefficients)
            return coefficients, WorkloadCurve.fit([works[i] for i in np.flatnonzero(train)], log_errors)

        def fit_base(train: npt.NDArray[np.bool_]) -> FloatArray:
            coefficients, curve = fit_linear_and_curve(train)
            return _log_linear(linear, coefficients) + curve(works)

        boost = fit_residual_boost(X, np.log(y), fit_base, seed, w, together=of_shapes)
        coefficients, curve = fit_linear_and_curve(np.ones(len(y), dtype=np.bool_))
        provenance = Provenance(
            target=target,
            runtime_version=runtime_version,
            workloads=curve.workloads,
            precision=precision,
            samples=len(shapes),
            held_out_error=float(np.abs(boost.held_out_log_errors).mean()),
            linear_held_out_error=float(np.abs(boost.base_held_out_log_errors).mean()),
        )
        by_name = dict(zip(columns, coefficients.tolist(), strict=True))
        return cls(provenance, dimensions, names, by_name, curve, boost)

    def predict(self, shapes: Sequence[ModelShape], workload: Workload, coverage: float = 0.9) -> LatencyPrediction:
        """Latencies [n] with intervals, symmetric in log space, that hold the truth with probability `coverage`.

        ValueError for a workload that lies outside those measured, and for models of another family.
        """
        if not self.provenance.covers(workload):
            raise ValueError(
                f"{workload.phase} at {workload.tokens} tokens and batch {workload.batch_size} lies outside what was "
                f"measured ({describe_workloads(self.provenance.workloads)}): profile that range"
            )
        if shapes and _only_dimensions(shapes) != self.dimensions:
            raise ValueError(
                f"this predictor was fitted on models of (hidden_size, head_dim, vocab_size, tie_word_embeddings) = "
                f"{self.dimensions}, got {_only_dimensions(shapes)}: fit one on measurements of that model"
            )
        names, X = latency_features(shapes, [workload] * len(shapes), self.provenance.precision)
        linear = X[:, [names.index(name) for name in self.coefficients]]
        log_base = _log_linear(linear, np.array(list(self.coefficients.values()))) + self.curve([workload])[0]
        value_ms = np.exp(log_base + self.boost.log_correction(X))
        return LatencyPrediction(value_ms, *log_interval(value_ms, self.boost.held_out_log_errors, coverage))

    def save(self, path: Path) -> None:
        """Write one JSON file, trees in XGBoost's own JSON inside; nothing in it is executed on load."""
        booster = self.boost.booster
        content = {
            "format": _FORMAT,
            "provenance": asdict(self.provenance),
            "dimensions": self.dimensions,
            "feature_names": self.feature_names,
            "coefficients": self.coefficients,
            "log_offsets": self.curve.log_offsets.tolist(),
            "shrinkage": self.boost.shrinkage,
            "held_out_log_errors": self.boost.held_out_log_errors.tolist(),
            "linear_held_out_log_errors": self.boost.base_held_out_log_errors.tolist(),
            "booster": None if booster is None else json.loads(booster.save_raw("json")),
        }
        Path(path).write_text(json.dumps(content))

    @classmethod
    def load(cls, path: Path, *, target: str, workload: Workload, runtime_version: str) -> LatencyPredictor:
        """Read what `save` wrote; ValueError unless it holds for this target, workload and version."""
        content = json.loads(Path(path).read_text())
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path}: wanted format {_FORMAT}, got {content.get('format')}: fit the predictor again")
        found = content["provenance"]
        found["workloads"] = tuple(Workload(**fields) for fields in found["workloads"])
        for field, value in {"target": target, "runtime_version": runtime_version}.items():
            if found[field] != value:
                raise ValueError(f"{path}: wanted {field} {value!r}, got {found[field]!r}: profile and fit that one")
        provenance = Provenance(**found)
        if not provenance.covers(workload):
            raise ValueError(
                f"{path}: wanted workload {workload!r}, got {describe_workloads(provenance.workloads)}: profile that"
            )
        names, _ = latency_features((), (), provenance.precision)
        columns = STEP_COLUMNS + (WORKLOAD_COLUMNS if len(provenance.workloads) > 1 else ())
        if tuple(content["feature_names"]) != names or tuple(content["coefficients"]) != columns:
            raise ValueError(f"{path}: its columns are not those of this version of llm-nas: fit the predictor again")
        errors = np.asarray(content["held_out_log_errors"], dtype=np.float64)
        if errors.shape != (provenance.samples,):
            raise ValueError(f"{path}: wanted {provenance.samples} held-out errors, got {errors.size}: fit it again")
        booster = None
        if content["booster"] is not None:
            booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(json.dumps(content["booster"]).encode()))
        boost = ResidualBoost(
            content["shrinkage"],
            booster,
            errors,
            np.asarray(content["linear_held_out_log_errors"], dtype=np.float64),
        )
        curve = WorkloadCurve(provenance.workloads, np.asarray(content["log_offsets"], dtype=np.float64))
        hidden_size, head_dim, vocab_size, tied = content["dimensions"]
        dimensions = (hidden_size, head_dim, vocab_size, tied)
        return cls(provenance, dimensions, names, content["coefficients"], curve, boost)


def describe_workloads(workloads: Sequence[Workload]) -> str:
    """For people: `decode at 0 to 1024 tokens`, with the batch sizes where they are not all 1."""
    tokens, batches = ([getattr(work, name) for work in workloads] for name in ("tokens", "batch_size"))

    def span(values: Sequence[int]) -> str:
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    batch = "" if max(batches) == 1 else f" and batch {span(batches)}"
    return f"{workloads[0].phase} at {span(tokens)} tokens{batch}"


def _positions(workloads: Sequence[Workload]) -> FloatArray:
    """[n, 2]: doublings of tokens and of batch, in which kernels' efficiency changes smoothly."""
    return np.log2([[work.tokens + 1.0, work.batch_size] for work in workloads])


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
