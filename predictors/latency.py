"""Latency of decoders on one target in one phase, learned from a few tens of whole-model measurements.

    log latency  =  log(x . b)  +  curve(workload)  +  shrinkage * trees(x)

x . b are the costs of `predictors.step_costs`, fitted for relative errors, since a budget is missed in per cent. The
curve is the mean log error left at each measured workload, interpolated between them linearly in log tokens and log
batch.

A target with few measurements of its own may lean on the predictor of another one, its prior: its costs are then drawn
towards the prior's times one factor, and the prior's curve and trees are taken over, to be corrected by its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hw_profiles.shapes import ModelShape, Precision, Workload
from predictors.boosting import FOLDS, ResidualBoost, fit_residual_boost, read_trees, write_trees
from predictors.features import STEP_COLUMNS, latency_features, mixed_columns
from predictors.intervals import assign_folds, log_interval
from predictors.latency_samples import LatencySamples, latency_samples, only_dimensions
from predictors.metrics import FloatArray
from predictors.step_costs import StepCosts

#: One sample a coefficient and two to judge them by; also the fewest for which a 90 % interval is finite.
MINIMUM_SAMPLES = len(STEP_COLUMNS) + 2
#: With a prior these do for a prediction; its interval is unbounded below MINIMUM_SAMPLES.
MINIMUM_TRANSFER_SAMPLES = 3

_FORMAT = 10
#: Penalties on how costs differ from the prior's scaled ones: from much freedom to the one factor alone.
_TRANSFER_RIDGES = (1e-2, 1e-1, 1.0, 1e3)

_Rows = npt.NDArray[np.bool_]


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
    #: Different ones among the samples' models: what one errs by on one workload it errs by on others.
    models: int
    #: Mean |log error| of samples held out in turn, which for small errors is the mean relative error.
    held_out_error: float
    #: The same for the linear model alone.
    linear_held_out_error: float
    #: `training_digest` of all that it was fitted on.
    digest: str

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
        from scipy.interpolate import RBFInterpolator

        distinct = sorted(set(workloads))
        interpolate = RBFInterpolator(_positions(self.workloads), self.log_offsets, kernel="linear", degree=0)
        offsets = dict(zip(distinct, interpolate(_positions(distinct)), strict=True))
        return np.array([offsets[work] for work in workloads])


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """Made by `fit` or `from_json`; holds for models that differ only in their blocks."""

    provenance: Provenance
    #: hidden_size, head_dim, vocab_size, tie_word_embeddings of the models fitted on.
    dimensions: tuple[int, int, int, bool]
    feature_names: tuple[str, ...]
    costs: StepCosts
    curve: WorkloadCurve
    boost: ResidualBoost
    #: The predictor that this one leans on; None where it stands on its own measurements.
    prior: LatencyPredictor | None = None

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
        priors: Sequence[LatencyPredictor] = (),
    ) -> LatencyPredictor:
        """Fit on whole models, each timed on its own workload of `workloads` or all on one.

        `weights` (say 1 / spread^2) are relative; all measurements of a shape stay in one fold.
        `priors` are predictors of similar targets. The one that serves these samples best, by cross-validation, is
        leant on where they are too few for a fit of their own, or where that lowers their held-out error by more than
        the standard error of the gain. Those of other models, or of a narrower range of workloads, are left out.
        """
        samples = latency_samples(shapes, latency_ms, workloads, precision, weights)
        usable = [prior for prior in priors if prior._covers(samples)]
        least = MINIMUM_TRANSFER_SAMPLES if usable else MINIMUM_SAMPLES
        if samples.distinct < least:
            raise ValueError(f"a fit needs at least {least} different models, got {samples.distinct}: measure more")
        bases = [_Base(samples)] if samples.distinct >= MINIMUM_SAMPLES else []
        if usable:
            transfers = [_Base(samples, prior, ridge) for prior in usable for ridge in _TRANSFER_RIDGES]
            bases.append(min(transfers, key=lambda base: base.held_out_error(seed)))
        digest = training_digest(
            shapes, latency_ms, workloads, precision, seed, weights,
            target=target, runtime_version=runtime_version, priors=priors,
        )  # fmt: skip
        fitted = [base.finish(seed, target, runtime_version, digest) for base in bases]
        best = fitted[0]
        for other in fitted[1:]:
            gain = np.abs(best.boost.held_out_log_errors) - np.abs(other.boost.held_out_log_errors)
            if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
                best = other
        return best

    def predict(self, shapes: Sequence[ModelShape], workload: Workload, coverage: float = 0.9) -> LatencyPrediction:
        """Latencies [n] with intervals, symmetric in log space, that hold the truth with probability `coverage`.

        ValueError for a workload that lies outside those measured, and for models of another family.
        """
        if not self.provenance.covers(workload):
            raise ValueError(
                f"{workload.phase} at {workload.tokens} tokens and batch {workload.batch_size} lies outside what was "
                f"measured ({describe_workloads(self.provenance.workloads)}): profile that range"
            )
        if shapes and only_dimensions(shapes) != self.dimensions:
            raise ValueError(
                f"this predictor was fitted on models of (hidden_size, head_dim, vocab_size, tie_word_embeddings) = "
                f"{self.dimensions}, got {only_dimensions(shapes)}: fit one on measurements of that model"
            )
        names, X = latency_features(shapes, [workload] * len(shapes), self.provenance.precision)
        if lacking := set(mixed_columns(names, X)) - set(self.costs.mixed_columns):
            raise ValueError(
                f"{self.provenance.target} was not profiled with {'a head' if 'wide_head' in lacking else 'parts'} of "
                "other bits than the rest: run nas profile again, which times the graphs that it lacks, or search with "
                "--uniform-bits"
            )
        value_ms = np.exp(self.costs.log_ms(names, X) + self._log_correction(X, [workload]))
        errors, models = self.boost.held_out_log_errors, self.provenance.models
        return LatencyPrediction(value_ms, *log_interval(value_ms, errors, coverage, models))

    def _covers(self, samples: LatencySamples) -> bool:
        """Whether it can say something of all of them."""
        return (
            self.dimensions == samples.dimensions
            and all(map(self.provenance.covers, set(samples.workloads)))
            and set(samples.mixed_columns) <= set(self.costs.mixed_columns)
        )

    def _log_correction(self, X: FloatArray, workloads: Sequence[Workload]) -> FloatArray:
        """What curve and trees, and those of the prior, add to the log of the linear model, [n].

        `workloads` holds one for all rows of X [n, f], or one each.
        """
        own: FloatArray = self.curve(workloads) + self.boost.log_correction(X)
        return own if self.prior is None else own + self.prior._log_correction(X, workloads)

    def to_json(self) -> str:
        """All of it as one JSON object, trees in XGBoost's own JSON inside; nothing in it is executed on reading."""
        return json.dumps(self._content())

    def _content(self) -> dict[str, Any]:
        booster = self.boost.booster
        return {
            "format": _FORMAT,
            "provenance": asdict(self.provenance),
            "dimensions": self.dimensions,
            "feature_names": self.feature_names,
            "knots": self.costs.knots,
            "thresholds_bytes": self.costs.thresholds_bytes,
            "mixed_columns": self.costs.mixed_columns,
            "least_ms_per_byte": self.costs.least_ms_per_byte,
            "ms_per_unit": dict(zip(self.costs.columns, self.costs.per_unit.tolist(), strict=True)),
            "log_offsets": self.curve.log_offsets.tolist(),
            "shrinkage": self.boost.shrinkage,
            "held_out_log_errors": self.boost.held_out_log_errors.tolist(),
            "linear_held_out_log_errors": self.boost.base_held_out_log_errors.tolist(),
            "booster": None if booster is None else write_trees(booster),
            "prior": None if self.prior is None else self.prior._content(),
        }

    @classmethod
    def from_json(cls, text: str, *, target: str, runtime_version: str, digest: str) -> LatencyPredictor:
        """Read what `to_json` wrote; ValueError unless it is of this target and version and of these measurements.

        `digest` is the `training_digest` of what a fit would be made on now.
        """
        content = json.loads(text)
        try:
            fitted = cls._from_content(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"wanted a predictor in format {_FORMAT}, got a damaged one: fit it again") from error
        for field, value in {"target": target, "runtime_version": runtime_version, "digest": digest}.items():
            found = getattr(fitted.provenance, field)
            if found != value:
                raise ValueError(f"wanted a predictor of {field} {value!r}, got {found!r}: fit it again")
        return fitted

    @classmethod
    def _from_content(cls, content: Any) -> LatencyPredictor:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"wanted a predictor in format {_FORMAT}, got another: fit it again")
        found = content["provenance"]
        found["workloads"] = tuple(Workload(**fields) for fields in found["workloads"])
        provenance = Provenance(**found)
        prior = None if content["prior"] is None else cls._from_content(content["prior"])
        names, _ = latency_features((), (), provenance.precision)
        several = len(provenance.workloads) > 1 if prior is None else prior.costs.has_sequence_columns
        per_unit = np.array(list(content["ms_per_unit"].values()), dtype=np.float64)
        thresholds_bytes, least = tuple(content["thresholds_bytes"]), content["least_ms_per_byte"]
        mixed = tuple(content["mixed_columns"])
        costs = StepCosts(tuple(content["knots"]), thresholds_bytes, several, mixed, per_unit, least)
        if tuple(content["feature_names"]) != names or tuple(content["ms_per_unit"]) != costs.columns:
            raise ValueError("its columns are not those of this version of llm-nas: fit the predictor again")
        errors = np.asarray(content["held_out_log_errors"], dtype=np.float64)
        if errors.shape != (provenance.samples,):
            raise ValueError(f"wanted {provenance.samples} held-out errors, got {errors.size}: fit the predictor again")
        booster = None if content["booster"] is None else read_trees(content["booster"])
        boost = ResidualBoost(
            content["shrinkage"],
            booster,
            errors,
            np.asarray(content["linear_held_out_log_errors"], dtype=np.float64),
        )
        curve = WorkloadCurve(provenance.workloads, np.asarray(content["log_offsets"], dtype=np.float64))
        hidden_size, head_dim, vocab_size, tied = content["dimensions"]
        dimensions = (hidden_size, head_dim, vocab_size, tied)
        return cls(provenance, dimensions, names, costs, curve, boost, prior)


