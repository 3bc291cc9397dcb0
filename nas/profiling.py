"""Profile a device for a model: the space's shapes, the exporter's writers and the profiler brought together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export import BUILDERS, FORMAT_OF_RUNTIME, ProfiledReferences
from export.artefact import Format
from export.decoder import TIMED_POSITIONS
from hw_profiles import Device, ModelShape, PlannedGraph, Store, Target, Workload, detect, plan
from hw_profiles.measured import read_measured
from hw_profiles.measurement import FINALIST_ROLES, Role
from hw_profiles.memory import can_measure_memory, profile_memory
from hw_profiles.pack import PackPlan, write_pack
from hw_profiles.profile import Progress, part_of, profile
from hw_profiles.references import reference_shapes
from hw_profiles.runtimes import Runtime, check_precision, engine_of, runtime
from hw_profiles.shapes import Precision
from hw_profiles.timing import DECODE_STEPS
from nas.families import load_config
from nas.fitted import fitted_predictor, priors
from nas.latency import TRAINING_ROLES, ProfileMissingError
from nas.memory import MemoryProfile, memory_profile
from nas.sampling import ANCHORS_AT_ONCE, Sampling
from nas.space import SearchSpace

_LEAST_MIXED = 2
#: That are timed where none are asked for.
PROMPT_TOKENS = (16, 128, 512)
CONTEXT_TOKENS = (0, 128, 1024)
#: More than a profile's: a budget hangs on them. Two standard errors of eight rounds of decode are about 4 % here.
FINALIST_ROUNDS = 8


def profiled_space(model: str, *, query_heads: bool = False) -> SearchSpace:
    """What a profile covers: the blocks of the default space, if asked for with fewer query heads as well."""
    return SearchSpace.from_config(load_config(model), query_heads=query_heads)


def workloads_of(
    space: SearchSpace, prompts: Sequence[int] | None, contexts: Sequence[int] | None, batch_sizes: Sequence[int]
) -> list[Workload]:
    """Prefill of each prompt length and decode on each context length, at each batch size.

    None for the default lengths, as far as the model's positions reach where it has a learned embedding of them.
    ValueError for lengths beyond, and beyond what graphs for timing have positions for.
    """
    positions = space.base.learned_positions or TIMED_POSITIONS
    given = [length for length in (*(prompts or ()), *(1 + context for context in contexts or ())) if length]
    if max(given, default=0) > positions:
        raise ValueError(
            f"wanted prompts of at most {positions} tokens and contexts of at most {positions - 1}, the positions that "
            f"graphs of this model are timed with, got {max(given)} tokens; ask for less"
        )
    if prompts is None:
        prompts = [min(tokens, positions) for tokens in PROMPT_TOKENS]
    if contexts is None:
        contexts = [min(tokens, positions - 1) for tokens in CONTEXT_TOKENS]
    prefills = [Workload("prefill", tokens, batch) for batch in batch_sizes for tokens in prompts]
    decodes = [Workload("decode", tokens, batch) for batch in batch_sizes for tokens in contexts]
    return list(dict.fromkeys(prefills + decodes))


def profile_targets(
    store: Store,
    space: SearchSpace,
    engines: Sequence[Runtime],
    precisions: Sequence[Precision],
    threads: int,
    workloads: Sequence[Workload],
    *,
    counts: Mapping[str, int],
    rounds: int,
    seed: int,
    transfer_from: str | None = None,
    progress: Progress = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Time planned graphs on every engine and precision, and anchors for as long as they help.

    `counts` are those of `hw_profiles.plan`, of which `anchors` are the most.
    With `transfer_from`, the id of a device or `auto`, only the full model and random graphs are timed: predictors lean
    on a profile of that device, or of any. Raises ProfileMissingError, before anything is timed, where there is none.
    """
    device = detect()
    targets = [(engine, Target(device.id, engine.name, p, threads)) for engine in engines for p in precisions]
    if transfer_from is not None:
        for engine, target in targets:
            check_transfer(store, target, engine.version(), space.base, workloads, transfer_from)
    for engine, target in targets:  # before hours of timing, not in between
        check_precision(engine, target.precision)
    rows = []
    for number, (engine, target) in enumerate(targets):
        timed = profile_target(
            store,
            target,
            engine,
            space,
            workloads,
            counts=counts,
            rounds=rounds,
            seed=seed,
            leaning=transfer_from is not None,
            progress=part_of(progress, number, len(targets), target.key),
        )
        rows += [
            {
                "target": target.key,
                "phase": workload.phase,
                "tokens": workload.tokens,
                "batch_size": workload.batch_size,
                "full_ms": full_latency_ms(store, target, engine.version(), workload, space.base),
                "graphs": timed,
                **(transferred(store, target, engine.version(), space.base, workload) if transfer_from else {}),
            }
            for workload in workloads
        ]
    return rows


