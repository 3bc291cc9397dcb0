"""Which measurements still hold: no predictor mixes versions of a runtime, or is of another than the installed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hw_profiles.devices import Target, detect
from hw_profiles.measurement import Measurement
from hw_profiles.profile import repeat_noise
from hw_profiles.runtimes import RUNTIMES, engine_of, runtime
from hw_profiles.shapes import Workload
from hw_profiles.store import Store

#: Every profile of a model times these same graphs; the random ones depend on its options, finalists on queries.
_ALWAYS_TIMED = ("reference", "table")


class StaleProfileError(ValueError):
    """A profile mixes versions of the runtime, or is of another one than the installed."""


def usable(measurements: Sequence[Measurement], installed: str | None, allow_stale: bool = False) -> list[Measurement]:
    """What one predictor may learn from, in the order given: measurements of one version of the runtime.

    `measurements` are all there are of one device, runtime, model and workload, at any precisions; `installed` is the
    runtime's version where they were made, or None where nobody can tell, as for another device: then the version
    profiled last counts. Raises StaleProfileError if a precision was profiled, wholly or in part, with another version
    only. With `allow_stale` such measurements stand in for those that are missing.
    """
    profiled = [found for found in measurements if found.role in _ALWAYS_TIMED] or measurements
    if not profiled:
        return []
    wanted = installed or max(profiled, key=lambda found: found.created_at).runtime_version
    best: dict[object, Measurement] = {}
    for found in measurements:
        if (graph := _graph(found)) not in best or _rank(found, wanted) > _rank(best[graph], wanted):
            best[graph] = found
    chosen = [found for found in measurements if best[_graph(found)] is found]
    if allow_stale:
        return chosen
    # a profile that leans on another has no table; of one that will have it, anchors may come first
    of_wanted = [found for found in chosen if found.runtime_version == wanted]
    anchored, with_table = (
        {(m.target, m.workload) for m in of_wanted if m.role == role} for role in ("anchor", "table")
    )
    whole = anchored - with_table
    outdated = [
        found
        for found in chosen
        if found.role in _ALWAYS_TIMED
        and found.runtime_version != wanted
        and (found.target, found.workload) not in whole
    ]
    if outdated:
        raise StaleProfileError(_complaint(outdated, wanted, installed is not None))
    return of_wanted


def _graph(found: Measurement) -> object:
    return found.target, found.workload, found.reference_id, found.shape, found.role


def _rank(found: Measurement, wanted: str) -> tuple[bool, datetime]:
    return found.runtime_version == wanted, found.created_at


def _complaint(outdated: Sequence[Measurement], wanted: str, is_installed: bool) -> str:
    targets = sorted({found.target for found in outdated})
    versions = sorted({found.runtime_version for found in outdated})
    first, work = targets[0], outdated[0].workload
    tokens = "--context-tokens" if work.phase == "decode" else "--prompt-tokens"
    precisions = " ".join(f"--precision {target.precision}" for target in targets)
    return (
        f"{', '.join(target.key for target in targets)}: {work.phase} at {work.tokens} tokens was profiled with "
        f"{first.runtime} {' and '.join(versions)}, but {wanted} is "
        f"{'installed' if is_installed else 'the version of the rest of the profile'}; run nas profile "
        f"--runtime {first.runtime} {precisions} --threads {first.threads} {tokens} {work.tokens} again, "
        "or give --allow-stale"
    )


def installed_version(runtime_name: str, device_id: str) -> str | None:
    """The version of a runtime on a device: None if that is not this device, or if the runtime is not installed."""
    engine = engine_of(runtime_name)
    if device_id != detect().id or engine not in RUNTIMES:
        return None
    try:
        return runtime(engine).version()
    except ImportError:
        return None


@dataclass(frozen=True)
class ProfileSummary:
    """What is profiled for a target with `runtime_version`, the one that counts now, over all models and workloads.

    `graphs` and `memory_graphs` count different shapes, timed and run for their memory; `repeat_noise` is by workload,
    without those of which no graph was timed twice.
    """

    target: Target
    graphs: int
    measurements: int
    workloads: tuple[Workload, ...]
    runtime_version: str
    last: datetime
    repeat_noise: Mapping[Workload, float]
    memory_graphs: int
    is_stale: bool


def summarise(store: Store, target: Target, installed: str | None) -> ProfileSummary:
    """Of a target with at least one measurement. It is stale if any of its models and workloads is."""
    everything = store.measurements(target)
    last = max(everything, key=lambda found: found.created_at)
    versions = {found.runtime_version for found in everything}
    version = installed if installed in versions else last.runtime_version
    counted = [found for found in everything if found.runtime_version == version]
    workloads = tuple(sorted({found.workload for found in counted}, key=lambda work: (work.phase, work.tokens)))
    noises = {work: repeat_noise([found for found in counted if found.workload == work]) for work in workloads}
    in_memory = {m.shape for m in store.memory_measurements(target) if m.runtime_version == version}
    return ProfileSummary(
        target=target,
        graphs=len({found.shape for found in counted}),
        measurements=len(counted),
        workloads=workloads,
        runtime_version=version,
        last=max(found.created_at for found in counted),
        repeat_noise={work: noise for work, noise in noises.items() if noise is not None},
        memory_graphs=len(in_memory),
        is_stale=installed is not None and _is_stale(everything, installed),
    )


def _is_stale(measurements: Sequence[Measurement], installed: str) -> bool:
    groups: dict[object, list[Measurement]] = {}
    for found in measurements:
        groups.setdefault((found.reference_id, found.workload), []).append(found)
    try:
        for group in groups.values():
            usable(group, installed)
    except StaleProfileError:
        return True
    return False
