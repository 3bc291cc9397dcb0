"""Where a latency was measured: the machine, and the runtime, precision and threads it was measured with."""

from __future__ import annotations

import hashlib
import json
import os
import platform
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


@dataclass(frozen=True)
class Device:
    """A machine as a process on it sees it: `cores` are those the process may use, `memory_bytes` is all its memory."""

    name: str
    cores: int
    memory_bytes: int
    instructions: tuple[str, ...]
    system: str
    machine: str

    @property
    def id(self) -> str:
        """Twelve hex digits; memory counts in whole GiB, since a kernel update moves it by some MiB."""
        fields = asdict(self) | {"memory_bytes": round(self.memory_bytes / 2**30)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


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
    )


def affinity() -> str:
    """The CPUs that this process may use, as Linux lists them: `0-3,8`. Empty where the system does not tell."""
    runs: list[list[int]] = []
    for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []:
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
