"""Time planned graphs on a target, in batches that a later call resumes."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from hw_profiles.devices import Device, Target, affinity
from hw_profiles.measurement import Measurement
from hw_profiles.planning import PlannedGraph, doublings_apart, is_affordable, workloads_of_graphs
from hw_profiles.runtimes import Runtime, Session, check_precision
from hw_profiles.shapes import ModelShape, Precision, Workload
from hw_profiles.timing import DECODE_STEPS, Timing, measure, tokens_needed

#: Writes a model of this shape and precision, with any weights, into the folder and returns the path to load.
Build = Callable[[ModelShape, Precision, Path], Path]
#: Told (graphs done, graphs in the plan, what is going on).
Progress = Callable[[int, int, str], None]

#: A loaded graph takes up to this many times its weights: the file mapped, the runtime's packed copy, activations.
MEMORY_PER_WEIGHT_BYTE = 2.5
#: What the graphs of one batch may take together, the references not counted; and the references but the full model.
BATCH_MEMORY_BYTES = 6 * 2**30
#: Rounds of the references where they are alone: ratios among them need none, and the workloads that they are not timed
#: on again with other graphs are the long ones.
ALONE_ROUNDS = 2
#: Graphs built and loaded side by side, as far as there are threads: each holds a copy of its weights meanwhile.
LOADED_AT_ONCE = 4
#: Times by which references may be slower or faster in a batch than in the median one; told from so many batches on.
STATE_RATIO = 1.2
STATE_BATCHES = 2
#: One batch in so many may be timed twice.
POSTPONED_SHARE = 4
#: Longer batches put more time between a graph and its references.
BATCH_GRAPHS = 8


class ProfileError(RuntimeError):
    """Some graphs could not be built, loaded or run; the others are stored."""


class Results(Protocol):
    """Where measurements go and are found again: the database (`Store`) or one file (`MeasuredFile`)."""

    def add_device(self, device: Device) -> None: ...

    def measurements(self, target: Target, *, reference_id: str) -> list[Measurement]: ...

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Keep all or, on an error, none."""
        ...


