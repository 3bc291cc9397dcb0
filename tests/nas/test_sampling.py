from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import RUNTIMES, ModelShape, PlannedGraph, Store, Target, Workload, detect
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.shapes import Precision
from nas import profiling
from nas.profiling import profile_target
from nas.sampling import ANCHORS_AT_ONCE, Sampling
from tests.nas.synthetic import tiny_space

SPACE = tiny_space(6)
WORKLOADS = [Workload("prefill", 8), Workload("decode", 8)]
TARGET = Target(detect().id, "fake", "int8", 1)
COUNTS = {"anchors": 16, "heldout": 4, "repeats": 2}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "profiles.db")) as opened:
        yield opened


class Scattered:
    """Writes models for the fake runtime: a cost that depends on the layers' order, which no column tells."""

    def __init__(self, scatter: float) -> None:
        self.scatter = scatter
        self.built: list[ModelShape] = []

    def __call__(self, shape: ModelShape, precision: Precision, directory: Path) -> Path:
        self.built.append(shape)
        ms = sum(0.05 * (b.num_key_value_heads > 0) + 0.002 * b.intermediate_size for b in shape.blocks)
        rng = np.random.default_rng(int(shape.id, 16))
        return FakeModel(base_ms=(1 + ms) * float(np.exp(self.scatter * rng.standard_normal())) / 50).write(directory)


def run(store: Store, build: Scattered, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(RUNTIMES, "fake", FakeRuntime)
    monkeypatch.setitem(profiling.BUILDERS, "fake", build)
    clock = Clock()
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    monkeypatch.setattr("hw_profiles.profile.measure", clock.measure)
    return profile_target(store, TARGET, clock.engine, SPACE, WORKLOADS, counts=COUNTS, rounds=1, seed=0)


class Clock:
    """The fake runtime waits on this clock, and the timer reads it: exact figures in no time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.engine = FakeRuntime(self.wait)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def measure(self, *arguments: object, **options: object) -> object:
        from hw_profiles.timing import measure

        return measure(*arguments, **options, clock=lambda: self.now_s, sleep=self.wait)  # type: ignore[arg-type]


def anchors(store: Store) -> list[ModelShape]:
    return list(dict.fromkeys(m.shape for m in store.measurements(TARGET) if m.role == "anchor"))


def test_sampling_stops_where_more_anchors_do_not_help(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the latency is chance: an error that no number of anchors can lower much."""
    graphs = run(store, Scattered(0.5), monkeypatch)
    assert ANCHORS_AT_ONCE < len(anchors(store)) < COUNTS["anchors"]
    assert graphs == len({(m.shape, m.role) for m in store.measurements(TARGET)})


def test_none_are_timed_once_the_noise_is_reached(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.sampling.ENOUGH", 0.0)
    run(store, Scattered(0.0), monkeypatch)
    found = store.measurements(TARGET)
    with Store("sqlite://") as noisy:
        noisy.add_device(detect())
        noisy.add_measurements([replace(m, ratio=m.ratio * (1.2 if m.role == "repeat" else 1)) for m in found])
        timed = [PlannedGraph(m.shape, m.role) for m in found if m.workload == WORKLOADS[0]]
        first = [g for g in timed if g.role != "anchor"] + [g for g in timed if g.role == "anchor"][:ANCHORS_AT_ONCE]
        assert not Sampling(noisy, TARGET, "1", SPACE).may_still_help(first)


def test_none_are_timed_once_the_error_will_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.sampling.ENOUGH", math.inf)
    run(store, Scattered(0.5), monkeypatch)
    assert len(anchors(store)) == ANCHORS_AT_ONCE


def test_an_interrupted_profile_ends_in_the_same_graphs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Scattered):
        def __call__(self, shape: ModelShape, precision: Precision, directory: Path) -> Path:
            if len(self.built) == 20:  # among the anchors that were chosen
                raise KeyboardInterrupt
            return super().__call__(shape, precision, directory)

    monkeypatch.setattr("nas.sampling.ENOUGH", 0.0)
    run(store, Scattered(0.02), monkeypatch)
    with Store(str(tmp_path / "other.db")) as other:
        with pytest.raises(KeyboardInterrupt):
            run(other, Interrupted(0.02), monkeypatch)
        assert 0 < len(anchors(other)) < len(anchors(store))
        run(other, Scattered(0.02), monkeypatch)
        assert anchors(other) == anchors(store)
