"""The measurement database: an SQLite file by default, PostgreSQL by URL. Ratios are stored, latencies are read.

Only the ratio to the references and their own latencies in that batch are stored. Readers get the latency at which the
references take their median over all batches, so that a batch timed in a slow hour, or resumed on another day, is put
on the same footing as the others. Versions of a runtime are kept apart: each has its own references' latencies, and a
graph timed with another version is another measurement.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, cast

from sqlalchemy import URL, Engine, create_engine, event, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from hw_profiles.devices import Device, Target
from hw_profiles.measurement import FINALIST_ROLES, Measurement, MemoryMeasurement, Role
from hw_profiles.measurement_tables import SCHEMA, DeviceRow, GraphRow, MeasurementRow, MemoryMeasurementRow, Row
from hw_profiles.schema import BUSY_TIMEOUT_MS, VERSIONS, SchemaError, lock_for_writing
from hw_profiles.shapes import ModelShape, Phase, Precision, Workload


class StoreError(ValueError):
    """The database cannot be used. The message says where, why, and what to do."""


class Store:
    """Devices and measurements. `url` is the path of an SQLite file, created if absent, or an SQLAlchemy URL.

    `postgresql://` stands for the driver psycopg 3; a URL may name another, such as `postgresql+psycopg2://`.
    Other packages keep their own tables on `engine`, each with a `Schema` of its own.
    """

    def __init__(self, url: str) -> None:
        self.engine: Engine = _engine(url)
        self.where = self.engine.url.render_as_string(hide_password=True)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_device(self, device: Device) -> None:
        """Remember a device; one that is known already stays as it is."""
        description = json.dumps(asdict(device), sort_keys=True)
        with self.transaction() as session:
            self._insert_new(session, DeviceRow, [{"id": device.id, "description": description}])

    def devices(self) -> list[Device]:
        with self.transaction() as session:
            rows = session.scalars(select(DeviceRow).order_by(DeviceRow.id)).all()
            with self.readable_rows():
                return [_device(row.description) for row in rows]

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Add all or, on an error, none. A measurement that is there already is kept and the new one dropped."""
        if not measurements:
            return
        with self.transaction() as session:
            lock_for_writing(session.connection())
            self._insert_new(session, MeasurementRow, [_to_row(measurement) for measurement in measurements])

    def add_memory_measurements(self, measurements: Sequence[MemoryMeasurement]) -> None:
        """As `add_measurements`."""
        if not measurements:
            return
        with self.transaction() as session:
            lock_for_writing(session.connection())
            self._insert_new(
                session, MemoryMeasurementRow, [_to_memory_row(measurement) for measurement in measurements]
            )

    def measurements(
        self,
        target: Target | None = None,
        workload: Workload | None = None,
        roles: Collection[Role] | None = None,
        reference_id: str | None = None,
        runtime_version: str | None = None,
    ) -> list[Measurement]:
        """In the order they were added, of all versions of the runtime unless one is asked for.

        `reference_id` picks the model: the id of its full shape.
        """
        query = select(MeasurementRow).order_by(MeasurementRow.id)
        if target is not None:
            query = query.filter_by(**asdict(target))
        if workload is not None:
            query = query.filter_by(**asdict(workload))
        if reference_id is not None:
            query = query.filter_by(reference_id=reference_id)
        if runtime_version is not None:
            query = query.filter_by(runtime_version=runtime_version)
        with self.transaction() as session, self.readable_rows():
            found = [_from_row(row) for row in session.scalars(query)]
        profile_ms = _profile_ms(found)
        return [
            replace(measurement, profile_ms=profile_ms[_reference_key(measurement)])
            for measurement in found
            if roles is None or measurement.role in roles
        ]

    def memory_measurements(self, target: Target, *, reference_id: str | None = None) -> list[MemoryMeasurement]:
        """In the order they were added, of all versions of the runtime; `reference_id` as in `measurements`."""
        query = select(MemoryMeasurementRow).order_by(MemoryMeasurementRow.id).filter_by(**asdict(target))
        if reference_id is not None:
            query = query.filter_by(reference_id=reference_id)
        with self.transaction() as session, self.readable_rows():
            return [_from_memory_row(row) for row in session.scalars(query)]

    def targets(self) -> list[Target]:
        """The targets with at least one measurement."""
        columns = (MeasurementRow.device_id, MeasurementRow.runtime, MeasurementRow.precision, MeasurementRow.threads)
        with self.transaction() as session:
            rows = session.execute(select(*columns).distinct()).all()
        return sorted(
            Target(device, runtime, cast(Precision, bits), threads) for device, runtime, bits, threads in rows
        )

    def _open(self) -> None:
        """Check that the database is ours and sound; create what is missing and migrate what is old."""
        with self.transaction() as session:
            connection = session.connection()
            tables = inspect(connection).get_table_names()
            if tables and VERSIONS.name not in tables:
                raise StoreError(
                    f"{self.where} belongs to another program (it holds {', '.join(tables[:3])}); "
                    "give another path or URL"
                )
            if self.engine.dialect.name == "sqlite":
                verdict = " ".join(str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()).split())
                if verdict != "ok":
                    raise StoreError(f"{self.where} is damaged ({verdict}); restore a copy or give another path")
            SCHEMA.open(connection)
        if self.engine.dialect.name == "sqlite":  # only now: a foreign file must stay as it is
            self._let_readers_read_beside_a_writer()

    def _let_readers_read_beside_a_writer(self) -> None:
        """SQLite's write-ahead log. Someone else in the file may prevent it; then whoever opens it next does it."""
        try:
            with self.transaction() as session:
                session.connection().exec_driver_sql("PRAGMA journal_mode=WAL")
        except StoreError as error:
            if "locked" not in str(error):
                raise

    def _insert_new(self, session: Session, table: type[Row], rows: list[dict[str, Any]]) -> None:
        """Insert the rows whose keys are not there yet, also if another process inserts them at the same moment."""
        insert = sqlite.insert if self.engine.dialect.name == "sqlite" else postgresql.insert
        session.execute(insert(table).on_conflict_do_nothing(), rows)

    @contextmanager
    def readable_rows(self) -> Iterator[None]:
        """Rows that are none of ours, or damaged, end in one sentence."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(
                f"{self.where} holds a row that this version cannot read ({type(error).__name__}: {error}); restore a "
                "copy, or use the llm-nas that wrote it"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commit at the end or roll everything back; the database's errors come out as one sentence."""
        try:
            with Session(self.engine) as session, session.begin():
                yield session
        except SchemaError as error:
            raise StoreError(f"{self.where}: {error}") from error
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise StoreError(f"{self.where}: {reason}; {_remedy(reason)}") from error