def profile(
    results: Results,
    device: Device,
    target: Target,
    planned: Sequence[PlannedGraph],
    workloads: Sequence[Workload],
    build: Build,
    runtime: Runtime,
    *,
    rounds: int = 9,
    decode_steps: int = DECODE_STEPS,
    seed: int = 0,
    scratch: Path | None = None,
    progress: Progress = lambda done, total, description: None,
) -> None:
    """Time what the results lack, adding batch by batch: whatever stops it, the next call goes on from there.

    A shared machine has slow spells, in which small graphs lose more than large ones: some batches that fell into one
    are timed again at the end.
    The plan's graphs with role reference, the full model first, are in every batch, as far as they fit the memory.
    What was timed with another version of the runtime counts as lacking, and stays in the results. What comes to an
    earlier profile, graphs or workloads, gets the milliseconds that the references would have taken then.
    A graph that cannot be built, loaded or run is left out, and a ProfileError at the end names it. The files of a
    batch lie under `scratch`, by default the system's temporary folder, while it is timed.
    """
    references = [graph.shape for graph in planned if graph.role == "reference"]
    if not references:
        raise ValueError("a plan needs a graph with role reference, the full model, got none")
    if target.device_id != device.id:
        raise ValueError(f"the target must be on device {device.id}, got one on {target.device_id}")
    if target.runtime != runtime.name:
        raise ValueError(f"the target must name the runtime {runtime.name}, got {target.runtime}")
    check_precision(runtime, target.precision)
    results.add_device(device)
    memory_bytes = min(BATCH_MEMORY_BYTES, device.memory_bytes // 4 or BATCH_MEMORY_BYTES)
    beside = _references_in_memory(references, target.precision, memory_bytes)
    run = _Run(results, target, beside, build, runtime, rounds, decode_steps, scratch)
    pending = run.pending(planned, workloads)
    done = len(planned) - sum(map(len, pending.values()))
    progress(done, len(planned), f"{done} graphs are stored already")
    if not pending:
        return
    failures: list[tuple[PlannedGraph, Exception]] = []
    with tempfile.TemporaryDirectory(prefix="hw_profiles-", dir=scratch) as directory:
        needed = tokens_needed([*workloads, *run.known_ms(run.full)], decode_steps)
        sessions = {}
        for shape, session in zip(beside, run.load(beside, Path(directory), needed), strict=True):
            if isinstance(session, Exception):
                raise session
            sessions[shape.id] = session
        progress(done, len(planned), "timing the references")
        run.time_references(workloads, sessions, seed)
        pending = run.pending(planned, workloads)
        done = len(planned) - sum(map(len, pending.values()))
        batches = [(missing, batch) for missing, group in pending.items() for batch in run.batches(group, memory_bytes)]
        # in the plan's order, so that graphs timed on one workload are not all timed before those on another
        batches.sort(key=lambda missing_batch: planned.index(missing_batch[1][0]))
        left, again = deque(enumerate(batches)), len(batches) // POSTPONED_SHARE
        while left:
            number, (missing, batch) = left.popleft()
            progress(done, len(planned), "timing " + ", ".join(f"{graph.role} {graph.shape.id}" for graph in batch))
            found, failed = run.time_batch(batch, missing, sessions, seed + number)
            _free_memory()
            if run.in_another_state(found) and again:
                again -= 1
                left.append((number + len(batches), (missing, batch)))
                continue
            results.add_measurements(found)
            failures += failed
            done += len(batch) - len(failed)
        sessions.clear()  # before their files go
    progress(done, len(planned), "finished")
    if failures:
        graph, error = failures[0]
        raise ProfileError(
            f"{len(failures)} of {len(planned)} graphs could not be built, loaded or run for {target.key}, the first "
            f"being {graph.role} {graph.shape.id}: {error}; the others are stored, run again to retry"
        ) from error


@dataclass(frozen=True)
class _Run:
    """What stays the same over the batches of one call of `profile`."""

    results: Results
    target: Target
    #: Timed in every batch, the full model first.
    references: tuple[ModelShape, ...]
    build: Build
    runtime: Runtime
    rounds: int
    decode_steps: int
    scratch: Path | None
    #: What each reference took by what was stored before this call.
    earlier_ms: dict[tuple[str, Workload], float] = field(default_factory=dict, init=False)
    #: Of references: their speed now, relative to when what is stored was timed.
    speed: dict[tuple[str, Workload], float] = field(default_factory=dict)
    #: Geometric means of every batch timed by this call.
    references_ms: dict[Workload, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for shape in self.references:
            self.earlier_ms.update({(shape.id, work): value_ms for work, value_ms in self.known_ms(shape).items()})

    @property
    def full(self) -> ModelShape:
        return self.references[0]

    def pending(
        self, planned: Sequence[PlannedGraph], workloads: Sequence[Workload]
    ) -> dict[tuple[Workload, ...], list[PlannedGraph]]:
        """The graphs that the results lack, in groups that lack the same workloads."""
        stored = {
            (found.shape.id, found.role, found.workload)
            for found in self.results.measurements(self.target, reference_id=self.full.id)
            if found.runtime_version == self.runtime.version()
        }
        groups: dict[tuple[Workload, ...], list[PlannedGraph]] = {}
        for graph, wanted in zip(planned, workloads_of_graphs(planned, workloads), strict=True):
            missing = tuple(work for work in wanted if (graph.shape.id, graph.role, work) not in stored)
            if missing:
                groups.setdefault(missing, []).append(graph)
        return groups

    def known_ms(self, reference: ModelShape) -> dict[Workload, float]:
        """What it takes on the workloads that it was timed on."""
        return {
            found.workload: found.latency_ms
            for found in self.results.measurements(self.target, reference_id=self.full.id)
            if found.role == "reference"
            and found.shape == reference
            and found.runtime_version == self.runtime.version()
        }

    def time_references(self, workloads: Sequence[Workload], sessions: Mapping[str, Session], seed: int) -> None:
        """Time the references by themselves on what they lack; of what is not affordable that is the full model alone.

        Where the results know the full model, they are timed on the nearest of its workloads as well: the machine may
        be slower by now, and what the results hold is of one speed.
        """
        affordable = [work for work in dict.fromkeys(workloads) if is_affordable(work)]
        long = [work for work in dict.fromkeys(workloads) if not is_affordable(work)]
        for references, works in ((self.references, affordable), (self.references[:1], long)):
            known_ms = {shape.id: self.known_ms(shape) for shape in references}
            lacking = [work for work in works if any(work not in known for known in known_ms.values())]
            if not lacking:
                continue
            earlier = known_ms[self.full.id]
            near = {work: min(earlier, key=partial(doublings_apart, work)) for work in lacking if earlier}
            timings = measure(
                {name: sessions[name] for name in known_ms},
                tuple(known_ms),
                [*lacking, *near.values()],
                vocab_size=self.full.vocab_size,
                rounds=self.rounds if earlier else min(self.rounds, ALONE_ROUNDS),
                decode_steps=self.decode_steps,
                seed=seed,
            )
            for work, other in near.items():
                for name, known in known_ms.items():
                    like = name if other in known else self.full.id
                    self.speed[name, work] = known_ms[like][other] / timings[like, other].median_ms
            self.results.add_measurements(
                [
                    self._measurement(PlannedGraph(shape, "reference"), work, timings[shape.id, work])
                    for shape in references
                    for work in lacking
                ]
            )

    def batches(self, graphs: Sequence[PlannedGraph], memory_bytes: int) -> Iterator[list[PlannedGraph]]:
        """Consecutive graphs that fit the memory, at least one each, and no shape twice in one."""
        batch: list[PlannedGraph] = []
        batch_bytes = 0.0
        for graph in graphs:
            own_bytes = MEMORY_PER_WEIGHT_BYTE * graph.shape.weight_bytes(self.target.precision)
            if graph.shape in self.references:
                own_bytes = 0  # loaded anyway
            full = batch_bytes + own_bytes > memory_bytes or len(batch) == BATCH_GRAPHS
            if batch and (full or graph.shape in {other.shape for other in batch}):
                yield batch
                batch, batch_bytes = [], 0.0
            batch.append(graph)
            batch_bytes += own_bytes
        if batch:
            yield batch

    def load(self, shapes: Sequence[ModelShape], directory: Path, max_tokens: int) -> list[Session | Exception]:
        """Build the shapes, each in a folder of its own, and load them; where that fails, why."""

        def load_one(shape: ModelShape) -> Session | Exception:
            try:
                folder = directory / shape.id
                folder.mkdir(exist_ok=True)
                path = self.build(shape, self.target.precision, folder)
                return self.runtime.load(path, self.target.threads, max_tokens)
            except Exception as error:
                return error

        # OpenVINO compiles on one core, for two seconds a graph; nothing is timed meanwhile
        with ThreadPoolExecutor(min(self.target.threads, LOADED_AT_ONCE)) as pool:
            return list(pool.map(load_one, shapes))

    def time_batch(
        self,
        batch: Sequence[PlannedGraph],
        workloads: Sequence[Workload],
        references: Mapping[str, Session],
        seed: int,
    ) -> tuple[list[Measurement], list[tuple[PlannedGraph, Exception]]]:
        """Build, load and time a batch; also returns the graphs that could not be built, loaded or run, and why."""
        found: list[Measurement] = []
        failed: list[tuple[PlannedGraph, Exception]] = []
        sessions = dict(references)
        max_tokens = tokens_needed(workloads, self.decode_steps)
        with tempfile.TemporaryDirectory(prefix="hw_profiles-", dir=self.scratch) as directory:
            missing = [graph for graph in batch if graph.shape.id not in sessions]
            loaded_now = self.load([graph.shape for graph in missing], Path(directory), max_tokens)
            for graph, session in zip(missing, loaded_now, strict=True):
                if isinstance(session, Exception):
                    failed.append((graph, session))
                else:
                    sessions[graph.shape.id] = session
            loaded = [graph for graph in batch if graph.shape.id in sessions]
            error: Exception | None = None
            if loaded:
                try:
                    found = self._measurements(loaded, sessions, workloads, seed)
                except Exception as raised:  # what a runtime raises while it runs is its own affair
                    error = raised
            sessions.clear()  # before their files go
        if error is not None and len(loaded) > 1:  # by one of them
            for graph in loaded:
                alone, why = self.time_batch([graph], workloads, references, seed)
                found += alone
                failed += why
        elif error is not None:
            failed.append((loaded[0], error))
        return found, failed

    def in_another_state(self, found: Sequence[Measurement]) -> bool:
        """Whether the references took much more or less time on some workload than in the median batch before."""
        batch_ms = {m.workload: statistics.geometric_mean(m.references_ms.values()) for m in found}
        earlier = {work: self.references_ms.setdefault(work, []) for work in batch_ms}
        ratios = [batch_ms[work] / statistics.median(ms) for work, ms in earlier.items() if len(ms) >= STATE_BATCHES]
        for work, value_ms in batch_ms.items():
            self.references_ms[work].append(value_ms)
        return any(max(ratio, 1 / ratio) > STATE_RATIO for ratio in ratios)

    def _measurements(
        self, graphs: Sequence[PlannedGraph], sessions: dict[str, Session], workloads: Sequence[Workload], seed: int
    ) -> list[Measurement]:
        timings = measure(
            sessions,
            [shape.id for shape in self.references],
            workloads,
            vocab_size=self.full.vocab_size,
            rounds=self.rounds,
            decode_steps=self.decode_steps,
            seed=seed,
        )
        for work in workloads:
            for name, now_ms in timings[self.full.id, work].references_ms.items():
                if (name, work) in self.earlier_ms:
                    self.speed.setdefault((name, work), self.earlier_ms[name, work] / now_ms)
        return [self._measurement(graph, work, timings[graph.shape.id, work]) for graph in graphs for work in workloads]

    def _measurement(self, graph: PlannedGraph, workload: Workload, timing: Timing) -> Measurement:
        return Measurement(
            target=self.target,
            shape=graph.shape,
            workload=workload,
            role=graph.role,
            reference_id=self.full.id,
            ratio=timing.ratio,
            spread_ratio=timing.spread_ratio,
            repeats=timing.repeats,
            references_ms={
                name: value_ms * self.speed.get((name, workload), 1.0)
                for name, value_ms in timing.references_ms.items()
            },
            runtime_version=self.runtime.version(),
            affinity=affinity(),
        )


def _references_in_memory(
    references: Sequence[ModelShape], precision: Precision, memory_bytes: int
) -> tuple[ModelShape, ...]:
    """The first, and of the others as many as together fit the memory, from the smallest."""
    full, *others = references
    taken_bytes = 0.0
    fitting = {full}
    for shape in sorted(others, key=lambda shape: shape.parameters):
        taken_bytes += MEMORY_PER_WEIGHT_BYTE * shape.weight_bytes(precision)
        if taken_bytes <= memory_bytes:
            fitting.add(shape)
    return tuple(shape for shape in references if shape in fitting)


def part_of(progress: Progress, number: int, parts: int, title: str) -> Progress:
    """Tells of part `number` of `parts` equal ones as progress of the whole."""
    return lambda done, total, what: progress(number * total + done, parts * total, f"{title}: {what}")


def repeat_noise(measurements: Sequence[Measurement]) -> float | None:
    """Median of |second / first - 1| over the shapes timed twice, None without any: no predictor can do better.

    The measurements are those of one target and workload; each version of the runtime is compared with itself.
    """

    def graph(found: Measurement) -> tuple[str, ModelShape, str]:
        return found.reference_id, found.shape, found.runtime_version

    first = {graph(found): found.latency_ms for found in measurements if found.role == "heldout"}
    changes = [
        abs(again.latency_ms / first[graph(again)] - 1)
        for again in measurements
        if again.role == "repeat" and graph(again) in first
    ]
    return statistics.median(changes) if changes else None


def _free_memory() -> None:
    """Give the freed sessions' memory back to the system, which glibc does not do by itself."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
