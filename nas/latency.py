"""Latency of subnets on a profiled device: one predictor a precision, fitted on its measurements, and their error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles import Measurement, ModelShape, Store, Target, Workload
from hw_profiles.measurement import FINALIST_ROLES, Role
from hw_profiles.profile import repeat_noise
from hw_profiles.shapes import PRECISIONS, Phase, Precision
from hw_profiles.staleness import installed_version, usable
from nas.fitted import fitted_predictor
from nas.space import SearchSpace
from nas.subnet import Subnet
from predictors import AdditiveTable, LatencyPrediction, LatencyPredictor, describe_workloads, mape, spearman, within

Floats = NDArray[np.float64]

#: Graphs of a profile that predictors are fitted on; the others judge them.
TRAINING_ROLES: tuple[Role, ...] = ("reference", "table", "anchor")
_CURVE_POINTS = 40
#: Of a graph's latency relative to the full model's, the standard deviation from one time that both are loaded to the
#: next, minutes later: pages and what is ours of the caches are others then. OpenVINO's decode of one int4 subnet took
#: 0.81, 0.83 and 0.86 of the full model's time.
LOAD_NOISE = 0.02


#: Profiles that a sentence names of those that there are.
_MOST_NAMED = 4


class ProfileMissingError(ValueError):
    """The device was not profiled for what is asked."""


@dataclass(frozen=True)
class LatencyModel:
    """Predictors of one runtime on one device, asked for one workload. Timed finalists keep their timings."""

    space: SearchSpace
    workload: Workload
    predictors: dict[Precision, LatencyPredictor]
    measured: dict[tuple[Precision, ModelShape], list[Measurement]]

    @classmethod
    def fit(
        cls,
        store: Store,
        device_id: str,
        runtime: str,
        threads: int,
        space: SearchSpace,
        workload: Workload,
        learn_from_finalists: bool = True,
        allow_stale: bool = False,
    ) -> LatencyModel:
        """Fit on everything but the held-out graphs, which stay unseen so that `held_out_errors` can judge.

        All workloads of the phase that were measured are fitted together, so `workload` may be any between them. A
        search leaves the finalists out as well, so that it can be gone on with after a query has timed some.

        Raises ProfileMissingError, naming what is profiled, where there are no measurements of this kind, and, unless
        `allow_stale`, StaleProfileError where they are of several versions of the runtime or not of the installed one.
        """
        measurements = _measurements(store, device_id, runtime, threads, space, workload.phase, allow_stale)
        roles = (*TRAINING_ROLES, *FINALIST_ROLES) if learn_from_finalists else TRAINING_ROLES
        predictors: dict[Precision, LatencyPredictor] = {}
        measured: dict[tuple[Precision, ModelShape], list[Measurement]] = {}
        lacking: list[str] = []
        for precision in PRECISIONS:
            target = Target(device_id, runtime, precision, threads)
            found = [m for m in measurements if m.target == target]
            training = [m for m in found if m.role in roles]
            if not training:
                continue
            if space.head_choices and not any(space.has_fewer_heads(m.shape) for m in training):
                lacking.append(target.key)
                continue
            predictor = fitted_predictor(store, training, roles)
            if not predictor.provenance.covers(workload):
                continue
            predictors[precision] = predictor
            for m in found:
                if m.workload == workload and (m.is_full_model or m.role in FINALIST_ROLES):
                    measured.setdefault((precision, m.shape), []).append(m)
        if not predictors and lacking:
            raise ProfileMissingError(
                f"{', '.join(lacking)} was not profiled with fewer query heads per KV group, which this space has; run "
                "nas profile --query-heads"
            )
        if not predictors:
            raise ProfileMissingError(
                f"{runtime} with {threads} threads was not profiled for {workload.phase} at {workload.tokens} tokens "
                f"and this model (profiled: {_profiled(store, runtime)}); run nas profile first"
            )
        return cls(space, workload, predictors, measured)

    def predict(self, subnets: Sequence[Subnet]) -> LatencyPrediction:
        """Expected milliseconds with 90 % intervals, [n]; ProfileMissingError for a precision that was not profiled."""
        value, low, high = (np.empty(len(subnets)) for _ in range(3))
        shapes = [self.space.model_shape(subnet) for subnet in subnets]
        for precision in {subnet.precision for subnet in subnets}:
            if precision not in self.predictors:
                raise ProfileMissingError(
                    f"precision {precision} was not profiled (only {', '.join(self.predictors)}); run nas profile "
                    f"--precision {precision}{' --query-heads' if self.space.head_choices else ''}"
                )
            rows = [i for i, subnet in enumerate(subnets) if subnet.precision == precision]
            predicted = self.predictors[precision].predict([shapes[i] for i in rows], self.workload)
            value[rows], low[rows], high[rows] = predicted.value_ms, predicted.low_ms, predicted.high_ms
        return LatencyPrediction(value, low, high)

    def value_ms(self, subnets: Sequence[Subnet]) -> Floats:
        """Expected milliseconds alone, [n]: what a search minimises."""
        return self.predict(subnets).value_ms

    def timed(self, subnet: Subnet) -> Timed | None:
        """The full model and finalists; other graphs of a profile were timed too briefly to admit one."""
        found = self.measured.get((subnet.precision, self.space.model_shape(subnet)))
        return timed_together(found) if found else None


@dataclass(frozen=True)
class Timed:
    """What one or several timings of a graph say, each of which loaded it anew.

    `high_ms` lies two standard errors above `latency_ms`. `is_confirmed` once it was not only timed to be chosen: what
    is chosen by its timing was lucky, more often than not.
    """

    latency_ms: float
    high_ms: float
    is_confirmed: bool


def timed_together(measurements: Sequence[Measurement]) -> Timed:
    """Their mean; its error is that of their rounds, of their differences, or of LOAD_NOISE, whichever is largest."""
    values_ms = [m.latency_ms for m in measurements]
    of_rounds_ms = math.hypot(*(m.high_ms - m.latency_ms for m in measurements)) / len(measurements)
    between_ms = 2 * float(np.std(values_ms, ddof=1)) / math.sqrt(len(values_ms)) if len(values_ms) > 1 else 0.0
    latency_ms = float(np.mean(values_ms))
    of_loads_ms = 2 * LOAD_NOISE * latency_ms / math.sqrt(len(values_ms))
    is_confirmed = any(m.role != "finalist" for m in measurements)
    return Timed(latency_ms, latency_ms + max(of_rounds_ms, between_ms, of_loads_ms), is_confirmed)


@dataclass(frozen=True)
class HeldoutGraph:
    """A graph that no predictor was fitted on, timed on one workload, and what each of them says of it, in ms.

    `additive_ms` is nan where a profile leans on another and has no table.
    """

    precision: Precision
    shape: ModelShape
    workload: Workload
    measured_ms: float
    predicted_ms: float
    low_ms: float
    high_ms: float
    additive_ms: float


@dataclass(frozen=True)
class LatencyErrors:
    """Over the held-out graphs of all precisions and workloads of a phase.

    Rank correlations are those within each precision and workload, averaged over their graphs.
    """

    runtime: str
    phase: Phase
    samples: int
    mape: float
    within_5: float
    within_10: float
    interval_coverage: float
    spearman: float
    additive_mape: float
    flops_spearman: float
    repeat_noise: float | None
    graphs: tuple[HeldoutGraph, ...]


def held_out_errors(
    store: Store,
    device_id: str,
    runtime: str,
    threads: int,
    space: SearchSpace,
    phase: Phase,
    allow_stale: bool = False,
) -> LatencyErrors:
    """How well the predictors do on the graphs set aside for that; ProfileMissingError where there are none."""
    space = replace(space, head_choices=())  # graphs are judged whether or not the profile has fewer query heads
    measurements = _measurements(store, device_id, runtime, threads, space, phase, allow_stale)
    graphs: list[HeldoutGraph] = []
    noises: list[float] = []
    for workload in sorted({m.workload for m in measurements if m.role == "heldout"}):
        model = LatencyModel.fit(
            store, device_id, runtime, threads, space, workload, learn_from_finalists=False, allow_stale=allow_stale
        )
        for precision, predictor in model.predictors.items():
            found = [m for m in measurements if m.target.precision == precision]
            heldout = [m for m in found if m.role == "heldout" and m.workload == workload]
            if not heldout:
                continue
            shapes = [m.shape for m in heldout]
            predicted = predictor.predict(shapes, workload)
            additive_ms = _additive_ms(found, shapes, workload)
            columns = zip(heldout, predicted.value_ms, predicted.low_ms, predicted.high_ms, additive_ms, strict=True)
            graphs += [HeldoutGraph(precision, m.shape, workload, m.latency_ms, *map(float, r)) for m, *r in columns]
            noise = repeat_noise([m for m in found if m.workload == workload])
            noises += [] if noise is None else [noise]
    if not graphs:
        raise ProfileMissingError(f"{runtime} has no held-out graphs for {phase}; profile with held-out graphs")
    actual, predicted_ms = (np.array([getattr(g, name) for g in graphs]) for name in ("measured_ms", "predicted_ms"))
    return LatencyErrors(
        runtime=runtime,
        phase=phase,
        samples=len(graphs),
        mape=mape(predicted_ms, actual),
        within_5=within(predicted_ms, actual, 0.05),
        within_10=within(predicted_ms, actual, 0.10),
        interval_coverage=float(np.mean([g.low_ms <= g.measured_ms <= g.high_ms for g in graphs])),
        spearman=_mean_spearman(graphs, lambda g: g.predicted_ms),
        additive_mape=mape(np.array([g.additive_ms for g in graphs]), actual),
        flops_spearman=_mean_spearman(graphs, lambda g: g.shape.flops(g.workload)),
        repeat_noise=float(np.median(noises)) if noises else None,
        graphs=tuple(graphs),
    )


@dataclass(frozen=True)
class LatencyCurve:
    """The full model over prompt or context tokens, at one precision and batch size: pairs of tokens and ms."""

    runtime: str
    phase: Phase
    precision: Precision
    batch_size: int
    predicted: tuple[tuple[int, float], ...]
    measured: tuple[tuple[int, float], ...]


def latency_curves(
    store: Store, device_id: str, runtime: str, threads: int, space: SearchSpace, phase: Phase
) -> list[LatencyCurve]:
    """One for each precision and batch size, stale or not; none of a precision that was timed on one workload alone."""
    space = replace(space, head_choices=())  # the full model has none
    timed = _measurements(store, device_id, runtime, threads, space, phase, allow_stale=True)
    curves = []
    for precision in PRECISIONS:
        full_ms = {m.workload: m.latency_ms for m in timed if m.is_full_model and m.target.precision == precision}
        if len(full_ms) < 2:
            continue
        model = LatencyModel.fit(store, device_id, runtime, threads, space, min(full_ms), allow_stale=True)
        for batch_size in sorted({work.batch_size for work in full_ms}):
            measured = sorted((work.tokens, ms) for work, ms in full_ms.items() if work.batch_size == batch_size)
            least, most = measured[0][0], measured[-1][0]
            tokens = np.unique(np.geomspace(least + 1, most + 1, _CURVE_POINTS).round().astype(int) - 1).tolist()
            works = [Workload(phase, count, batch_size) for count in tokens]
            values_ms = [float(model.predictors[precision].predict([space.base], work).value_ms[0]) for work in works]
            predicted = tuple(zip(tokens, values_ms, strict=True))
            curves.append(LatencyCurve(runtime, phase, precision, batch_size, predicted, tuple(measured)))
    return curves


def _profiled(store: Store, runtime: str) -> str:
    """For people: what was profiled of the runtime, or else of others, on any device."""
    found: dict[tuple[str, int, Phase], list[Workload]] = {}
    for m in filter(lambda m: m.is_full_model, store.measurements(roles=["reference"])):
        found.setdefault((m.target.runtime, m.target.threads, m.workload.phase), []).append(m.workload)
    some = {key: workloads for key, workloads in found.items() if key[0] == runtime} or found
    said = [f"{name} with {n} threads {describe_workloads(work)}" for (name, n, _), work in sorted(some.items())]
    if len(said) > _MOST_NAMED:
        said = [*said[:_MOST_NAMED], f"{len(said) - _MOST_NAMED} more that nas devices lists"]
    return ", ".join(said) or "nothing"


def _measurements(
    store: Store, device_id: str, runtime: str, threads: int, space: SearchSpace, phase: Phase, allow_stale: bool
) -> list[Measurement]:
    """Of all precisions and of all workloads of the phase, those that still hold."""
    targets = [Target(device_id, runtime, precision, threads) for precision in PRECISIONS]
    found = [
        m
        for target in targets
        for m in store.measurements(target, reference_id=space.base.id)
        if m.workload.phase == phase
    ]
    return usable(found, installed_version(runtime, device_id), allow_stale)


def _additive_ms(found: Sequence[Measurement], shapes: Sequence[ModelShape], workload: Workload) -> Floats:
    """The additive table, which is timed whole on one workload, scaled to another as the full model is."""
    table = [m for m in found if m.role == "table"]
    if not table:
        return np.full(len(shapes), np.nan)
    counts = Counter(m.workload for m in table)
    shared = workload if counts[workload] == max(counts.values()) else counts.most_common(1)[0][0]
    full_ms = {m.workload: m.latency_ms for m in found if m.is_full_model}
    rows = [m for m in table if m.workload == shared]
    full = next(m.shape for m in found if m.is_full_model)
    fitted = AdditiveTable.fit(full, full_ms[shared], [m.shape for m in rows], [m.latency_ms for m in rows])
    return fitted.predict(shapes) * full_ms[workload] / full_ms[shared]


def _mean_spearman(graphs: Sequence[HeldoutGraph], estimate: Callable[[HeldoutGraph], float]) -> float:
    groups: dict[object, list[HeldoutGraph]] = {}
    for graph in graphs:
        groups.setdefault((graph.precision, graph.workload), []).append(graph)
    ranked = [group for group in groups.values() if len(group) > 2]
    values = [
        spearman(np.array([estimate(g) for g in group]), np.array([g.measured_ms for g in group])) for group in ranked
    ]
    return float(np.average(values, weights=[len(group) for group in ranked])) if ranked else math.nan
