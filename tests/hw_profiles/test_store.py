from __future__ import annotations

import json
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import Connection, inspect, text

from hw_profiles.devices import Device, Target
from hw_profiles.measurement import MemoryMeasurement
from hw_profiles.measurement_tables import SCHEMA, _version_2
from hw_profiles.schema import BUSY_TIMEOUT_MS, lock_for_writing
from hw_profiles.shapes import BlockShape, ModelShape, Workload
from hw_profiles.store import Measurement, Store, StoreError
from tests.processes import run_at_once

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
TARGET = Target(DEVICE.id, "openvino", "int8", 2)
DECODE = Workload("decode", 128)


def shape(width: int) -> ModelShape:
    return ModelShape(16, 4, 32, True, (BlockShape(2, 1, width),) * 2)


FULL = shape(64)


def measurement(width: int, ratio: float = 0.5, reference_ms: float = 10.0, **changes: object) -> Measurement:
    made = Measurement(
        TARGET, shape(width), DECODE, "anchor", FULL.id, ratio, 0.01, 9, {FULL.id: reference_ms}, "2026.4"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def memory(width: int, peak_bytes: int = 10**8, **changes: object) -> MemoryMeasurement:
    made = MemoryMeasurement(TARGET, shape(width), DECODE, "anchor", FULL.id, peak_bytes, 10**7, "2026.4")
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles.db"


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with Store(database_url) as opened:
        opened.add_device(DEVICE)
        yield opened


@pytest.fixture
def sqlite_store(path: Path) -> Iterator[Store]:
    with Store(str(path)) as opened:
        opened.add_device(DEVICE)
        yield opened


def test_what_goes_in_comes_out(store: Store, database_url: str) -> None:
    stored = measurement(8, ratio=1 / 3, affinity="0-1,5")
    store.add_measurements([stored])
    with Store(database_url) as again:
        assert again.devices() == [DEVICE]
        assert again.targets() == [TARGET]
        assert again.measurements() == [replace(stored, profile_ms={FULL.id: 10.0})]


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
        got = [replace(m, profile_ms=None) for m in store.measurements(**filters)]  # type: ignore[arg-type]
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
    standard_error = 1.25 * 1.48 * stored.spread_ratio / stored.repeats**0.5
    assert stored.high_ms == pytest.approx(12 * (stored.ratio + 2 * standard_error))
    assert measurement(4).latency_ms == pytest.approx(5)  # before it is stored: its own batch


def test_each_reference_has_a_median_of_its_own(store: Store) -> None:
    """The second batch fell into a spell that only large graphs felt, and knew a third reference."""
    small, third = shape(4), shape(6)
    store.add_measurements(
        [
            measurement(8, ratio=1.0, references_ms={FULL.id: 16.0, small.id: 4.0}),
            measurement(12, ratio=1.0, references_ms={FULL.id: 20.0, small.id: 4.0, third.id: 10.0}),
            measurement(64, ratio=2.0, role="reference", references_ms={FULL.id: 16.0, small.id: 4.0}),
        ]
    )
    first, second, full = store.measurements()
    assert first.profile_ms == second.profile_ms == {FULL.id: 18.0, small.id: 4.0, third.id: 10.0}
    assert full.latency_ms == 18.0
    assert full.is_full_model
    assert 8.0 < first.latency_ms < 8.0 * (18 / 16)
    mean_ms = (20.0 * 4.0 * 10.0) ** (1 / 3)
    assert mean_ms * (18 / 20) < second.latency_ms < mean_ms


def test_finalists_do_not_move_what_a_profile_took(store: Store) -> None:
    """They are timed later, here on a machine that has become half as fast: only their ratio counts."""
    profiled = [measurement(8, reference_ms=10.0), measurement(12, reference_ms=12.0)]
    finalists = [measurement(width, ratio=0.5, role="finalist", reference_ms=24.0 + width) for width in (4, 16, 20)]
    store.add_measurements([*profiled, *finalists])
    assert all(m.profile_ms == {FULL.id: 11.0} for m in store.measurements())
    assert [m.latency_ms for m in store.measurements(roles=["finalist"])] == pytest.approx([5.5] * 3)


def test_versions_of_a_runtime_are_kept_apart(store: Store) -> None:
    """The new version's reference takes 30 ms where the old one's took 10."""
    store.add_measurements([measurement(8), measurement(12)])
    store.add_measurements([measurement(8, ratio=0.4, reference_ms=30.0, runtime_version="2026.5")])
    both = store.measurements()
    assert [m.runtime_version for m in both] == ["2026.4", "2026.4", "2026.5"]
    assert [m.latency_ms for m in both] == pytest.approx([5.0, 5.0, 12.0])
    assert store.measurements(runtime_version="2026.4") == both[:2]
    assert store.measurements(runtime_version="2026.5") == both[2:]
    assert store.measurements(runtime_version="2026.6") == []


def test_memory_goes_in_and_out_once_for_each_version(store: Store, database_url: str) -> None:
    """More than 4 GiB, which 32 bits do not hold; energy where it is known."""
    stored = [
        memory(8, 5 * 2**30, step_joules=1 / 3),
        memory(8, workload=Workload("prefill", 128)),
        memory(8, runtime_version="2026.5"),
        memory(8, role="heldout"),
    ]
    store.add_memory_measurements(stored[:2])
    store.add_memory_measurements([memory(8, 1), *stored[2:]])  # the first is there already
    others = [memory(8, reference_id=shape(8).id), memory(8, target=replace(TARGET, threads=1))]
    store.add_memory_measurements(others)
    with Store(database_url) as again:
        assert again.memory_measurements(TARGET, reference_id=FULL.id) == stored
        assert again.memory_measurements(others[1].target, reference_id=FULL.id) == others[1:]
        assert again.measurements() == []
    with pytest.raises(StoreError, match="call add_device before"):
        store.add_memory_measurements([memory(16, target=replace(TARGET, device_id="unknown"))])


def test_a_failing_transaction_stores_nothing(store: Store) -> None:
    stranger = measurement(16, target=replace(TARGET, device_id="unknown"))
    with pytest.raises(StoreError, match="call add_device before"):
        store.add_measurements([measurement(8), stranger])
    assert store.measurements() == []


WRITER = """
from tests.hw_profiles.test_store import DEVICE, Store, measurement, memory
wait()
with Store({url!r}) as store:
    store.add_device(DEVICE)
    for i in range(25):
        shared = [measurement(1000 + i), measurement(2000 + i)]
        own = [measurement(1 + 4 * i + {number})]
        store.add_measurements(own + (shared if {number} % 2 else shared[::-1]))
        store.add_memory_measurements([memory(1000 + i), memory({number})][:: 1 if {number} % 2 else -1])
"""


def test_four_processes_create_and_write_at_once(database_url: str) -> None:
    """Each adds 25 of its own and the same 50 as the others, two of them the other way round."""
    assert run_at_once([WRITER.format(url=database_url, number=number) for number in range(4)]) == [(0, "")] * 4
    with Store(database_url) as store:
        widths = [m.shape.blocks[0].intermediate_size for m in store.measurements()]
        memories = store.memory_measurements(TARGET, reference_id=FULL.id)
    assert sorted(widths) == [*range(1, 101), *range(1000, 1025), *range(2000, 2025)]
    assert {m.shape for m in memories} == {shape(width) for width in (*range(4), *range(1000, 1025))}
    assert len(memories) == 4 + 25


VERSION_1 = """
CREATE TABLE schema_version (name VARCHAR NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name));
CREATE TABLE devices (id VARCHAR NOT NULL, description VARCHAR NOT NULL, PRIMARY KEY (id));
CREATE TABLE measurements (
    id {id_type} NOT NULL, device_id VARCHAR NOT NULL, runtime VARCHAR NOT NULL, precision VARCHAR NOT NULL,
    threads INTEGER NOT NULL, reference_id VARCHAR NOT NULL, shape_id VARCHAR NOT NULL, shape VARCHAR NOT NULL,
    phase VARCHAR NOT NULL, tokens INTEGER NOT NULL, batch_size INTEGER NOT NULL, role VARCHAR NOT NULL,
    ratio FLOAT NOT NULL, spread_ratio FLOAT NOT NULL, repeats INTEGER NOT NULL, reference_ms FLOAT NOT NULL,
    runtime_version VARCHAR NOT NULL, created_at VARCHAR NOT NULL, PRIMARY KEY (id),
    UNIQUE (device_id, runtime, precision, threads, reference_id, shape_id, phase, tokens, batch_size, role),
    FOREIGN KEY(device_id) REFERENCES devices (id)
);
INSERT INTO schema_version VALUES ('hw_profiles', 1)
"""


def old_database(url: str, stored: Sequence[Measurement]) -> None:
    """As version 1 left it, but for the rows, which are put in last to first: their ids decide the order."""
    with Store(url) as template:
        engine = template.engine
        with engine.begin() as connection:
            for table in ("memory_measurements", "measurements", "devices", "schema_version"):
                connection.execute(text(f"DROP TABLE {table}"))
            id_type = "SERIAL" if engine.dialect.name == "postgresql" else "INTEGER"
            for statement in VERSION_1.format(id_type=id_type).split(";"):
                connection.execute(text(statement))
            connection.execute(
                text("INSERT INTO devices VALUES (:id, :description)"),
                {"id": DEVICE.id, "description": json.dumps(asdict(DEVICE))},
            )
            for number, old in reversed(list(enumerate(stored, 1))):
                values = {
                    "id": 10 * number,
                    **asdict(old.target),
                    "reference_id": old.reference_id,
                    "shape_id": old.shape.id,
                    "shape": old.shape.to_json(),
                    **asdict(old.workload),
                    **{name: getattr(old, name) for name in ("role", "ratio", "spread_ratio", "repeats")},
                    "reference_ms": old.references_ms[FULL.id],
                    "runtime_version": old.runtime_version,
                    "created_at": old.created_at.isoformat(),
                }
                columns = ", ".join(values)
                connection.execute(text(f"INSERT INTO measurements ({columns}) VALUES (:{', :'.join(values)})"), values)


def layout(store: Store) -> dict[str, object]:
    found = inspect(store.engine)
    tables = {}
    for name in found.get_table_names():
        columns = [(c["name"], c["type"].python_type.__name__, c["nullable"]) for c in found.get_columns(name)]
        keys = {tuple(key["column_names"]) for key in found.get_unique_constraints(name)}
        foreign = {(tuple(key["constrained_columns"]), key["referred_table"]) for key in found.get_foreign_keys(name)}
        tables[name] = sorted(columns), keys, foreign, found.get_pk_constraint(name)["constrained_columns"]
    return tables


def test_a_database_of_version_1_is_migrated(database_url: str) -> None:
    stored = [measurement(width, ratio=1 / width) for width in (8, 12, 4)]
    with Store(database_url) as new:
        new_layout = layout(new)
    old_database(database_url, stored)
    with Store(database_url) as store:
        assert store.devices() == [DEVICE]
        assert store.measurements() == [replace(m, profile_ms={FULL.id: 10.0}) for m in stored]
        assert {m.affinity for m in store.measurements()} == {""}
        assert layout(store) == new_layout
        assert set(new_layout) == {"schema_version", "devices", "measurements", "memory_measurements"}
        store.add_memory_measurements([memory(8, 5 * 2**30)])
        assert store.memory_measurements(TARGET, reference_id=FULL.id)[0].peak_bytes == 5 * 2**30
        upgraded = measurement(8, runtime_version="2026.5", affinity="0-1")
        store.add_measurements([measurement(8, ratio=0.9), upgraded])  # the first is there already
        assert [m.ratio for m in store.measurements()] == [1 / 8, 1 / 12, 1 / 4, 0.5]
    with Store(database_url) as again:
        assert len(again.measurements()) == 4


def test_many_open_an_old_database_at_once(database_url: str) -> None:
    stored = [measurement(width) for width in range(1, 50)]
    old_database(database_url, stored)
    barrier = Barrier(4, timeout=30)

    def read(_: int) -> int:
        barrier.wait()
        with Store(database_url) as store:
            return len(store.measurements())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [49] * 4


def test_a_migration_that_fails_leaves_the_old_version(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old_database(database_url, [measurement(8)])

    def fails(connection: Connection) -> None:
        _version_2(connection)
        raise RuntimeError("power cut")

    monkeypatch.setattr("hw_profiles.store.SCHEMA", replace(SCHEMA, migrations=[fails]))
    with pytest.raises(RuntimeError, match="power cut"):
        Store(database_url)
    monkeypatch.undo()
    with Store(database_url) as store:
        assert [m.shape for m in store.measurements()] == [shape(8)]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE measurements SET shape = '{}'",
        "UPDATE measurements SET shape = 'x'",
        "UPDATE measurements SET references_ms = '[]'",
        "UPDATE measurements SET created_at = 'yesterday'",
        "UPDATE devices SET description = '{}'",
    ],
)
def test_a_row_that_is_none_of_ours(sqlite_store: Store, change: str) -> None:
    sqlite_store.add_measurements([measurement(8)])
    with sqlite_store.transaction() as session:
        session.execute(text(change))
    with pytest.raises(StoreError, match=r"profiles.db holds a row that this version cannot read .*restore a copy"):
        (sqlite_store.devices(), sqlite_store.measurements())


