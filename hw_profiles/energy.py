"""Energy from the processor's own counters (RAPL), where Linux lets this process read them; never an estimate.

The powercap tree has a zone `intel-rapl:N` for each package, AMD's as well, and zones below it for parts of the package
and for memory beside it: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """Counters that add up to the machine's packages and, where it is counted apart, their memory."""

    zones: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyMeter | None:
        """None where there are no counters, or where one that belongs to the sum may not be read."""
        zones = tuple(zone for zone in sorted(root.glob("intel-rapl:*")) if _is_counted(zone))
        try:
            for zone in zones:
                _counter_uj(zone)
        except (OSError, ValueError):
            return None
        return cls(zones) if zones else None

    def joules(self, work: Callable[[], None]) -> float:
        """What all of the machine used while `work` ran, whoever used it. Within one turn of the counters: minutes."""
        before_uj = [_counter_uj(zone) for zone in self.zones]
        work()
        used_uj = 0
        for zone, start_uj in zip(self.zones, before_uj, strict=True):
            change_uj = _counter_uj(zone) - start_uj
            used_uj += change_uj if change_uj >= 0 else change_uj + _number(zone / "max_energy_range_uj")
        return used_uj / 1e6


def _is_counted(zone: Path) -> bool:
    """Packages, and memory below them; the other zones are parts of a package, or the whole platform once more."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package-") or name == "dram"


def _counter_uj(zone: Path) -> int:
    return _number(zone / "energy_uj")


def _number(file: Path) -> int:
    return int(file.read_text())
