"""Where a latency was measured: the machine, and the runtime, precision and threads it was measured with."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hw_profiles.shapes import PRECISIONS, Precision

#: CPU flags that decide which matrix kernels a runtime picks, as Linux spells them (x86, then Arm).
INSTRUCTIONS = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
#: Any of them multiplies bf16 matrices (x86, then Arm).
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
#: One CPU or several in a row, as Linux lists them. No machine has 10^5.
_RUN = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


@dataclass(frozen=True)
class Device:
    """A machine as a process on it sees it: `cores` are those the process may use, `memory_bytes` is all its memory.

    `cpus` names them where they are not all that the machine has: latencies on other cores are of another device.
    """

    name: str
    cores: int
    memory_bytes: int
    instructions: tuple[str, ...]
    system: str
    machine: str
    cpus: str = ""

    @property
    def id(self) -> str:
        """Twelve hex digits; memory counts in whole GiB, since a kernel update moves it by some MiB."""
        fields = asdict(self) | {"memory_bytes": round(self.memory_bytes / 2**30)}
        if not self.cpus:
            del fields["cpus"]  # as before there was such a field
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """For people: its name, and which CPUs it is confined to."""
        return f"{self.name}, CPUs {self.cpus}" if self.cpus else self.name

    @property
    def has_bf16(self) -> bool:
        return not set(BF16_INSTRUCTIONS).isdisjoint(self.instructions)


@dataclass(frozen=True, order=True)
class Target:
    """What a latency belongs to, beside the model and the workload."""

    device_id: str
    runtime: str
    precision: Precision
    threads: int

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be 1 or more, got {self.threads}")

    @property
    def key(self) -> str:
        """For people, the device left out: `openvino/int8/2 threads`."""
        return f"{self.runtime}/{self.precision}/{self.threads} thread{'s' if self.threads > 1 else ''}"


def detect(cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """Describe this machine; without `cpuinfo` (not Linux) the instructions stay unknown, hence empty."""
    fields = _first_processor(cpuinfo)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Device(
        name=" ".join(name.split()),
        cores=_usable_cores(),
        memory_bytes=_memory_bytes(),
        instructions=tuple(flag for flag in INSTRUCTIONS if flag in flags),
        system=platform.system(),
        machine=platform.machine(),
        cpus=affinity() if _usable_cores() < (os.cpu_count() or 1) else "",
    )


def affinity() -> str:
    """The CPUs that this process may use, as Linux lists them: `0-3,8`. Empty where the system does not tell."""
    return _runs(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""


def pin(cpus: str) -> None:
    """Keep this process to some of its CPUs, named as `affinity` does; threads that engines start later stay there too.

    Raises ValueError for a list that is none, for CPUs that the process may not use, and where the system is not Linux.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"only Linux keeps a process to some CPUs, got {platform.system()}; leave --cpus out")
    runs = [_RUN.fullmatch(run) for run in cpus.split(",")]
    wanted = {cpu for run in runs if run for cpu in range(int(run[1]), int(run[2] or run[1]) + 1)}
    allowed = os.sched_getaffinity(0)
    if not all(runs) or not wanted or not wanted <= allowed:
        raise ValueError(f"wanted CPUs out of {_runs(allowed)}, such as 0-3,8, got {cpus!r}")
    for thread in Path("/proc/self/task").iterdir():  # libraries start threads when they are imported
        with suppress(ProcessLookupError):  # one that has just ended
            os.sched_setaffinity(int(thread.name), wanted)


def _runs(cpus: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    """The first block of /proc/cpuinfo as {field: value}, empty where there is no such file."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """All memory of the machine, 0 where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