@pytest.mark.parametrize("name", ["what?.db", "a%20b.db", "what?timeout=x.db"])
def test_a_path_may_hold_what_has_a_meaning_in_urls(tmp_path: Path, name: str) -> None:
    with Store(str(tmp_path / name)) as store:
        store.add_device(DEVICE)
    assert (tmp_path / name).exists()


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"important notes, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"profiles.db: file is not a database; .*another path"):
        Store(str(path))
    assert path.read_bytes() == b"important notes, not a database\n" * 100


def test_a_damaged_database(path: Path, sqlite_store: Store) -> None:
    store = sqlite_store
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


def test_another_programs_postgresql_database(postgresql_url: str) -> None:
    import psycopg

    with psycopg.connect(postgresql_url) as connection:
        connection.execute("CREATE TABLE holidays (day TEXT)")
    with pytest.raises(StoreError, match=r"belongs to another program \(it holds holidays\)"):
        Store(postgresql_url)


def test_another_programs_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE holidays (day TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"belongs to another program \(it holds holidays\); give another path"):
        Store(str(path))
    assert path.read_bytes() == before


def test_a_newer_schema(database_url: str, store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = 99"))
    with pytest.raises(
        StoreError, match=r"the tables of hw_profiles have schema version 99, wanted at most 4; use the"
    ):
        Store(database_url)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="its folder must exist"):
        Store(str(tmp_path / "absent" / "profiles.db"))


