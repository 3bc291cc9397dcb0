from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import RUNTIMES, Device, Store, Target, Workload, detect
from hw_profiles.runtimes.fake import FakeRuntime
from hw_profiles.staleness import StaleProfileError
from nas.latency import ProfileMissingError
from nas.memory import MemoryModel, memory_profile
from nas.subnet import Subnet
from tests.nas.synthetic import BASELINE_BYTES, fill_memory, shape_peak_bytes, tiny_space

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
SPACE = tiny_space(4)
PROFILED = [Workload("prefill", 16), Workload("prefill", 64), Workload("decode", 16), Workload("decode", 256)]
ASKED = [Workload("prefill", 32), Workload("decode", 128)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "profiles.db")) as opened:
        yield opened


def fit(
    store: Store, workloads: list[Workload] = ASKED, threads: int = 1, device: Device = DEVICE, **options: bool
) -> MemoryModel:
    return MemoryModel.fit(store, device.id, "fake", threads, SPACE, workloads, **options)


def random_subnets(count: int = 30) -> list[Subnet]:
    rng = np.random.default_rng(7)
    return [SPACE.sample(rng) for _ in range(count)]


def test_a_process_takes_what_the_larger_of_its_workloads_takes(store: Store) -> None:
    fill_memory(store, SPACE, DEVICE, "fake", PROFILED)
    subnets = random_subnets()
    found = fit(store).predict(subnets)
    for subnet, memory in zip(subnets, found, strict=True):
        peaks = [shape_peak_bytes(SPACE.model_shape(subnet), subnet.precision, work) for work in ASKED]
        assert memory.value_bytes == pytest.approx(max(peaks), rel=0.01)
        assert memory.low_bytes <= memory.value_bytes <= memory.high_bytes
        assert memory.baseline_bytes == BASELINE_BYTES
    assert fit(store).predict([]) == []
    here = fit(store, PROFILED[1:3]).predict([SPACE.full(8), *subnets])  # energy is told of what was measured alone
    assert here[0].step_joules == {PROFILED[2]: 0.5}
    assert all(not memory.step_joules for memory in found + here[1:])
    prefill_alone = fit(store, ASKED[:1]).predict(subnets)
    assert all(alone.value_bytes < both.value_bytes for alone, both in zip(prefill_alone, found, strict=True))


def test_held_out_graphs_judge_and_are_not_fitted_on(store: Store) -> None:
    fill_memory(store, SPACE, DEVICE, "fake", PROFILED, factors={"heldout": 1.25})
    subnets = random_subnets()
    expected = [
        max(shape_peak_bytes(SPACE.model_shape(subnet), subnet.precision, work) for work in ASKED) for subnet in subnets
    ]
    assert [memory.value_bytes for memory in fit(store).predict(subnets)] == pytest.approx(expected, rel=0.01)
    target = Target(DEVICE.id, "fake", "int8", 1)
    profile = memory_profile(store, target, SPACE.base)
    assert profile is not None
    assert profile.mape == pytest.approx(1 - 1 / 1.25, abs=0.01)
    assert len(profile.held_out) == 2 * 2
    assert profile.measurements == (4 + 5 * 2) + 2 * 2
    assert profile.baseline_bytes == BASELINE_BYTES
    assert profile.full_bytes == {work: shape_peak_bytes(SPACE.base, "int8", work) for work in PROFILED}
    assert profile.full_step_joules == {work: 0.5 for work in PROFILED if work.phase == "decode"}
    assert memory_profile(store, Target(DEVICE.id, "fake", "fp32", 1), SPACE.base) is None


def test_what_is_missing_is_named(store: Store) -> None:
    with pytest.raises(ProfileMissingError, match="memory of fake with 1 threads was not measured for prefill at 32"):
        fit(store)
    fill_memory(store, SPACE, DEVICE, "fake", PROFILED, precisions=["int8"])
    for options in ({"threads": 2}, {"workloads": [Workload("decode", 257)]}):
        with pytest.raises(ProfileMissingError, match="run nas profile for these lengths with --memory-graphs 8"):
            fit(store, **options)  # type: ignore[arg-type]
    with pytest.raises(ProfileMissingError, match=r"precision int4 was not measured \(only of int8\); run .* int4"):
        fit(store).predict([SPACE.full(8), SPACE.full(4)])


def test_too_few_graphs_give_no_prediction(store: Store) -> None:
    fill_memory(store, SPACE, DEVICE, "fake", PROFILED, precisions=["int8"], graphs=2)
    with pytest.raises(ProfileMissingError, match="or for too few graphs"):
        fit(store)
    profile = memory_profile(store, Target(DEVICE.id, "fake", "int8", 1), SPACE.base)
    assert profile is not None
    assert (profile.measurements, profile.mape) == (4 + 2, None)


def test_another_version_is_refused_or_with_leave_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect()
    monkeypatch.setitem(RUNTIMES, "fake", FakeRuntime)
    fill_memory(
        store, SPACE, here, "fake", PROFILED, factors={"reference": 2.0, "table": 2.0, "anchor": 2.0}, version="0"
    )
    with pytest.raises(
        StaleProfileError, match=r"fake/int8/1 thread: memory was measured with fake 0, but 1 is installed"
    ):
        fit(store, device=here)
    subnet = SPACE.full(8)
    twice = fit(store, device=here, allow_stale=True).predict([subnet])[0].value_bytes
    fill_memory(store, SPACE, here, "fake", PROFILED)
    assert fit(store, device=here).predict([subnet])[0].value_bytes == pytest.approx(twice / 2, rel=0.01)
    assert fit(store, device=here, allow_stale=True).predict([subnet])[0].value_bytes < twice / 1.9
    fill_memory(store, SPACE, DEVICE, "fake", PROFILED, version="0")  # of another device: nobody can tell
    assert fit(store).predict([subnet])
