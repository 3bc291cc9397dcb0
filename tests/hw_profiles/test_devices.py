from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hw_profiles.devices import Device, Target, affinity, detect

CPUINFO = """processor\t: 0
model name\t: Some  CPU @ 2.00GHz
flags\t\t: fpu avx2 avx512f amx_int8 avx512_vnni

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""


def test_detect_reads_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    device = detect(cpuinfo)
    assert device.name == "Some CPU @ 2.00GHz"
    assert device.instructions == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert device.memory_bytes > 2**28


def test_detect_without_cpuinfo(tmp_path: Path) -> None:
    device = detect(tmp_path / "absent")
    assert device.name
    assert device.instructions == ()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux only")
def test_cores_are_those_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert detect().cores == 1
    finally:
        os.sched_setaffinity(0, before)


def test_id_tells_machines_apart_but_not_kernels() -> None:
    device = Device("CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
    assert replace(device, memory_bytes=8 * 2**30 - 2**22).id == device.id
    others = [replace(device, cores=4), replace(device, instructions=()), replace(device, memory_bytes=16 * 2**30)]
    assert len({device.id, *(other.id for other in others)}) == 4


def test_target_key_and_checks() -> None:
    assert Target("d", "openvino", "int8", 2).key == "openvino/int8/2 threads"
    assert Target("d", "openvino", "fp32", 1).key == "openvino/fp32/1 thread"
    with pytest.raises(ValueError, match=r"fp32, int8, int4, got 'bf16'"):
        Target("d", "openvino", "bf16", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more"):
        Target("d", "openvino", "int8", 0)


@pytest.mark.parametrize(
    ("cpus", "text"), [({0}, "0"), ({1, 0}, "0-1"), ({0, 1, 2, 3, 8, 10, 11}, "0-3,8,10-11"), ({5, 7}, "5,7")]
)
def test_affinity_names_cpus_in_runs(cpus: set[int], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)
    assert affinity() == text


def test_affinity_is_what_the_kernel_says() -> None:
    status = Path("/proc/thread-self/status")
    if not status.exists():
        pytest.skip("only Linux says so in /proc")
    (allowed,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list"))
    assert affinity() == allowed


def test_affinity_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert affinity() == ""