def training_digest(
    shapes: Sequence[ModelShape],
    latency_ms: npt.ArrayLike,
    workloads: Workload | Sequence[Workload],
    precision: Precision,
    seed: int,
    weights: npt.ArrayLike | None = None,
    *,
    target: str = "",
    runtime_version: str = "",
    priors: Sequence[LatencyPredictor] = (),
) -> str:
    """64 hex digits, equal if and only if `LatencyPredictor.fit` would be given the same by this version of llm-nas."""
    samples = latency_samples(shapes, latency_ms, workloads, precision, weights)
    said = {
        "format": _FORMAT,
        "names": samples.names,
        "workloads": [asdict(work) for work in samples.workloads],
        "precision": precision,
        "dimensions": samples.dimensions,
        "seed": seed,
        "target": target,
        "runtime_version": runtime_version,
        "priors": [prior.provenance.digest for prior in priors],
    }
    digest = hashlib.sha256(json.dumps(said).encode())
    for array in (samples.X, samples.y, samples.weights):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def describe_workloads(workloads: Sequence[Workload]) -> str:
    """For people: `decode at 0 to 1024 tokens`, with the batch sizes where they are not all 1."""
    tokens, batches = ([getattr(work, name) for work in workloads] for name in ("tokens", "batch_size"))

    def span(values: Sequence[int]) -> str:
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    batch = "" if max(batches) == 1 else f" and batch {span(batches)}"
    return f"{workloads[0].phase} at {span(tokens)} tokens{batch}"