@pytest.mark.parametrize("url", ["oracle://host/db", "nonsense://", "mysql+nothing://host"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="must be SQLite or PostgreSQL: wanted a path or a URL"):
        Store(url)


@pytest.mark.parametrize("url", ["", "sqlite:///"])
def test_an_empty_name_is_not_taken_for_memory(url: str) -> None:
    """Of a variable that was not set: what is measured must not end with the process."""
    with pytest.raises(StoreError, match="wanted a file or a server to keep measurements in"):
        Store(url)


@pytest.mark.parametrize("url", ["postgresql://host:port/d", "sqlite:///profiles.db?timeout=abc"])
def test_urls_with_damaged_parts_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"wanted a path or a URL|names an option that the database does not have"):
        Store(url)


@pytest.mark.parametrize("url", ["postgresql://u:secret@h/d", "postgres://u:secret@h/d", "postgresql+psycopg://u@h/d"])
def test_without_its_driver_postgresql_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"needs a driver.*pip install 'psycopg\[binary\]'") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


def test_other_drivers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(StoreError, match=r"needs a driver.*psycopg2"):
        Store("postgresql+psycopg2://u@h/d")
    with pytest.raises(StoreError, match="Can't load plugin"):
        Store("postgresql+nothing://u@h/d")
    with pytest.raises(StoreError, match="begin with postgresql://"):
        Store("postgresql+asyncpg://u@h/d")  # not installed


