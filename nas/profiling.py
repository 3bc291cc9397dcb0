"""Profile a device for a model: the space's shapes, the exporter's writers and the profiler brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export import BUILDERS
from hw_profiles import ModelShape, PlannedGraph, Store, Target, Workload, detect, plan
from hw_profiles.profile import Progress, profile
from hw_profiles.runtimes import Runtime
from hw_profiles.shapes import Precision
from nas.families import load_config
from nas.space import SearchSpace


def profile_targets(
    store: Store,
    model: str,
    engines: Sequence[Runtime],
    precisions: Sequence[Precision],
    threads: int,
    workloads: Sequence[Workload],
    *,
    counts: Mapping[str, int],
    rounds: int,
    seed: int,
    progress: Progress = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Time the same planned graphs on every engine and precision; `counts` are those of `hw_profiles.plan`."""
    space = SearchSpace.from_config(load_config(model))
    planned = plan(space.base, space.block_choices(), **counts, seed=seed)
    device = detect()
    targets = [(engine, Target(device.id, engine.name, p, threads)) for engine in engines for p in precisions]
    for number, (engine, target) in enumerate(targets):
        time_graphs(
            store,
            target,
            engine,
            planned,
            workloads,
            rounds=rounds,
            seed=seed,
            progress=lambda done, total, what, number=number, target=target: progress(  # type: ignore[misc]
                number * total + done, len(targets) * total, f"{target.key}: {what}"
            ),
        )
    return [
        {
            "target": target.key,
            "phase": workload.phase,
            "tokens": workload.tokens,
            "full_ms": full_latency_ms(store, target, engine.version(), workload, space.base),
            "graphs": len(planned),
        }
        for engine, target in targets
        for workload in workloads
    ]


def measure_finalists(
    store: Store,
    target: Target,
    engine: Runtime,
    full: ModelShape,
    shapes: Sequence[ModelShape],
    workloads: Sequence[Workload],
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Time candidate answers beside the full model, with more rounds than a profile: a budget hangs on them."""
    planned = [PlannedGraph(full, "reference"), *(PlannedGraph(shape, "finalist") for shape in shapes)]
    time_graphs(store, target, engine, planned, workloads, rounds=15, seed=1, progress=progress)


def time_graphs(
    store: Store,
    target: Target,
    engine: Runtime,
    planned: Sequence[PlannedGraph],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    seed: int,
    progress: Progress,
) -> None:
    """`hw_profiles.profile` with the files that export writes."""
    profile(
        store, detect(), target, planned, workloads, BUILDERS[engine.name], engine,
        rounds=rounds, seed=seed, progress=progress,
    )  # fmt: skip


def full_latency_ms(store: Store, target: Target, runtime_version: str, workload: Workload, full: ModelShape) -> float:
    """The full model's own latency in a profile."""
    (reference,) = store.measurements(target, workload, ["reference"], full.id, runtime_version)
    return reference.latency_ms
