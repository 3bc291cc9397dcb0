"""Peak memory of a graph on a workload, each measured in a process of its own: `python -m hw_profiles.memory`.

The process imports numpy and one runtime, loads the file, runs the workload and prints one JSON object. A peak belongs
to a process from its start on, so one that had measured anything before could not tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hw_profiles.devices import Target
from hw_profiles.energy import EnergyMeter
from hw_profiles.measurement import MemoryMeasurement
from hw_profiles.planning import PlannedGraph
from hw_profiles.profile import Build, ProfileError, Progress
from hw_profiles.runtimes import Session, runtime
from hw_profiles.shapes import PHASES, Workload

#: The kernel's own account of the largest resident set. Not `getrusage`: there a child begins with its parent's peak.
_STATUS = Path("/proc/self/status")
#: Every process begins with a prompt this short, and a context is fed in pieces of as many tokens. OpenVINO packs the
#: weights once more for steps of 8 to 64 tokens: one that has only seen long prompts holds less than it once will.
SHORT_PROMPT_TOKENS = 16
#: Single tokens after the prompt or the context.
DECODE_STEPS = 4
#: Energy is that of steps for about this long: the counters tick once a millisecond.
_ENERGY_S = 0.5
_ENERGY_STEPS = 64
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Footprint:
    """What one process held at most, what it held before it loaded the model, and the energy of one step."""

    peak_bytes: int
    baseline_bytes: int
    step_joules: float | None = None


#: Measures a model file, or the folder that holds one: (runtime's name, path, threads, workload, vocabulary size).
Measure = Callable[[str, Path, int, Workload, int], Footprint]


def can_measure_memory() -> bool:
    """Whether this system tells a process its largest resident set, as Linux does."""
    return _STATUS.is_file()


def measure_memory(runtime_name: str, path: Path, threads: int, workload: Workload, vocab_size: int) -> Footprint:
    """Run one workload in a fresh process.

    RuntimeError where that fails, OSError where the system does not tell a process its peak.
    """
    if not can_measure_memory():
        raise OSError(f"memory is measured through {_STATUS}, which only Linux has; measure on Linux")
    package_parent = str(Path(__file__).resolve().parents[1])
    numbers = (threads, vocab_size, workload.tokens, workload.batch_size, workload.phase)
    search_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "hw_profiles.memory", runtime_name, str(path), *map(str, numbers)],
        env=os.environ | {"PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = "it was killed, perhaps for want of memory" if done.returncode < 0 else lines[-1] if lines else "?"
        raise RuntimeError(
            f"{path} could not be run in a process of its own for {workload.phase} at {workload.tokens} tokens: "
            f"{reason}"
        )
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


class MemoryResults(Protocol):
    """Where measurements of memory go and are found again: the database (`Store`) or one file (`MeasuredFile`)."""

    def memory_measurements(self, target: Target, *, reference_id: str) -> list[MemoryMeasurement]: ...

    def add_memory_measurements(self, measurements: Sequence[MemoryMeasurement]) -> None: ...


def memory_plan(
    planned: Sequence[PlannedGraph], workloads: Sequence[Workload], graphs: int
) -> list[tuple[PlannedGraph, tuple[Workload, ...]]]:
    """About `graphs` of the planned ones, a quarter of them held out, from the smallest to the largest, and for what.

    Memory is nearly linear in what a graph holds, so of each phase only the smallest and the largest workload count,
    and graphs with bits of their own are left out.
    The full model is measured on all of these, held-out graphs on the largest, the others in turn on one of each phase.
    """
    if graphs < 1:
        return []
    planned = [graph for graph in planned if not graph.shape.is_mixed]
    extremes = {phase: _smallest_and_largest(workloads, phase) for phase in PHASES}
    everything = tuple(work for works in extremes.values() for work in works)
    largest = tuple(works[-1] for works in extremes.values() if works)
    heldout = _spread([graph for graph in planned if graph.role == "heldout"], graphs // 4)
    others = _spread([graph for graph in planned if graph.role in ("table", "anchor")], graphs - 1 - len(heldout))
    made = [(graph, everything) for graph in planned if graph.role == "reference"][:1]
    for i, graph in enumerate(others):
        turns = {"prefill": i, "decode": i // 2}
        made.append((graph, tuple(works[turns[phase] % len(works)] for phase, works in extremes.items() if works)))
    return made + [(graph, largest) for graph in heldout]


def _smallest_and_largest(workloads: Sequence[Workload], phase: str) -> tuple[Workload, ...]:
    found = sorted((w for w in workloads if w.phase == phase), key=lambda w: (w.tokens * w.batch_size, w))
    return tuple(dict.fromkeys([found[0], found[-1]])) if found else ()


def _spread(graphs: Sequence[PlannedGraph], count: int) -> list[PlannedGraph]:
    """`count` of them from the smallest to the largest in parameters, evenly spaced in that order."""
    in_order = sorted(graphs, key=lambda graph: (graph.shape.parameters, graph.shape.id))
    places = np.linspace(0, len(in_order) - 1, min(count, len(in_order))).round().astype(int)
    return [in_order[place] for place in places]


def profile_memory(
    results: MemoryResults,
    target: Target,
    runtime_version: str,
    planned: Sequence[PlannedGraph],
    workloads: Sequence[Workload],
    build: Build,
    *,
    graphs: int,
    measure: Measure = measure_memory,
    scratch: Path | None = None,
    progress: Progress = lambda done, total, description: None,
) -> None:
    """Measure what the results lack of `memory_plan`, adding graph by graph: a later call goes on from there.

    A graph that cannot be built or run is left out, and a ProfileError at the end names it. Its files lie under
    `scratch`, by default the system's temporary folder, while it is measured.
    """
    full = next(graph.shape for graph in planned if graph.role == "reference")
    stored = {
        (found.shape, found.role, found.workload)
        for found in results.memory_measurements(target, reference_id=full.id)
        if found.runtime_version == runtime_version
    }
    chosen = memory_plan(planned, workloads, graphs)
    failures: list[tuple[PlannedGraph, Exception]] = []
    for done, (graph, wanted) in enumerate(chosen):
        missing = [work for work in wanted if (graph.shape, graph.role, work) not in stored]
        if not missing:
            continue
        progress(done, len(chosen), f"memory of {graph.role} {graph.shape.id}")
        try:
            with tempfile.TemporaryDirectory(prefix="hw_profiles-", dir=scratch) as directory:
                path = build(graph.shape, target.precision, Path(directory))
                footprints = [measure(target.runtime, path, target.threads, w, graph.shape.vocab_size) for w in missing]
        except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            failures.append((graph, error))
            continue
        results.add_memory_measurements(
            [
                MemoryMeasurement(
                    target=target,
                    shape=graph.shape,
                    workload=work,
                    role=graph.role,
                    reference_id=full.id,
                    peak_bytes=footprint.peak_bytes,
                    baseline_bytes=footprint.baseline_bytes,
                    runtime_version=runtime_version,
                    step_joules=footprint.step_joules,
                )
                for work, footprint in zip(missing, footprints, strict=True)
            ]
        )
    progress(len(chosen), len(chosen), "finished")
    if failures:
        graph, failure = failures[0]
        raise ProfileError(
            f"the memory of {len(failures)} of {len(chosen)} graphs could not be measured for {target.key}, the first "
            f"being {graph.role} {graph.shape.id}: {failure}; the others are stored, run again to retry"
        ) from failure


def fed_at_once(workload: Workload) -> int:
    """Tokens of each sequence in the largest step, at least those of the short prompt: a context is fed in pieces.

    The context of several sequences is fed whole, as a prompt is: ONNX Runtime goes on with one token of each only.
    """
    if workload.phase == "decode" and workload.batch_size == 1:
        return SHORT_PROMPT_TOKENS
    return max(SHORT_PROMPT_TOKENS, workload.tokens)


def _footprint(runtime_name: str, path: Path, threads: int, workload: Workload, vocab_size: int) -> Footprint:
    """Of this process, which must have done nothing else before."""
    engine = runtime(runtime_name)
    baseline_bytes = _peak_bytes()
    meter = EnergyMeter.find()
    prompt, steps = workload.tokens, DECODE_STEPS + (_ENERGY_STEPS if meter else 0)
    length = max(SHORT_PROMPT_TOKENS, prompt + steps)
    ids = np.random.default_rng(0).integers(0, vocab_size, (workload.batch_size, length), np.int64)
    session = engine.load(path, threads, length)
    session.step(ids[:, :SHORT_PROMPT_TOKENS])
    session.reset()
    piece = fed_at_once(workload)
    for start in range(0, prompt, piece):
        session.step(ids[:, start : min(start + piece, prompt)])
    for i in range(prompt, prompt + DECODE_STEPS):
        session.step(ids[:, i : i + 1])
    peak_bytes = _peak_bytes()
    return Footprint(peak_bytes, baseline_bytes, _step_joules(meter, session, workload, ids) if meter else None)


def _step_joules(meter: EnergyMeter, session: Session, workload: Workload, ids: NDArray[np.int64]) -> float:
    """Mean energy of one step; `ids` [B, S] are all that the session has room for, the last _ENERGY_STEPS unfed."""
    steps = 0

    def prompts() -> None:
        nonlocal steps
        end_s = time.monotonic() + _ENERGY_S
        while not steps or time.monotonic() < end_s:
            session.reset()
            session.step(ids[:, : workload.tokens])
            steps += 1

    def tokens() -> None:
        nonlocal steps
        for i in range(ids.shape[1] - _ENERGY_STEPS, ids.shape[1]):
            session.step(ids[:, i : i + 1])
            steps += 1

    used_joules = meter.joules(prompts if workload.phase == "prefill" else tokens)
    return used_joules / steps


def _peak_bytes() -> int:
    """The largest resident set that this process has had."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise OSError(f"wanted a line VmHWM in {_STATUS}, got none; this system cannot tell a process its peak")


def main(arguments: Sequence[str]) -> None:
    runtime_name, path, *numbers, phase = arguments
    threads, vocab_size, tokens, batch_size = map(int, numbers)
    workload = Workload("prefill" if phase == "prefill" else "decode", tokens, batch_size)
    print(json.dumps(asdict(_footprint(runtime_name, Path(path), threads, workload, vocab_size))))


if __name__ == "__main__":
    main(sys.argv[1:])
