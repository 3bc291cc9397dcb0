from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hw_profiles.devices import Device, Target, affinity, detect, pin

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
    with pytest.raises(ValueError, match=r"fp32, bf16, fp16, int8, int4, got 'fp8'"):
        Target("d", "openvino", "fp8", 2)  # type: ignore[arg-type]
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


def test_cores_of_some_cpus_are_another_device() -> None:
    device = Device("CPU", 2, 8 * 2**30, (), "Linux", "x86_64")
    assert device.title == "CPU"
    confined = [replace(device, cpus=cpus) for cpus in ("0-1", "2-3")]
    assert len({device.id, *(other.id for other in confined)}) == 3
    assert [other.title for other in confined] == ["CPU, CPUs 0-1", "CPU, CPUs 2-3"]


def test_id_of_a_whole_machine_is_that_of_earlier_databases() -> None:
    """Written down when there was no field `cpus`."""
    assert Device("CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64").id == "251fd0e1503d"


@pytest.mark.parametrize(
    ("instructions", "has"),
    [((), False), (("avx512f", "avx512_fp16", "amx_int8"), False), (("amx_bf16",), True), (("bf16", "sve"), True)],
)
def test_who_has_bf16(instructions: tuple[str, ...], has: bool) -> None:
    assert Device("CPU", 2, 0, instructions, "Linux", "x86_64").has_bf16 == has


needs_two_cpus = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)

PINNED = """
import os, sys, tempfile
from pathlib import Path
from hw_profiles.devices import detect, pin
from hw_profiles.runtimes import runtime
from tests.hw_profiles import tiny_graphs
import numpy as np

pin(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    for name, write in tiny_graphs.WRITERS.items():
        write(Path(folder))
        runtime(name).load(Path(folder), 2, 8).step(np.zeros((1, 4), np.int64))
print(detect().cpus, detect().cores)
for thread in Path("/proc/self/task").iterdir():
    lines = (thread / "status").read_text().splitlines()
    print(*(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")))
"""


@needs_two_cpus
def test_no_thread_of_an_engine_leaves_the_cpus_it_is_pinned_to() -> None:
    """As the kernel tells it of each thread, those of numpy included, which were there before."""
    cpu = str(max(os.sched_getaffinity(0)))
    ran = subprocess.run([sys.executable, "-c", PINNED, cpu], capture_output=True, text=True, check=False)
    described, *threads = ran.stdout.splitlines()
    assert described == f"{cpu} 1"
    assert len(threads) > 2
    assert set(threads) == {cpu}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux only")
@pytest.mark.parametrize("cpus", ["", "0-", "one", "0,,0", "99999", "1-0", "0-99999", "0;0"])
def test_impossible_cpus_are_refused(cpus: str) -> None:
    before = affinity()
    with pytest.raises(ValueError, match=rf"wanted CPUs out of {before}, such as 0-3,8, got '{cpus}'"):
        pin(cpus)
    assert affinity() == before


def test_only_linux_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ValueError, match=r"only Linux keeps a process to some CPUs.*leave --cpus out"):
        pin("0")