#: What to do about an error, by a part of the database's own message.
_REMEDIES = {
    "disk is full": "free some space and run again, what was stored before is kept",
    "not a database": "it is not an SQLite file, give another path",
    "malformed": "the file is damaged, restore a copy or give another path",
    "unable to open": "its folder must exist and be writable",
    "readonly": "make the file and its folder writable or give another path",
    "FOREIGN KEY": "call add_device before add_measurements",
    "foreign key": "call add_device before add_measurements",
    "locked": "another process holds it, run again when that one is done",
    "lock timeout": "another process holds it, run again when that one is done",
    "no such column": "another program wrote it, give another path",
    "connection": "start the server, or correct the host, port, user, password or database name of the URL",
    "resolve host": "correct the host of the URL",
    "permission denied": "give the URL's user the right to create tables, or another user",
}


def _remedy(reason: str) -> str:
    return next((remedy for part, remedy in _REMEDIES.items() if part in reason), "give another path or URL")


def _engine(url: str) -> Engine:
    """Connects to nothing yet. StoreError where the URL or its driver cannot be used."""
    try:
        # a path may hold what has a meaning in URLs
        parsed = make_url(url) if "://" in url else URL.create("sqlite", database=url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"wanted a path or a URL such as postgresql://user@host/name, got {url}: {error}") from error
    where = parsed.render_as_string(hide_password=True)
    if parsed.database == "":  # SQLite would take it for memory, where whoever wrote $DATABASE loses all
        raise StoreError(f"wanted a file or a server to keep measurements in, got {url!r}; give a path")
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(
            "the database must be SQLite or PostgreSQL: "
            f"wanted a path or a URL such as postgresql://user@host/name, got {where}"
        )
    try:
        engine = create_engine(parsed, pool_pre_ping=True)  # a profile leaves its connection idle for minutes
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"{where} names an option that the database does not have: {error}") from error
    except ImportError as error:
        raise StoreError(
            f"{where} needs a driver that is not installed ({error}); "
            "pip install 'psycopg[binary]', and let the URL begin with postgresql://"
        ) from error
    if engine.dialect.is_async:
        raise StoreError(f"{where} names an asynchronous driver; let the URL begin with {engine.dialect.name}://")
    return engine


