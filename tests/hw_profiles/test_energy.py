"""Counters as Linux shows them: a folder a zone, numbers in text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw_profiles.energy import EnergyMeter

RANGE_UJ = 262_143_328_850


def add_zone(root: Path, zone: str, name: str, energy_uj: int) -> Path:
    folder = root / zone
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two sockets, each with its cores and its memory, the platform around them, and zones of another kind."""
    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "intel-rapl" / "enabled").write_text("1\n")
    for socket in (0, 1):
        add_zone(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 1_000_000 * socket)
        add_zone(tmp_path, f"intel-rapl:{socket}:0", "core", 5)
        add_zone(tmp_path, f"intel-rapl:{socket}:1", "dram", 7)
    add_zone(tmp_path, "intel-rapl:2", "psys", 11)
    add_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    return tmp_path


def advance(zone: Path, by_uj: int) -> None:
    counter = zone / "energy_uj"
    counter.write_text(f"{(int(counter.read_text()) + by_uj) % RANGE_UJ}\n")


def test_packages_and_memory_add_up_and_nothing_counts_twice(powercap: Path) -> None:
    meter = EnergyMeter.find(powercap)
    assert meter is not None

    def work() -> None:
        for zone in powercap.glob("intel-rapl*:*"):
            advance(zone, {"package": 2_500_000, "dram": 250_000}.get((zone / "name").read_text()[:7].strip(), 10**9))
        advance(powercap / "intel-rapl:1", 1_000_000)

    assert meter.joules(work) == pytest.approx(2 * (2.5 + 0.25) + 1.0)
    assert meter.joules(lambda: None) == 0


def test_a_counter_that_turns_over_goes_on(powercap: Path) -> None:
    meter = EnergyMeter.find(powercap)
    assert meter is not None
    advance(powercap / "intel-rapl:0", RANGE_UJ - 1_000_000)
    assert meter.joules(lambda: advance(powercap / "intel-rapl:0", 3_000_000)) == pytest.approx(3.0)
    assert int((powercap / "intel-rapl:0" / "energy_uj").read_text()) == 2_000_000


@pytest.mark.parametrize("content", ["", "not a number\n", None])
def test_a_counter_that_cannot_be_read_means_no_energy_at_all(powercap: Path, content: str | None) -> None:
    """Without one of the sockets the sum would be wrong. Linux lets only root read them by default."""
    counter = powercap / "intel-rapl:1" / "energy_uj"
    if content is None:
        counter.unlink()
    else:
        counter.write_text(content)
    assert EnergyMeter.find(powercap) is None


def test_no_counters_no_energy(tmp_path: Path) -> None:
    assert EnergyMeter.find(tmp_path) is None
    assert EnergyMeter.find(tmp_path / "absent") is None
    add_zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert EnergyMeter.find(tmp_path) is None
