from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from hw_profiles.devices import Device, Target
from hw_profiles.shapes import BlockShape, ModelShape, Workload
from hw_profiles.store import BUSY_TIMEOUT_MS, Measurement, Store, StoreError

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
TARGET = Target(DEVICE.id, "openvino", "int8", 2)
DECODE = Workload("decode", 128)


def shape(width: int) -> ModelShape:
    return ModelShape(16, 4, 32, True, (BlockShape(2, 1, width),) * 2)


FULL = shape(64)


def measurement(width: int, ratio: float = 0.5, reference_ms: float = 10.0, **changes: object) -> Measurement:
    made = Measurement(TARGET, shape(width), DECODE, "anchor", FULL.id, ratio, 0.01, 9, reference_ms, "2026.4")
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(str(path)) as opened:
        opened.add_device(DEVICE)
        yield opened


def test_what_goes_in_comes_out(store: Store, path: Path) -> None:
    stored = measurement(8)
    store.add_measurements([stored])
    with Store(f"sqlite:///{path}") as again:
        assert again.devices() == [DEVICE]
        assert again.targets() == [TARGET]
        assert again.measurements() == [replace(stored, typical_reference_ms=10.0)]


def test_filters(store: Store) -> None:
    other_target, prefill = replace(TARGET, threads=1), Workload("prefill", 128)
    rows = [
        measurement(8),
        measurement(16, role="heldout"),
        measurement(8, workload=prefill),
        measurement(8, target=other_target),
        measurement(8, reference_id=shape(8).id),
    ]
    store.add_measurements(rows)

    def found(**filters: object) -> set[int]:
        got = [replace(m, typical_reference_ms=None) for m in store.measurements(**filters)]  # type: ignore[arg-type]
        return {rows.index(m) for m in got}

    assert found() == {0, 1, 2, 3, 4}
    assert found(target=TARGET) == {0, 1, 2, 4}
    assert found(workload=prefill) == {2}
    assert found(roles=["heldout", "repeat"]) == {1}
    assert found(reference_id=FULL.id, target=TARGET) == {0, 1, 2}
    assert store.targets() == [other_target, TARGET]


def test_adding_again_changes_nothing(store: Store) -> None:
    store.add_device(DEVICE)
    store.add_measurements([measurement(8, ratio=0.5)])
    store.add_measurements([measurement(8, ratio=0.9), measurement(8, ratio=0.9, role="repeat")])
    assert [(m.role, m.ratio) for m in store.measurements()] == [("anchor", 0.5), ("repeat", 0.9)]


def test_latency_uses_the_median_reference_of_all_batches(store: Store) -> None:
    """Batches at 10, 12 and 30 ms; the first holds three graphs and yet counts once."""
    store.add_measurements([measurement(width, reference_ms=10.0) for width in (4, 8, 12)])
    store.add_measurements([measurement(16, ratio=0.25, reference_ms=12.0)])
    store.add_measurements([measurement(20, ratio=2.0, reference_ms=30.0, role="heldout")])
    store.add_measurements([measurement(4, reference_ms=99.0, reference_id=shape(4).id)])  # another model
    latency_ms = {m.shape: m.latency_ms for m in store.measurements(reference_id=FULL.id)}
    assert latency_ms == pytest.approx({shape(4): 6, shape(8): 6, shape(12): 6, shape(16): 3, shape(20): 24})
    (stored,) = store.measurements(roles=["heldout"])
    assert stored.latency_ms == pytest.approx(24)
    assert stored.high_ms == pytest.approx(12 * (stored.ratio + stored.spread_ratio))
    assert measurement(4).latency_ms == pytest.approx(5)  # before it is stored: its own batch


def test_a_failing_transaction_stores_nothing(store: Store) -> None:
    stranger = measurement(16, target=replace(TARGET, device_id="unknown"))
    with pytest.raises(StoreError, match="call add_device before"):
        store.add_measurements([measurement(8), stranger])
    assert store.measurements() == []


WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.hw_profiles.test_store import DEVICE, Store, measurement
with Store({path!r}) as store:
    store.add_device(DEVICE)
    for i in range(40):
        store.add_measurements([measurement(2 + {first} + 2 * i), measurement(1000 + i)])
"""


def test_two_processes_create_and_write_at_once(path: Path) -> None:
    """Each adds 40 of its own and the same 40 as the other; the file does not exist before."""
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER.format(root=root, path=str(path), first=first)])
        for first in (0, 1)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    with Store(str(path)) as store:
        widths = sorted(m.shape.blocks[0].intermediate_size for m in store.measurements())
    assert widths == [*range(2, 82), *range(1000, 1040)]


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"important notes, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"profiles.db: file is not a database; .*another path"):
        Store(str(path))
    assert path.read_bytes() == b"important notes, not a database\n" * 100


def test_a_damaged_database(path: Path, store: Store) -> None:
    store.add_measurements([measurement(width) for width in range(1, 200)])
    with store.engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[8192 : len(damaged) // 2] = b"\xff" * (len(damaged) // 2 - 8192)
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"profiles.db.*restore a copy"):
        Store(str(path))
    assert path.read_bytes() == damaged


def test_another_programs_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE holidays (day TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"belongs to another program \(it holds holidays\); give another path"):
        Store(str(path))
    assert path.read_bytes() == before


def test_a_newer_schema(path: Path, store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = 99"))
    with pytest.raises(StoreError, match="schema version 99, wanted 1"):
        Store(str(path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="its folder must exist"):
        Store(str(tmp_path / "absent" / "profiles.db"))


@pytest.mark.parametrize("url", ["oracle://host/db", "nonsense://", "mysql+nothing://host"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"wanted a path or a URL|must be SQLite or PostgreSQL"):
        Store(url)


def test_a_full_disk_keeps_what_was_stored(store: Store) -> None:
    store.add_measurements([measurement(8)])
    with store.engine.connect() as connection:  # the pool holds one connection, so the limit stays
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count={pages + 1}"))
    with pytest.raises(StoreError, match=r"disk is full; free some space"):
        store.add_measurements([measurement(width) for width in range(10, 300)])
    assert [m.shape for m in store.measurements()] == [shape(8)]


def test_an_unwritable_file_size_is_reported(store: Store) -> None:
    """The system refuses to let the file grow, as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        with pytest.raises(StoreError, match=r"profiles\.db"):
            store.add_measurements([measurement(8)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    store.add_measurements([measurement(16)])
    assert [m.shape for m in store.measurements()] == [shape(16)]


def test_readers_and_opens_do_not_wait_for_a_writer(store: Store, path: Path) -> None:
    store.add_measurements([measurement(8)])
    writer = sqlite3.connect(path)
    try:
        writer.execute("BEGIN EXCLUSIVE")
        start_s = time.monotonic()
        with Store(str(path)) as again:
            assert len(again.measurements()) == 1
        assert (time.monotonic() - start_s) * 1e3 < BUSY_TIMEOUT_MS / 10
    finally:
        writer.close()


def test_other_packages_keep_their_tables_beside_ours(store: Store, path: Path) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (id INTEGER PRIMARY KEY)"))
    with Store(str(path)) as again:
        assert again.devices() == [DEVICE]