def profile_target(
    store: Store,
    target: Target,
    engine: Runtime,
    space: SearchSpace,
    workloads: Sequence[Workload],
    *,
    counts: Mapping[str, int],
    rounds: int,
    seed: int,
    leaning: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> int:
    """Time one target; returns the number of graphs timed.

    A few random anchors come first; `nas.sampling` says which others follow, and when they stop to help.
    A target that is `leaning` on another profile has its anchors at once, and no table.
    """
    timed = first_graphs(space, target.precision, counts=counts, seed=seed, leaning=leaning)
    most = len(timed) + counts["anchors"] - sum(g.role == "anchor" and not g.shape.is_mixed for g in timed)

    def time_planned(graphs: Sequence[PlannedGraph]) -> None:
        def of_all(done: int, total: int, what: str) -> None:
            progress(done, most, what)

        time_graphs(store, target, engine, graphs, workloads, rounds=rounds, seed=seed, progress=of_all)

    time_planned(timed)
    if len(timed) < most:
        sampling = Sampling(store, target, engine.version(), space)
        # chosen once: what follows must not depend on how far an interrupted run came
        anchors = sampling.further_anchors(timed, most - len(timed), seed)
        while anchors and sampling.may_still_help(timed):
            timed = timed + [PlannedGraph(shape, "anchor") for shape in anchors[:ANCHORS_AT_ONCE]]
            anchors = anchors[ANCHORS_AT_ONCE:]
            time_planned(timed)
    progress(len(timed), len(timed), "finished")
    return len(timed)


def first_graphs(
    space: SearchSpace, precision: Precision, *, counts: Mapping[str, int], seed: int, leaning: bool = False
) -> list[PlannedGraph]:
    """What a profile times before it chooses further anchors."""
    first = counts if leaning else {**counts, "anchors": min(counts["anchors"], ANCHORS_AT_ONCE)}
    return plan(
        space.base, space.block_choices(), **first, mixed=_mixed_graphs(precision, counts), with_table=not leaning,
        seed=seed,
    )  # fmt: skip


def _mixed_graphs(precision: Precision, counts: Mapping[str, int]) -> int:
    """Anchors with bits of their own, and as many held-out graphs: half of what has the bits of the precision."""
    return max(_LEAST_MIXED, counts["heldout"] // 2) if precision == "int4" else 0


def check_transfer(
    store: Store,
    target: Target,
    runtime_version: str,
    full: ModelShape,
    workloads: Sequence[Workload],
    transfer_from: str,
) -> None:
    """ProfileMissingError unless a profile of that device, or of any with `auto`, covers every workload."""
    for workload in workloads:
        known = priors(store, target, runtime_version, full.id, workload.phase, TRAINING_ROLES)
        known = [p for p in known if transfer_from in ("auto", p.provenance.target.partition("/")[0])]
        if not any(prior.provenance.covers(workload) for prior in known):
            raise ProfileMissingError(
                f"--transfer-from {transfer_from} needs a profile of {target.runtime} at {target.precision}, this "
                f"model and {workload.phase} at {workload.tokens} tokens, got none; run nas profile without it, there "
                "or here"
            )


def transferred(
    store: Store, target: Target, runtime_version: str, full: ModelShape, workload: Workload
) -> dict[str, Any]:
    """Which profile the predictor of this phase leans on, None for its own alone, and its cross-validated error."""
    training = [
        m
        for m in store.measurements(target, None, TRAINING_ROLES, full.id, runtime_version)
        if m.workload.phase == workload.phase
    ]
    predictor = fitted_predictor(store, training, TRAINING_ROLES)
    leans_on = None
    if predictor.prior is not None:
        leans_on = f"{predictor.prior.provenance.target} {predictor.prior.provenance.runtime_version}"
    return {"leans_on": leans_on, "held_out_error": predictor.provenance.held_out_error}


def profile_memories(
    store: Store,
    space: SearchSpace,
    engines: Sequence[Runtime],
    precisions: Sequence[Precision],
    threads: int,
    workloads: Sequence[Workload],
    *,
    counts: Mapping[str, int],
    seed: int,
    graphs: int,
    progress: Progress = lambda done, total, what: None,
) -> list[MemoryProfile]:
    """Measure the memory of about `graphs` of the graphs that `counts` plan, on every engine and precision.

    Empty where the system cannot tell it, or for 0 graphs.
    """
    if not graphs or not can_measure_memory():
        return []
    planned = plan(space.base, space.block_choices(), **counts, with_table=True, seed=seed)
    device = detect()
    store.add_device(device)
    targets = [(engine, Target(device.id, engine.name, p, threads)) for engine in engines for p in precisions]
    for number, (engine, target) in enumerate(targets):
        profile_memory(
            store, target, engine.version(), planned, workloads, BUILDERS[engine_of(engine.name)],
            graphs=graphs, progress=part_of(progress, number, len(targets), target.key),
        )  # fmt: skip
    found = (memory_profile(store, target, space.base) for _, target in targets)
    return [profile for profile in found if profile is not None]


def pack_targets(
    path: Path,
    space: SearchSpace,
    runtimes: Sequence[str],
    precisions: Sequence[Precision],
    threads: int | None,
    workloads: Sequence[Workload],
    *,
    counts: Mapping[str, int],
    rounds: int,
    seed: int,
    memory_graphs: int = 0,
    with_table: bool = True,
    progress: Progress = lambda done, total, what: None,
) -> PackPlan:
    """Write what `profile_targets` would time into one zip file, for `python -m hw_profiles run` on another device."""
    mixed = max(_mixed_graphs(precision, counts) for precision in precisions)
    made = PackPlan(
        targets=tuple((runtime, precision) for runtime in runtimes for precision in precisions),
        graphs=tuple(plan(space.base, space.block_choices(), **counts, mixed=mixed, with_table=with_table, seed=seed)),
        workloads=tuple(workloads),
        rounds=rounds,
        decode_steps=DECODE_STEPS,
        seed=seed,
        threads=threads,
        memory_graphs=memory_graphs,
    )
    write_pack(path, made, BUILDERS, progress)
    return made


def import_measured(
    store: Store, path: Path, model: str | None = None
) -> tuple[Device, list[dict[str, Any]], list[MemoryProfile]]:
    """Take a file that `python -m hw_profiles run` wrote into the database; what is there already stays as it is.

    Returns the device, a row for each target and workload, and what there is of the memory of each target.
    Nothing is stored unless all of the file is valid and, where a model is given, of that model.
    """
    measured = read_measured(path)
    if not measured.measurements:
        raise ValueError(f"{path} must hold measurements, got none; let the pack run on that device first")
    if model is not None and profiled_space(model).base != measured.reference:
        raise ValueError(f"{path} must be of {model}, got another model; leave MODEL out or import another file")
    store.add_device(measured.device)
    store.add_measurements(measured.measurements)
    store.add_memory_measurements(measured.memory)
    rows = [
        {
            "target": target.key,
            "phase": workload.phase,
            "tokens": workload.tokens,
            "batch_size": workload.batch_size,
            "full_ms": full_latency_ms(store, target, version, workload, measured.reference),
            "graphs": count,
        }
        for (target, version, workload), count in Counter(
            (found.target, found.runtime_version, found.workload) for found in measured.measurements
        ).items()
    ]
    targets = sorted({found.target for found in measured.memory})
    memories = (memory_profile(store, target, measured.reference) for target in targets)
    return measured.device, rows, [profile for profile in memories if profile is not None]


def measure_finalists(
    store: Store,
    target: Target,
    engine: Runtime,
    full: ModelShape,
    shapes: Sequence[ModelShape],
    role: Role,
    workloads: Sequence[Workload],
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Time candidate answers beside the profile's references, FINALIST_ROUNDS times."""
    references = [PlannedGraph(shape, "reference") for shape in reference_shapes(full)]
    planned = [*references, *(PlannedGraph(shape, role) for shape in shapes)]
    seed = FINALIST_ROLES.index(role) + 1
    time_graphs(store, target, engine, planned, workloads, rounds=FINALIST_ROUNDS, seed=seed, progress=progress)


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
        store, detect(), target, planned, workloads, BUILDERS[engine_of(engine.name)], engine,
        rounds=rounds, seed=seed, progress=progress,
    )  # fmt: skip


def full_latency_ms(store: Store, target: Target, runtime_version: str, workload: Workload, full: ModelShape) -> float:
    """The full model's own latency in a profile."""
    found = store.measurements(target, workload, ["reference"], full.id, runtime_version)
    return next(m.latency_ms for m in found if m.is_full_model)


def profiled_references(
    store: Store,
    full: ModelShape,
    wanted: Iterable[tuple[Format, Precision]],
    threads: int,
    workloads: Sequence[Workload],
) -> dict[tuple[Format, Precision], ProfiledReferences]:
    """The references as this device's profile with the installed runtimes knows them, for formats that one reads.

    Raises ProfileMissingError where one of the workloads is not in it.
    """
    references = {}
    for format_, precision in wanted:
        for name in (name for name, read in FORMAT_OF_RUNTIME.items() if read == format_):
            version, target = runtime(name).version(), Target(detect().id, name, precision, threads)
            found = store.measurements(target, roles=["reference"], reference_id=full.id, runtime_version=version)
            profile_ms = {m.workload: m.profile_ms or m.references_ms for m in found}
            for workload in workloads:
                if workload not in profile_ms:
                    raise ProfileMissingError(
                        f"{target.key} was not profiled for {workload.phase} at {workload.tokens} tokens with {name} "
                        f"{version}; run nas profile, or leave --study out to judge by the clock alone"
                    )
            names = {name for of_workload in profile_ms.values() for name in of_workload}
            shapes = tuple(shape for shape in dict.fromkeys(m.shape for m in found) if shape.id in names)
            references[format_, precision] = ProfiledReferences(shapes, profile_ms)
    return references
