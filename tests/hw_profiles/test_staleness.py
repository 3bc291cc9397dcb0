from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from hw_profiles import RUNTIMES, detect
from hw_profiles.devices import Device, Target
from hw_profiles.measurement import MemoryMeasurement
from hw_profiles.runtimes.fake import FakeRuntime
from hw_profiles.shapes import BlockShape, ModelShape, Workload
from hw_profiles.staleness import StaleProfileError, installed_version, summarise, usable
from hw_profiles.store import Measurement, Role, Store

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
INT8 = Target(DEVICE.id, "openvino", "int8", 2)
INT4 = replace(INT8, precision="int4")
DECODE, PREFILL = Workload("decode", 128), Workload("prefill", 64)
START = datetime(2026, 1, 1, tzinfo=UTC)


def shape(width: int) -> ModelShape:
    return ModelShape(16, 4, 32, True, (BlockShape(2, 1, width),) * 2)


FULL = shape(64)


def timed(
    width: int, role: Role, version: str, day: int, target: Target = INT8, workload: Workload = DECODE
) -> Measurement:
    created = START + timedelta(days=day)
    return Measurement(
        target, shape(width), workload, role, FULL.id, 0.5, 0.01, 9, {FULL.id: 10.0}, version, created_at=created
    )  # fmt: skip


def profiled(version: str, day: int, target: Target = INT8, workload: Workload = DECODE) -> list[Measurement]:
    graphs: list[tuple[int, Role]] = [(64, "reference"), (8, "table"), (16, "table"), (24, "anchor"), (32, "heldout")]
    return [timed(width, role, version, day, target, workload) for width, role in graphs]


def test_one_version_everywhere_is_usable() -> None:
    found = profiled("1", 0) + profiled("1", 3, INT4)
    assert usable(found, "1") == usable(found, None) == found
    assert usable([], "1") == []


def test_another_version_than_the_installed_is_refused() -> None:
    found = profiled("1", 0)
    with pytest.raises(StaleProfileError) as stale:
        usable(found, "2")
    assert str(stale.value) == (
        "openvino/int8/2 threads: decode at 128 tokens was profiled with openvino 1, but 2 is installed; run nas "
        "profile --runtime openvino --precision int8 --threads 2 --context-tokens 128 again, or give --allow-stale"
    )
    assert usable(found, "2", allow_stale=True) == found
    assert usable(found, None) == found  # of another device: nobody can tell


def test_profiled_again_only_the_new_version_counts() -> None:
    old, new = profiled("1", 0), profiled("2", 1)
    stray = [timed(40, "anchor", "1", 0), timed(48, "finalist", "1", 5)]  # which the new profile lacks
    for installed in ("2", None):
        assert usable(old + stray + new, installed) == new
        assert usable(new + stray + old, installed) == new
    assert usable(old + stray + new, "2", allow_stale=True) == stray + new


def test_back_to_the_old_version_its_measurements_count_again() -> None:
    old, new = profiled("1", 0), profiled("2", 1)
    assert usable(old + new, "1") == old


@pytest.mark.parametrize("installed", ["2", None])
def test_half_a_new_profile_is_refused(installed: str | None) -> None:
    """Stopped after the first table graph: the second is known from the old version only."""
    old, new = profiled("1", 0), profiled("2", 1)[:2]
    with pytest.raises(StaleProfileError, match=r"int8/2 threads: .* profiled with openvino 1, but 2 is"):
        usable(old + new, installed)
    assert usable(old + new, installed, allow_stale=True) == old[2:] + new
    anchors_first = [*new, *(found for found in profiled("2", 1) if found.role == "anchor")]
    with pytest.raises(StaleProfileError):
        usable(old + anchors_first, installed)


@pytest.mark.parametrize("installed", ["2", None])
def test_a_new_profile_without_a_table_is_usable(installed: str | None) -> None:
    """It leans on the old one; its anchors say that it is no half profile."""
    old, new = profiled("1", 0), [found for found in profiled("2", 1) if found.role != "table"]
    assert usable(old + new, installed) == new
    with pytest.raises(StaleProfileError, match="prefill at 64 tokens was profiled with openvino 1"):
        usable(old + new + profiled("1", 0, workload=PREFILL), "2")


def test_precisions_of_two_versions_are_refused_naming_the_older() -> None:
    found = profiled("1", 0, workload=PREFILL) + profiled("2", 1, INT4, workload=PREFILL)
    with pytest.raises(StaleProfileError) as stale:
        usable(found, None)
    assert str(stale.value) == (
        "openvino/int8/2 threads: prefill at 64 tokens was profiled with openvino 1, but 2 is the version of the rest "
        "of the profile; run nas profile --runtime openvino --precision int8 --threads 2 --prompt-tokens 64 again, "
        "or give --allow-stale"
    )


def test_the_installed_version_is_known_for_this_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> FakeRuntime:
        raise ModuleNotFoundError

    monkeypatch.setitem(RUNTIMES, "fake", FakeRuntime)
    monkeypatch.setitem(RUNTIMES, "absent", absent)
    assert installed_version("fake", detect().id) == FakeRuntime().version()
    assert installed_version("fake", DEVICE.id) is None
    assert installed_version("absent", detect().id) is None
    assert installed_version("unheard of", detect().id) is None


@pytest.fixture
def store() -> Iterator[Store]:
    with Store("sqlite://") as opened:
        opened.add_device(DEVICE)
        yield opened


def test_summary_of_a_target(store: Store) -> None:
    again = [replace(timed(32, "repeat", "1", 4), ratio=0.6), timed(32, "repeat", "1", 4, workload=PREFILL)]
    store.add_measurements([*profiled("1", 0), *profiled("1", 2, workload=PREFILL), *again])
    store.add_measurements(profiled("1", 9, INT4))
    in_memory = [(64, "1", DECODE), (64, "1", PREFILL), (8, "1", DECODE), (16, "0", DECODE)]
    store.add_memory_measurements(
        [MemoryMeasurement(INT8, shape(w), work, "anchor", FULL.id, 10, 5, version) for w, version, work in in_memory]
    )
    found = summarise(store, INT8, "1")
    assert (found.target, found.graphs, found.measurements) == (INT8, 5, 12)
    assert found.workloads == (DECODE, PREFILL)
    assert found.memory_graphs == 2
    assert (found.runtime_version, found.last, found.is_stale) == ("1", START + timedelta(days=4), False)
    assert found.repeat_noise == pytest.approx({DECODE: 0.2, PREFILL: 0.0})
    assert not summarise(store, INT8, None).is_stale
    assert summarise(store, INT8, "2").is_stale
    assert summarise(store, INT4, "1").repeat_noise == {}


def test_summary_after_an_upgrade(store: Store) -> None:
    store.add_measurements(profiled("1", 0) + profiled("1", 0, workload=PREFILL))
    store.add_measurements(profiled("2", 1)[:-1])
    half = summarise(store, INT8, "2")  # prefill is still of version 1
    assert (half.runtime_version, half.graphs, half.workloads, half.is_stale) == ("2", 4, (DECODE,), True)
    store.add_measurements(profiled("2", 1, workload=PREFILL))
    assert not summarise(store, INT8, "2").is_stale
    assert not summarise(store, INT8, "1").is_stale
    assert summarise(store, INT8, "1").measurements == 10
    assert summarise(store, INT8, "3").is_stale