@dataclass(frozen=True, eq=False)
class _Base:
    """Costs and curve, to be fitted on any of the samples: by themselves, or leaning on a prior."""

    samples: LatencySamples
    prior: LatencyPredictor | None = None
    ridge: float = 0.0

    @cached_property
    def columns(self) -> StepCosts:
        """Without costs: the same columns whatever is held out."""
        return StepCosts.between(self.samples.names, self.samples.X)

    @cached_property
    def inherited(self) -> FloatArray:
        """What the prior's curve and trees add to the log of every sample, [n]."""
        if self.prior is None:
            return np.zeros(len(self.samples.y))
        return self.prior._log_correction(self.samples.X, self.samples.workloads)

    def fit(self, train: _Rows) -> tuple[StepCosts, WorkloadCurve]:
        """Of the rows `train`."""
        samples = self.samples
        X, weights = samples.X[train], samples.weights[train]
        y = samples.y[train] / np.exp(self.inherited[train])
        if self.prior is None:
            costs = self.columns.fitted(samples.names, X, y, weights)
        else:
            costs = self.prior.costs.refitted(samples.names, X, y, weights, self.ridge)
        log_errors = np.log(y) - costs.log_ms(samples.names, X)
        return costs, WorkloadCurve.fit([samples.workloads[i] for i in np.flatnonzero(train)], log_errors)

    def log_estimate(self, train: _Rows) -> FloatArray:
        """Of every sample, [n], fitted on the rows `train`."""
        costs, curve = self.fit(train)
        return costs.log_ms(self.samples.names, self.samples.X) + curve(self.samples.workloads) + self.inherited

    def held_out_error(self, seed: int) -> float:
        """Mean |log error| of samples held out in turn, on the folds that the trees are judged on."""
        fold = assign_folds(self.samples.of_shapes, FOLDS, seed)
        log_y = np.log(self.samples.y)
        errors = [(log_y - self.log_estimate(fold != k))[fold == k] for k in range(int(fold.max()) + 1)]
        return float(np.abs(np.concatenate(errors)).mean())

    def finish(self, seed: int, target: str, runtime_version: str, digest: str) -> LatencyPredictor:
        """Fitted on all samples, with trees on top."""
        samples = self.samples
        boost = fit_residual_boost(
            samples.X, np.log(samples.y), self.log_estimate, seed, samples.weights, together=samples.of_shapes
        )
        costs, curve = self.fit(np.ones(len(samples.y), dtype=np.bool_))
        provenance = Provenance(
            target=target,
            runtime_version=runtime_version,
            workloads=curve.workloads,
            precision=samples.precision,
            samples=len(samples.y),
            models=samples.distinct,
            held_out_error=float(np.abs(boost.held_out_log_errors).mean()),
            linear_held_out_error=float(np.abs(boost.base_held_out_log_errors).mean()),
            digest=digest,
        )
        return LatencyPredictor(provenance, samples.dimensions, samples.names, costs, curve, boost, self.prior)


def _positions(workloads: Sequence[Workload]) -> FloatArray:
    """[n, 2]: doublings of tokens and of batch, in which kernels' efficiency changes smoothly."""
    return np.log2([[work.tokens + 1.0, work.batch_size] for work in workloads])
