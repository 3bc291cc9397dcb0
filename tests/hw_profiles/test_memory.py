from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hw_profiles.devices import Target
from hw_profiles.energy import EnergyMeter
from hw_profiles.memory import DECODE_STEPS, Footprint, _step_joules, measure_memory, memory_plan, profile_memory
from hw_profiles.planning import PlannedGraph, plan
from hw_profiles.profile import ProfileError
from hw_profiles.runtimes import RUNTIMES
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.shapes import ModelShape, Phase, Precision, Workload
from hw_profiles.store import Store

from . import tiny_graphs
from .test_energy import add_zone, advance
from .test_profile import CHOICES, DEVICE, FULL, PLANNED

TARGET = Target(DEVICE.id, "onnxruntime", "int8", 1)
PREFILLS = [Workload("prefill", tokens) for tokens in (8, 16, 32)]
DECODES = [Workload("decode", tokens) for tokens in (0, 16)]
EXTREMES = {PREFILLS[0], PREFILLS[2], *DECODES}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "profiles.db")) as opened:
        opened.add_device(DEVICE)
        yield opened


def test_the_kernel_counts_what_was_there_and_is_gone() -> None:
    """200 MB are written and freed in a process of its own."""
    code = """
import numpy
from hw_profiles.memory import _peak_bytes
before = _peak_bytes()
numpy.ones(25_000_000)
print(_peak_bytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == pytest.approx(200e6, rel=0.02)


@pytest.mark.parametrize("workload", [Workload("prefill", 20), Workload("decode", 20, 3), Workload("decode", 0)])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_graph_in_a_process_of_its_own(name: str, workload: Workload, tmp_path: Path) -> None:
    """This process holds far more than the tiny graph's, which must not show; nor must it be held to this one."""
    held = bytearray(b"\1" * 300_000_000)
    write = tiny_graphs.WRITERS[name]
    found = measure_memory(name, write(tmp_path).parent, 1, workload, tiny_graphs.VOCAB_SIZE)
    assert 15e6 < found.baseline_bytes < found.peak_bytes < len(held)
    assert (found.step_joules is None) == (EnergyMeter.find() is None)


def test_a_graph_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"in a process of its own for decode at 8 tokens: .*wanted a model file"):
        measure_memory("onnxruntime", tmp_path, 1, Workload("decode", 8), 16)


@pytest.mark.parametrize(("phase", "step_ms"), [("decode", 3 + 2), ("prefill", 3 + 2 * 8)])
def test_energy_of_a_step_is_power_times_its_time(phase: Phase, step_ms: float, tmp_path: Path) -> None:
    """A machine of 20 W whose counter moves by as much as its steps say that they take."""
    zone = add_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    engine = FakeRuntime(lambda seconds: advance(zone, round(seconds * 20e6)))
    ids = np.zeros((1, 8 + DECODE_STEPS + 64), np.int64)
    session = engine.load(FakeModel(base_ms=3, token_ms=2).write(tmp_path), 1, ids.shape[1])
    session.step(ids[:, : 8 + DECODE_STEPS])
    assert _step_joules(meter, session, Workload(phase, 8), ids) == pytest.approx(20 * step_ms / 1e3)


def test_the_plan_holds_small_and_large_graphs_and_the_extremes_of_the_workloads() -> None:
    chosen = memory_plan(PLANNED, PREFILLS + DECODES, 8)
    graphs = [graph for graph, _ in chosen]
    assert Counter(graph.role for graph in graphs) >= Counter({"reference": 1, "heldout": 2})
    assert len(set(graphs)) == len(graphs) == 8
    for graph, workloads in chosen:
        if graph.role == "reference":
            assert set(workloads) == EXTREMES
        elif graph.role == "heldout":
            assert workloads == (PREFILLS[2], DECODES[1])
        else:
            assert sorted(work.phase for work in workloads) == ["decode", "prefill"]
    assert {work for graph, works in chosen if graph.role != "heldout" for work in works} == EXTREMES
    fitted = [graph.shape.parameters for graph in PLANNED if graph.role in ("table", "anchor")]
    assert {min(fitted), max(fitted)} <= {graph.shape.parameters for graph in graphs}


def test_the_plan_makes_do_with_what_there_is() -> None:
    assert memory_plan(PLANNED, DECODES, 0) == []
    graphs = {graph for graph, _ in memory_plan(PLANNED, DECODES, 99)}
    assert graphs == {g for g in PLANNED if g.role not in ("reference", "repeat")} | {PLANNED[0]}
    assert memory_plan(PLANNED, DECODES[:1], 1) == [(PLANNED[0], (DECODES[0],))]
    batches = [Workload("decode", 8, 4), Workload("decode", 16, 1), Workload("decode", 16, 4)]
    assert memory_plan(PLANNED, batches, 1)[0][1] == (batches[1], batches[2])
    few = plan(FULL, CHOICES, anchors=1, heldout=0, repeats=0)
    assert {graph.role for graph, _ in memory_plan(few, DECODES, 8)} == {"reference", "table", "anchor"}