def test_an_asynchronous_driver_is_refused() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="names an asynchronous driver; let the URL begin with postgresql://"):
        Store("postgresql+psycopg_async://u@h/d")


def test_a_server_that_is_not_there(postgresql_server: str, tmp_path: Path) -> None:
    for url in (
        "postgresql://u:secret@127.0.0.1:9/d?connect_timeout=5",
        f"postgresql://u@/d?host={tmp_path}",
        postgresql_server.replace("/postgres?", "/nonesuch?"),
    ):
        with pytest.raises(StoreError, match=r"start the server, or correct the host") as refused:
            Store(url)
        assert "\n" not in str(refused.value)
        assert "secret" not in str(refused.value)


def test_a_connection_that_the_server_dropped_is_made_again(postgresql_url: str) -> None:
    import psycopg

    with Store(postgresql_url) as store:
        store.add_device(DEVICE)
        with psycopg.connect(postgresql_url) as connection:
            others = "datname = current_database() AND pid != pg_backend_pid()"
            connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        store.add_measurements([measurement(8)])
        assert len(store.measurements()) == 1


def test_a_postgresql_writer_that_never_ends(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.schema.BUSY_TIMEOUT_MS", 200)
    with Store(postgresql_url) as store, store.transaction() as session:
        lock_for_writing(session.connection())
        with Store(postgresql_url) as other, pytest.raises(StoreError, match="another process holds it, run again"):
            other.add_measurements([measurement(8)])


def test_a_full_disk_keeps_what_was_stored(sqlite_store: Store) -> None:
    store = sqlite_store
    store.add_measurements([measurement(8)])
    with store.engine.connect() as connection:  # the pool holds one connection, so the limit stays
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count={pages + 1}"))
    with pytest.raises(StoreError, match=r"disk is full; free some space"):
        store.add_measurements([measurement(width) for width in range(10, 300)])
    assert [m.shape for m in store.measurements()] == [shape(8)]


def test_an_unwritable_file_size_is_reported(sqlite_store: Store) -> None:
    """The system refuses to let the file grow, as a quota would."""
    store = sqlite_store
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


def test_readers_and_opens_do_not_wait_for_a_writer(sqlite_store: Store, path: Path) -> None:
    sqlite_store.add_measurements([measurement(8)])
    writer = sqlite3.connect(path)
    try:
        writer.execute("BEGIN EXCLUSIVE")
        start_s = time.monotonic()
        with Store(str(path)) as again:
            assert len(again.measurements()) == 1
        assert (time.monotonic() - start_s) * 1e3 < BUSY_TIMEOUT_MS / 10
    finally:
        writer.close()


def test_other_packages_keep_their_tables_beside_ours(store: Store, database_url: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (id INTEGER PRIMARY KEY)"))
    with Store(database_url) as again:
        assert again.devices() == [DEVICE]
