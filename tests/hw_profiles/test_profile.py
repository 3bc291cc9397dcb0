from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.devices import Device, Target, affinity
from hw_profiles.measurement import Measurement
from hw_profiles.planning import PlannedGraph, plan
from hw_profiles.profile import (
    ALONE_ROUNDS,
    BATCH_GRAPHS,
    MEMORY_PER_WEIGHT_BYTE,
    ProfileError,
    profile,
    repeat_noise,
)
from hw_profiles.references import reference_shapes
from hw_profiles.runtimes import Session
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.shapes import BlockShape, ModelShape, Precision, Workload
from hw_profiles.store import Store
from hw_profiles.timing import PASSES, Timing, measure

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
TARGET = Target(DEVICE.id, "fake", "int8", 1)
FULL = ModelShape(16, 4, 32, True, (BlockShape(4, 2, 64),) * 6)
CHOICES = [BlockShape(heads, heads // 2, width) for heads in (4, 2, 0) for width in (64, 32, 0)]
WORKLOADS = [Workload("prefill", 8), Workload("decode", 8)]
PLANNED = plan(FULL, CHOICES, anchors=6, heldout=4, repeats=2)
REFERENCES = reference_shapes(FULL)


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    monkeypatch.setattr("hw_profiles.timing.WARM_STEPS", 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "profiles.db")) as opened:
        yield opened


class Builder:
    """Writes fake models that take 1 ms a million parameters, and remembers what it was asked for."""

    def __init__(
        self, fails: Callable[[ModelShape, int], BaseException | None] = lambda shape, count: None, scale: float = 1.0
    ) -> None:
        self._scale = scale
        self.built: list[ModelShape] = []
        self.folders: list[Path] = []
        self._fails = fails

    def __call__(self, shape: ModelShape, precision: Precision, directory: Path) -> Path:
        assert precision == "int8"
        assert list(directory.iterdir()) == []
        failure = self._fails(shape, len(self.built))
        if failure is not None:
            raise failure
        self.built.append(shape)
        self.folders.append(directory)
        return FakeModel(base_ms=self._scale * milliseconds(shape), vocab_size=shape.vocab_size).write(directory)


def milliseconds(shape: ModelShape) -> float:
    return 0.2 + shape.parameters / 2e4


def run(store: Store, build: Builder, planned: list[PlannedGraph] = PLANNED, **options: object) -> list[str]:
    told: list[str] = []
    options = {"rounds": 3, "decode_steps": 2, "workloads": WORKLOADS, "runtime": FakeRuntime()} | options
    profile(
        store,
        DEVICE,
        TARGET,
        planned,
        build=build,
        progress=lambda done, total, description: told.append(f"{done}/{total} {description}"),
        **options,  # type: ignore[arg-type]
    )
    return told


def stored(store: Store) -> dict[tuple[str, str, Workload], Measurement]:
    return {(m.role, m.shape.id, m.workload): m for m in store.measurements()}


def test_everything_planned_is_measured_and_nothing_twice(store: Store) -> None:
    build = Builder()
    told = run(store, build)
    assert set(stored(store)) == {(g.role, g.shape.id, work) for g in PLANNED for work in WORKLOADS}
    assert told[0].startswith(f"0/{len(PLANNED)} ")
    assert told[-1] == f"{len(PLANNED)}/{len(PLANNED)} finished"
    before = store.measurements()
    again = Builder()
    assert run(store, again) == [f"{len(PLANNED)}/{len(PLANNED)} {len(PLANNED)} graphs are stored already"]
    assert again.built == []
    assert store.measurements() == before


def test_ratios_are_those_programmed(store: Store) -> None:
    slow = [PlannedGraph(FULL, "reference"), *(g for g in PLANNED if g.role == "anchor")]
    run(store, Builder(scale=5.0), slow, rounds=5)
    for found in store.measurements():
        assert found.reference_id == FULL.id
        assert found.ratio == pytest.approx(milliseconds(found.shape) / milliseconds(FULL), rel=0.25)
    reference = store.measurements(roles=["reference"])
    assert [m.ratio for m in reference] == [1.0, 1.0]
    assert {m.workload.phase: m.repeats for m in reference} == {
        "prefill": ALONE_ROUNDS,
        "decode": ALONE_ROUNDS * PASSES,
    }
    others = store.measurements(roles=["anchor"])
    assert {m.workload.phase: m.repeats for m in others} == {"prefill": 5, "decode": 5 * PASSES}


def test_all_references_are_in_every_batch(store: Store) -> None:
    run(store, Builder(scale=5.0))
    assert len(REFERENCES) == 3
    for found in store.measurements():
        assert set(found.references_ms) == {shape.id for shape in REFERENCES}
        assert found.latency_ms == pytest.approx(5.0 * milliseconds(found.shape), rel=0.3)
    references = store.measurements(roles=["reference"])
    assert {m.shape for m in references} == {*REFERENCES}
    assert {m.shape for m in references if m.is_full_model} == {FULL}
    for found in references:  # the median over all batches, not their own
        batches = {m.references_ms[found.shape.id] for m in store.measurements(workload=found.workload)}
        assert len(batches) > 2
        assert min(batches) <= found.latency_ms <= max(batches)


def test_references_that_do_not_fit_the_memory_are_graphs_as_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest_bytes = int(MEMORY_PER_WEIGHT_BYTE * REFERENCES[-1].weight_bytes("int8")) + 1
    monkeypatch.setattr("hw_profiles.profile.BATCH_MEMORY_BYTES", smallest_bytes)
    run(store, Builder())
    assert set(stored(store)) == {(g.role, g.shape.id, work) for g in PLANNED for work in WORKLOADS}
    assert all(set(m.references_ms) == {FULL.id, REFERENCES[-1].id} for m in store.measurements())


def test_long_prompts_are_timed_on_the_full_model_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.planning.MOST_TOKENS_FED", 8)
    long = Workload("prefill", 16)
    run(store, Builder(), workloads=[*WORKLOADS, long])
    (found,) = store.measurements(workload=long)
    assert (found.shape, dict(found.references_ms)) == (FULL, {FULL.id: found.latency_ms})
    assert {m.shape for m in store.measurements(workload=WORKLOADS[0])} == {g.shape for g in PLANNED}


def test_workloads_that_come_later_are_of_the_same_speed(store: Store) -> None:
    """The machine is a third as fast by then: ratios are what they were, and so is what they are ratios of."""
    first, further = Workload("decode", 8), [Workload("decode", 20), Workload("prefill", 40)]
    few = [PlannedGraph(FULL, "reference"), *(g for g in PLANNED if g.role == "anchor")][:4]
    run_at(1.0, store, few[:3], [first])
    run_at(3.0, store, few[:2], [first, *further])  # stopped after these
    run_at(2.0, store, few, [first, *further])
    for found in store.measurements():
        assert found.latency_ms == pytest.approx(at_full_speed_ms(found), rel=0.02), found.workload
    assert len(store.measurements()) == len(few) * 3


def test_references_that_come_later_are_of_the_same_speed(store: Store) -> None:
    """As in a profile of an earlier version, which knew the full model alone."""
    few = [PlannedGraph(FULL, "reference"), *(g for g in PLANNED if g.role == "anchor")]
    run_at(1.0, store, few[:3], WORKLOADS)
    run_at(3.0, store, [*PLANNED[: len(REFERENCES)], *few[1:]], WORKLOADS)
    found = store.measurements()
    assert {m.shape for m in found if m.role == "reference"} == {*REFERENCES}
    assert len(found) == (len(REFERENCES) + len(few) - 1) * len(WORKLOADS)
    for measured in found:
        assert measured.latency_ms == pytest.approx(at_full_speed_ms(measured), rel=0.02), measured.workload


def run_at(slowness: float, store: Store, planned: list[PlannedGraph], workloads: list[Workload]) -> None:
    """On a machine so many times as slow, whose clock is the sum of what the graphs take."""
    now_s = 0.0

    def wait(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    def build(shape: ModelShape, precision: Precision, directory: Path) -> Path:
        per_token_ms = slowness * shape.parameters / 1e4
        return FakeModel(per_token_ms, per_token_ms, per_token_ms / 10, shape.vocab_size).write(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hw_profiles.profile.measure", partial(measure, clock=lambda: now_s, sleep=wait))
        options = {"rounds": 3, "decode_steps": 2, "runtime": FakeRuntime(wait)}
        profile(store, DEVICE, TARGET, planned, workloads, build, **options)  # type: ignore[arg-type]


def at_full_speed_ms(found: Measurement) -> float:
    """What `run_at` makes a graph take where the slowness is 1."""
    fed, context = found.workload.tokens, 0.0
    if found.workload.phase == "decode":
        fed, context = 1, found.workload.tokens + 0.5
    return found.shape.parameters / 1e4 * (1 + fed + context / 10)


def test_a_batch_in_a_slow_spell_is_timed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third one's references take half as long again; the last but one's too, but one in four is the limit."""
    calls: list[set[str]] = []

    def in_spells(sessions: dict[str, Session], *args: Any, **options: Any) -> dict[tuple[str, Workload], Timing]:
        calls.append(set(sessions))
        slower = 1.5 if len(calls) in (4, len(PLANNED) - 2) else 1.0
        timings = measure(sessions, *args, **options)
        return {
            key: replace(found, references_ms=dict.fromkeys(found.references_ms, slower * 10.0), ratio=slower)
            for key, found in timings.items()
        }

    monkeypatch.setattr(sys.modules[profile.__module__], "measure", in_spells)
    monkeypatch.setattr(sys.modules[profile.__module__], "BATCH_GRAPHS", 1)
    monkeypatch.setattr(sys.modules[profile.__module__], "POSTPONED_SHARE", len(PLANNED) - len(REFERENCES))
    run(store, Builder())
    references = {shape.id for shape in REFERENCES}
    batches = len(PLANNED) - len(REFERENCES)
    assert calls[0] == references
    assert len(calls) == 1 + batches + 1
    assert calls[-1] == calls[3]
    ratios = {found.ratio for found in store.measurements() if found.shape.id in calls[3] - references}
    assert ratios == {1.0}
    assert len(stored(store)) == len(PLANNED) * len(WORKLOADS)


def test_files_are_gone_and_the_references_are_built_once(store: Store) -> None:
    build = Builder()
    run(store, build)
    assert not any(folder.exists() for folder in build.folders)
    assert [build.built.count(shape) for shape in REFERENCES] == [1, 1, 1]  # they stay loaded


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_profile_goes_on_where_it_was(store: Store, failure: BaseException) -> None:
    """The build stops in the second batch: the first is kept as it is, the rest is measured by the next call."""
    stopped = Builder(lambda shape, count: failure if count > BATCH_GRAPHS + 3 else None)
    with pytest.raises((KeyboardInterrupt, ProfileError)):
        run(store, stopped)
    before = stored(store)
    assert 0 < len(before) < len(PLANNED) * len(WORKLOADS)
    resumed = Builder()
    told = run(store, resumed)
    assert told[0].startswith(f"{len(before) // len(WORKLOADS)}/{len(PLANNED)} ")
    after = stored(store)
    assert set(after) == {(g.role, g.shape.id, work) for g in PLANNED for work in WORKLOADS}
    for key, found in before.items():
        assert replace(after[key], profile_ms=None) == replace(found, profile_ms=None)
    assert len(resumed.built) == len(REFERENCES) + len(PLANNED) - len(before) // len(WORKLOADS)


def test_a_graph_that_fails_while_it_runs_is_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = next(graph.shape for graph in PLANNED if graph.role == "anchor")

    def failing(sessions: dict[str, Session], *args: Any, **options: Any) -> dict[tuple[str, Workload], Timing]:
        if bad.id in sessions:
            raise RuntimeError("the kernel has no such size")
        return measure(sessions, *args, **options)

    monkeypatch.setattr(sys.modules[profile.__module__], "measure", failing)
    with pytest.raises(ProfileError, match=rf"1 of {len(PLANNED)} graphs .*anchor {bad.id}: the kernel has no such"):
        run(store, Builder())
    graphs = {(g.role, g.shape.id, work) for g in PLANNED for work in WORKLOADS if g.shape != bad}
    assert set(stored(store)) == graphs


KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.hw_profiles.test_profile import *
import hw_profiles.timing
hw_profiles.timing.SETTLE_S = 0.002
hw_profiles.timing.WARM_STEPS = 1
with Store({path!r}) as store:
    run(store, Builder(), rounds=40)
"""


def test_kill_9_keeps_the_finished_batches(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    code = KILLED.format(root=str(Path(__file__).parents[2]), path=str(path))
    # what it leaves behind in the temporary folder goes with the test's own
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline_s = time.monotonic() + 30
    before: dict[tuple[str, str, Workload], Measurement] = {}
    while not before and time.monotonic() < deadline_s:
        time.sleep(0.05)
        if path.exists():
            with Store(str(path)) as store:
                before = stored(store)
    assert process.poll() is None, "the profile was over before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Store(str(path)) as store:
        before = stored(store)
        assert 0 < len(before) < len(PLANNED) * len(WORKLOADS)
        run(store, Builder())
        after = stored(store)
    assert len(after) == len(PLANNED) * len(WORKLOADS)
    assert {key: after[key].ratio for key in before} == {key: found.ratio for key, found in before.items()}


def test_a_new_workload_is_all_that_is_added(store: Store) -> None:
    run(store, Builder(), workloads=WORKLOADS[:1])
    before = stored(store)
    run(store, Builder())
    after = stored(store)
    assert len(after) == 2 * len(before)
    assert all(after[key].created_at == found.created_at for key, found in before.items())


class UpgradedRuntime(FakeRuntime):
    def version(self) -> str:
        return "2"


def test_after_an_upgrade_all_is_measured_afresh(store: Store) -> None:
    run(store, Builder())
    before = store.measurements()
    stopped = Builder(lambda shape, count: KeyboardInterrupt() if count > BATCH_GRAPHS + 3 else None)
    with pytest.raises(KeyboardInterrupt):
        run(store, stopped, runtime=UpgradedRuntime())
    told = run(store, Builder(), runtime=UpgradedRuntime())
    assert not told[0].startswith("0/")  # it went on where it was
    assert store.measurements(runtime_version="1") == before
    new = store.measurements(runtime_version="2")
    assert {(m.role, m.shape.id, m.workload) for m in new} == set(stored(store))
    assert len(new) == len(before)
    assert {m.affinity for m in new} == {affinity()}
    again = Builder()
    run(store, again)  # and back
    assert again.built == []


def test_a_graph_that_fails_is_named_and_left_out(store: Store) -> None:
    broken = PLANNED[5].shape
    build = Builder(lambda shape, count: OSError("no space left") if shape == broken else None)
    with pytest.raises(ProfileError, match=rf"1 of {len(PLANNED)} graphs .*{broken.id}: no space left"):
        run(store, build)
    assert len(stored(store)) == (len(PLANNED) - 1) * len(WORKLOADS)
    run(store, Builder())
    assert len(stored(store)) == len(PLANNED) * len(WORKLOADS)


def test_a_failing_reference_stops_at_once(store: Store) -> None:
    with pytest.raises(OSError, match="no space left"):
        run(store, Builder(lambda shape, count: OSError("no space left")))
    assert stored(store) == {}


def test_batches_keep_to_the_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.profile.BATCH_MEMORY_BYTES", 6 * FULL.weight_bytes("int8"))
    batches = [
        line.count(",") + 1 for line in run(store, Builder()) if "timing" in line and "the references" not in line
    ]
    graphs = [g for g in PLANNED if g.role != "reference"]
    weight_bytes = [g.shape.weight_bytes("int8") for g in graphs]
    assert sum(batches) == len(graphs)
    position = 0
    for size in batches:
        taken_bytes = MEMORY_PER_WEIGHT_BYTE * sum(weight_bytes[position : position + size])
        assert taken_bytes <= 6 * FULL.weight_bytes("int8")
        position += size
    assert max(batches) < BATCH_GRAPHS


def test_repeats_come_in_a_later_batch(store: Store) -> None:
    run(store, Builder())
    for again in store.measurements(roles=["repeat"]):
        first = next(m for m in store.measurements(again.target, again.workload, ["heldout"]) if m.shape == again.shape)
        assert again.references_ms != first.references_ms


def test_repeat_noise_by_hand(store: Store) -> None:
    work, shapes = WORKLOADS[0], [graph.shape for graph in PLANNED[1:4]]
    store.add_device(DEVICE)
    assert repeat_noise(store.measurements(TARGET, work)) is None
    made = Measurement(TARGET, FULL, work, "reference", FULL.id, 1.0, 0.0, 3, {FULL.id: 10.0}, "1")
    pairs = zip(shapes, (0.5, 0.6, 0.4), (0.55, 0.6, 0.36), strict=True)  # +10 %, 0, -10 %
    for shape, first, second in pairs:
        store.add_measurements([replace(made, shape=shape, role="heldout", ratio=first)])
        store.add_measurements([replace(made, shape=shape, role="repeat", ratio=second, references_ms={FULL.id: 20.0})])
    assert repeat_noise(store.measurements(TARGET, work)) == pytest.approx(0.1)
    assert repeat_noise(store.measurements(TARGET, WORKLOADS[1])) is None
    for role, ratio in (("heldout", 0.5), ("repeat", 0.75)):  # with another version: +50 %
        other = replace(made, shape=shapes[0], role=role, ratio=ratio, runtime_version="2")
        store.add_measurements([other])
    assert repeat_noise(store.measurements(TARGET, work, runtime_version="2")) == pytest.approx(0.5)
    assert repeat_noise(store.measurements(TARGET, work)) == pytest.approx(0.1)  # of 0, 0.1, 0.1, 0.5


def test_arguments_that_do_not_fit_together(store: Store) -> None:
    with pytest.raises(ValueError, match="needs a graph with role reference, the full model, got none"):
        run(store, Builder(), PLANNED[3:])
    with pytest.raises(ValueError, match="must be on device"):
        profile(store, DEVICE, replace(TARGET, device_id="x"), PLANNED, WORKLOADS, Builder(), FakeRuntime())
    with pytest.raises(ValueError, match="must name the runtime fake, got openvino"):
        profile(store, DEVICE, replace(TARGET, runtime="openvino"), PLANNED, WORKLOADS, Builder(), FakeRuntime())
    int4 = FakeRuntime()
    int4.precisions = ("int4",)
    with pytest.raises(ValueError, match=r"that fake has kernels for on this device \(int4\), got int8; take one"):
        profile(store, DEVICE, TARGET, PLANNED, WORKLOADS, Builder(), int4)