class Bench:
    """Says that a graph takes a megabyte and as many bytes as it has parameters, a token a thousand more."""

    def __init__(self, fails: ModelShape | None = None, stops_after: int = 999) -> None:
        self.fails = fails
        self.stops_after = stops_after
        self.measured: list[tuple[int, Workload]] = []
        self.folders: set[Path] = set()

    def build(self, shape: ModelShape, precision: Precision, directory: Path) -> Path:
        assert precision == "int8"
        if shape == self.fails:
            raise OSError("no space left")
        (directory / "size").write_text(str(shape.parameters))
        self.folders.add(directory)
        return directory

    def measure(self, name: str, path: Path, threads: int, workload: Workload, vocab_size: int) -> Footprint:
        assert (name, threads, vocab_size) == ("onnxruntime", 1, FULL.vocab_size)
        if len(self.measured) == self.stops_after:
            raise KeyboardInterrupt
        size = int((path / "size").read_text())
        self.measured.append((size, workload))
        return Footprint(10**6 + size + 1000 * workload.tokens, 10**6, 0.25)


def run(store: Store, bench: Bench, graphs: int = 8, version: str = "1.0") -> list[str]:
    told: list[str] = []
    profile_memory(
        store, TARGET, version, PLANNED, PREFILLS + DECODES, bench.build, graphs=graphs, measure=bench.measure,
        progress=lambda done, total, what: told.append(f"{done}/{total} {what}"),
    )  # fmt: skip
    return told


def test_what_is_planned_is_stored_once(store: Store) -> None:
    bench = Bench()
    told = run(store, bench)
    wanted = [(graph, work) for graph, works in memory_plan(PLANNED, PREFILLS + DECODES, 8) for work in works]
    found = store.memory_measurements(TARGET, reference_id=FULL.id)
    assert [(PlannedGraph(m.shape, m.role), m.workload) for m in found] == wanted
    for m in found:
        assert m.peak_bytes == 10**6 + m.shape.parameters + 1000 * m.workload.tokens
        assert (m.baseline_bytes, m.step_joules, m.runtime_version) == (10**6, 0.25, "1.0")
    assert told[0] == f"0/8 memory of reference {FULL.id}"
    assert told[-1] == "8/8 finished"
    assert not any(folder.exists() for folder in bench.folders)
    again = Bench()
    assert run(store, again) == ["8/8 finished"]
    assert again.measured == []
    assert store.memory_measurements(TARGET, reference_id=FULL.id) == found


def test_after_an_interruption_and_an_upgrade(store: Store) -> None:
    stopped = Bench(stops_after=7)  # the full model, one more graph, and half of the next
    with pytest.raises(KeyboardInterrupt):
        run(store, stopped)
    before = store.memory_measurements(TARGET, reference_id=FULL.id)
    assert len(before) == 6
    resumed = Bench()
    run(store, resumed)
    whole = store.memory_measurements(TARGET, reference_id=FULL.id)
    assert whole[:6] == before
    assert len(whole) == 6 + len(resumed.measured) == 4 + 5 * 2 + 2 * 2
    upgraded = Bench()
    run(store, upgraded, version="2.0")
    assert len(upgraded.measured) == len(whole)
    assert len(store.memory_measurements(TARGET, reference_id=FULL.id)) == 2 * len(whole)


def test_more_graphs_add_to_those_that_are_there(store: Store) -> None:
    run(store, Bench(), graphs=4)
    before = store.memory_measurements(TARGET, reference_id=FULL.id)
    run(store, Bench(), graphs=99)
    after = store.memory_measurements(TARGET, reference_id=FULL.id)
    assert after[: len(before)] == before
    assert {m.shape for m in after} == {FULL, *(graph.shape for graph in PLANNED if graph.role != "reference")}


def test_a_graph_that_fails_is_named_and_left_out(store: Store) -> None:
    (broken, _) = memory_plan(PLANNED, PREFILLS + DECODES, 8)[3]
    with pytest.raises(ProfileError, match=rf"memory of 1 of 8 graphs .*{broken.shape.id}: no space left"):
        run(store, Bench(fails=broken.shape))
    found = {m.shape for m in store.memory_measurements(TARGET, reference_id=FULL.id)}
    assert broken.shape not in found
    assert len(found) == 7
    run(store, Bench())
    assert len({m.shape for m in store.memory_measurements(TARGET, reference_id=FULL.id)}) == 8
