"""Peak memory of subnets on a profiled device: measured for a handful of graphs, predicted for all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hw_profiles import ModelShape, Store, Target, Workload
from hw_profiles.measurement import MemoryMeasurement
from hw_profiles.shapes import PRECISIONS, Precision
from hw_profiles.staleness import StaleProfileError, installed_version
from nas.latency import ProfileMissingError
from nas.space import SearchSpace
from nas.subnet import Subnet
from predictors import MemoryPrediction, MemoryPredictor, mape
from predictors.memory import MINIMUM_SAMPLES


@dataclass(frozen=True)
class Memory:
    """Predicted peak of a process, with its 90 % interval, and what it holds without a model.

    `step_joules` is the energy of a step of each workload, never predicted: there if this very subnet was measured on
    a machine that tells it.
    """

    value_bytes: int
    low_bytes: int
    high_bytes: int
    baseline_bytes: int
    step_joules: Mapping[Workload, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryModel:
    """Predictors of one runtime on one device, asked for a process that runs all of `workloads`."""

    space: SearchSpace
    workloads: tuple[Workload, ...]
    predictors: dict[Precision, MemoryPredictor]
    baseline_bytes: int
    step_joules: dict[tuple[Precision, ModelShape], dict[Workload, float]]

    @classmethod
    def fit(
        cls,
        store: Store,
        device_id: str,
        runtime: str,
        threads: int,
        space: SearchSpace,
        workloads: Sequence[Workload],
        allow_stale: bool = False,
    ) -> MemoryModel:
        """Fit on everything but the held-out graphs, which `memory_profile` judges by.

        Raises ProfileMissingError where memory was not measured for one of the workloads, and, unless `allow_stale`,
        StaleProfileError where it was with other versions of the runtime than the installed.
        """
        predictors: dict[Precision, MemoryPredictor] = {}
        measured: list[MemoryMeasurement] = []
        for precision in PRECISIONS:
            target = Target(device_id, runtime, precision, threads)
            found = _measurements(store, target, space.base, allow_stale)
            predictor = _fit(found, precision)
            if predictor is not None and all(map(predictor.covers, workloads)):
                predictors[precision] = predictor
                measured += found
        if not predictors:
            wanted = " and ".join(f"{work.phase} at {work.tokens} tokens" for work in workloads)
            raise ProfileMissingError(
                f"the memory of {runtime} with {threads} threads was not measured for {wanted} of this model, or "
                "for too few graphs; run nas profile for these lengths with --memory-graphs 8"
            )
        step_joules: dict[tuple[Precision, ModelShape], dict[Workload, float]] = {}
        for m in measured:
            if m.step_joules is not None and m.workload in workloads:
                step_joules.setdefault((m.target.precision, m.shape), {})[m.workload] = m.step_joules
        return cls(space, tuple(workloads), predictors, _baseline_bytes(measured), step_joules)

    def predict(self, subnets: Sequence[Subnet]) -> list[Memory]:
        """One entry a subnet: the largest of the workloads.

        ProfileMissingError for a precision whose memory was not measured.
        """
        peaks = np.zeros((len(subnets), 3))
        shapes = [self.space.model_shape(subnet) for subnet in subnets]
        for precision in {subnet.precision for subnet in subnets}:
            if precision not in self.predictors:
                names = ", ".join(self.predictors)
                raise ProfileMissingError(
                    f"the memory of precision {precision} was not measured (only of {names}); run "
                    f"nas profile --precision {precision}"
                )
            rows = [i for i, subnet in enumerate(subnets) if subnet.precision == precision]
            for workload in self.workloads:
                found = self.predictors[precision].predict([shapes[i] for i in rows], [workload] * len(rows))
                of_one = np.column_stack([found.value_bytes, found.low_bytes, found.high_bytes])
                peaks[rows] = np.maximum(peaks[rows], of_one)
        return [
            Memory(value, low, high, self.baseline_bytes, self.step_joules.get((subnet.precision, shape), {}))
            for subnet, shape, (value, low, high) in zip(
                subnets, shapes, peaks.round().astype(int).tolist(), strict=True
            )
        ]


@dataclass(frozen=True)
class MemoryProfile:
    """What was measured of one target, and how far off predictions are for graphs that no predictor was fitted on.

    Of the full model by workload, its energy only where the machine tells it.
    """

    target: Target
    measurements: int
    #: What the process holds without a model.
    baseline_bytes: int
    full_bytes: dict[Workload, int]
    full_step_joules: dict[Workload, float]
    #: Held-out measurements, and what was predicted of each.
    held_out: tuple[MemoryMeasurement, ...]
    predicted: MemoryPrediction | None

    @property
    def mape(self) -> float | None:
        """Of the held-out measurements; None where there are none, or too little to predict them from."""
        if self.predicted is None:
            return None
        return mape(self.predicted.value_bytes, [m.peak_bytes for m in self.held_out])


def memory_profile(store: Store, target: Target, full: ModelShape) -> MemoryProfile | None:
    """None where memory was not measured."""
    found = _measurements(store, target, full, allow_stale=True)
    if not found:
        return None
    references = [m for m in found if m.role == "reference"]
    held_out = [m for m in found if m.role == "heldout"]
    predictor = _fit(found, target.precision)
    predicted = None
    if predictor is not None and held_out:
        predicted = predictor.predict([m.shape for m in held_out], [m.workload for m in held_out])
    return MemoryProfile(
        target=target,
        measurements=len(found),
        baseline_bytes=_baseline_bytes(found),
        full_bytes={m.workload: m.peak_bytes for m in references},
        full_step_joules={m.workload: m.step_joules for m in references if m.step_joules is not None},
        held_out=tuple(held_out),
        predicted=predicted,
    )


def _fit(measurements: Sequence[MemoryMeasurement], precision: Precision) -> MemoryPredictor | None:
    """On all but the held-out graphs; None where too few were measured."""
    training = [m for m in measurements if m.role != "heldout"]
    if len(training) < MINIMUM_SAMPLES:
        return None
    return MemoryPredictor.fit(
        [m.shape for m in training], [m.peak_bytes for m in training], [m.workload for m in training], precision
    )


def _baseline_bytes(measurements: Sequence[MemoryMeasurement]) -> int:
    return round(float(np.median([m.baseline_bytes for m in measurements])))


def _measurements(store: Store, target: Target, full: ModelShape, allow_stale: bool) -> list[MemoryMeasurement]:
    """Of one version of the runtime: the installed one; elsewhere, or with leave, the one measured last."""
    found = store.memory_measurements(target, reference_id=full.id)
    if not found:
        return []
    installed = installed_version(target.runtime, target.device_id)
    last = max(found, key=lambda m: m.created_at).runtime_version
    versions = {m.runtime_version for m in found}
    if installed is not None and installed not in versions and not allow_stale:
        raise StaleProfileError(
            f"{target.key}: memory was measured with {target.runtime} {last}, but {installed} is installed; run nas "
            f"profile --runtime {target.runtime} --precision {target.precision} --threads {target.threads} again, or "
            "give --allow-stale"
        )
    wanted = installed if installed in versions else last
    return [m for m in found if m.runtime_version == wanted]