def _configure_sqlite(connection: Any, _: object) -> None:
    """Writers wait for each other instead of failing."""
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _device(description: str) -> Device:
    fields = json.loads(description)
    return Device(**fields | {"instructions": tuple(fields["instructions"])})


def _to_row(measurement: Measurement) -> dict[str, Any]:
    return _key_columns(measurement) | {
        "ratio": measurement.ratio,
        "spread_ratio": measurement.spread_ratio,
        "repeats": measurement.repeats,
        "references_ms": json.dumps(dict(measurement.references_ms)),
        "affinity": measurement.affinity,
    }


def _to_memory_row(measurement: MemoryMeasurement) -> dict[str, Any]:
    return _key_columns(measurement) | {
        "peak_bytes": measurement.peak_bytes,
        "baseline_bytes": measurement.baseline_bytes,
        "step_joules": measurement.step_joules,
    }


def _key_columns(measurement: Measurement | MemoryMeasurement) -> dict[str, Any]:
    return {
        **asdict(measurement.target),
        **asdict(measurement.workload),
        "reference_id": measurement.reference_id,
        "shape_id": measurement.shape.id,
        "shape": measurement.shape.to_json(),
        "role": measurement.role,
        "runtime_version": measurement.runtime_version,
        "created_at": measurement.created_at.isoformat(),
    }


_parse_shape = functools.lru_cache(maxsize=4096)(ModelShape.from_json)


def _from_row(row: MeasurementRow) -> Measurement:
    return Measurement(
        ratio=row.ratio,
        spread_ratio=row.spread_ratio,
        repeats=row.repeats,
        references_ms={shape_id: float(ms) for shape_id, ms in json.loads(row.references_ms).items()},
        affinity=row.affinity,
        **_key_fields(row),
    )


def _from_memory_row(row: MemoryMeasurementRow) -> MemoryMeasurement:
    return MemoryMeasurement(
        peak_bytes=row.peak_bytes,
        baseline_bytes=row.baseline_bytes,
        step_joules=row.step_joules,
        **_key_fields(row),
    )


def _key_fields(row: GraphRow) -> dict[str, Any]:
    return {
        "target": Target(row.device_id, row.runtime, cast(Precision, row.precision), row.threads),
        "shape": _parse_shape(row.shape),
        "workload": Workload(cast(Phase, row.phase), row.tokens, row.batch_size),
        "role": cast(Role, row.role),
        "reference_id": row.reference_id,
        "runtime_version": row.runtime_version,
        "created_at": datetime.fromisoformat(row.created_at),
    }


_ReferenceKey = tuple[Target, Workload, str, str]


def _reference_key(measurement: Measurement) -> _ReferenceKey:
    return measurement.target, measurement.workload, measurement.reference_id, measurement.runtime_version


def _profile_ms(measurements: Sequence[Measurement]) -> dict[_ReferenceKey, dict[str, float]]:
    """Medians over the batches of a profile; those of one batch share the very same latencies, which count once.

    Finalists are timed later, one by one, when the machine may be slower: they must not move what budgets were set by.
    """
    of_profile: dict[_ReferenceKey, dict[str, set[float]]] = {}
    of_finalists: dict[_ReferenceKey, dict[str, set[float]]] = {}
    for measurement in measurements:
        of_batches = of_finalists if measurement.role in FINALIST_ROLES else of_profile
        of_key = of_batches.setdefault(_reference_key(measurement), {})
        for shape_id, value_ms in measurement.references_ms.items():
            of_key.setdefault(shape_id, set()).add(value_ms)
    return {
        key: {shape_id: statistics.median(values_ms) for shape_id, values_ms in of_key.items()}
        for key, of_key in (of_finalists | of_profile).items()
    }
