"""The measurement database: an SQLite file by default, PostgreSQL by URL. Ratios are stored, latencies are read.

Only the ratio to the reference graph and the reference's own latency in that batch are stored. Readers get
latency = ratio * median of the reference's latency over all batches, so that a batch timed in a slow hour, or resumed
on another day, is put on the same footing as the others.
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

from sqlalchemy import Engine, ForeignKey, UniqueConstraint, create_engine, event, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateTable

from hw_profiles.devices import Device, Target
from hw_profiles.measurement import Measurement, Role
from hw_profiles.shapes import ModelShape, Phase, Precision, Workload

SCHEMA_VERSION = 1
#: How long a writer waits for another process's transaction.
BUSY_TIMEOUT_MS = 30_000


class StoreError(ValueError):
    """The database cannot be used. The message says where, why, and what to do."""


class _Base(DeclarativeBase):
    pass


class _SchemaVersion(_Base):
    __tablename__ = "schema_version"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]


class _Device(_Base):
    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    #: The fields of Device as JSON.
    description: Mapped[str]


class _Measurement(_Base):
    __tablename__ = "measurements"
    __table_args__ = (
        UniqueConstraint(
            *("device_id", "runtime", "precision", "threads"),
            *("reference_id", "shape_id", "phase", "tokens", "batch_size", "role"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey(_Device.id))
    runtime: Mapped[str]
    precision: Mapped[str]
    threads: Mapped[int]
    reference_id: Mapped[str]
    shape_id: Mapped[str]
    shape: Mapped[str]
    phase: Mapped[str]
    tokens: Mapped[int]
    batch_size: Mapped[int]
    role: Mapped[str]
    ratio: Mapped[float]
    spread_ratio: Mapped[float]
    repeats: Mapped[int]
    reference_ms: Mapped[float]
    runtime_version: Mapped[str]
    created_at: Mapped[str]


class Store:
    """Devices and measurements. `url` is an SQLAlchemy URL or the path of an SQLite file, created if absent.

    Other packages keep their own tables, in their own metadata, on `engine`.
    """

    def __init__(self, url: str) -> None:
        if "://" not in url:
            url = f"sqlite:///{url}"
        try:
            self.where = make_url(url).render_as_string(hide_password=True)
            self.engine: Engine = create_engine(url)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise StoreError(f"wanted a path or a URL such as sqlite:///profiles.db, got {url}: {error}") from error
        if self.engine.dialect.name not in ("sqlite", "postgresql"):
            raise StoreError(f"the database must be SQLite or PostgreSQL, got {self.where}")
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
            self._insert_new(session, _Device, [{"id": device.id, "description": description}])

    def devices(self) -> list[Device]:
        with self.transaction() as session:
            rows = session.scalars(select(_Device).order_by(_Device.id)).all()
            return [_device(row.description) for row in rows]

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Add all or, on an error, none. A measurement that is there already is kept and the new one dropped."""
        if not measurements:
            return
        with self.transaction() as session:
            self._insert_new(session, _Measurement, [_to_row(measurement) for measurement in measurements])

    def measurements(
        self,
        target: Target | None = None,
        workload: Workload | None = None,
        roles: Collection[Role] | None = None,
        reference_id: str | None = None,
    ) -> list[Measurement]:
        """In the order they were added. `reference_id` picks the model: the id of its full shape."""
        query = select(_Measurement).order_by(_Measurement.id)
        if target is not None:
            query = query.filter_by(**asdict(target))
        if workload is not None:
            query = query.filter_by(**asdict(workload))
        if reference_id is not None:
            query = query.filter_by(reference_id=reference_id)
        with self.transaction() as session:
            found = [_from_row(row) for row in session.scalars(query)]
        typical_ms = _typical_reference_ms(found)
        return [
            replace(measurement, typical_reference_ms=typical_ms[_reference_key(measurement)])
            for measurement in found
            if roles is None or measurement.role in roles
        ]

    def targets(self) -> list[Target]:
        """The targets with at least one measurement."""
        columns = (_Measurement.device_id, _Measurement.runtime, _Measurement.precision, _Measurement.threads)
        with self.transaction() as session:
            rows = session.execute(select(*columns).distinct()).all()
        return sorted(
            Target(device, runtime, cast(Precision, bits), threads) for device, runtime, bits, threads in rows
        )

    def _open(self) -> None:
        """Check that the database is ours, sound, and of this version; create what is missing."""
        with self.transaction() as session:
            connection = session.connection()
            tables = inspect(connection).get_table_names()
            if tables and _SchemaVersion.__tablename__ not in tables:
                raise StoreError(
                    f"{self.where} belongs to another program (it holds {', '.join(tables[:3])}); give another path"
                )
            if self.engine.dialect.name == "sqlite":
                verdict = " ".join(str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()).split())
                if verdict != "ok":
                    raise StoreError(f"{self.where} is damaged ({verdict}); restore a copy or give another path")
            # the version first: a process that opens the file in between must not take it for a foreign one
            for model in (_SchemaVersion, _Device, _Measurement):
                if model.__tablename__ not in tables:  # an open of a complete file waits for no writer
                    table = _Base.metadata.tables[model.__tablename__]
                    session.execute(CreateTable(table, if_not_exists=True))
            query = select(_SchemaVersion.version).filter_by(name="hw_profiles")
            version = session.scalars(query).one_or_none()
            if version is None:
                self._insert_new(session, _SchemaVersion, [{"name": "hw_profiles", "version": SCHEMA_VERSION}])
                version = session.scalars(query).one()
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.where} has schema version {version}, wanted {SCHEMA_VERSION}; "
                "use the llm-nas that wrote it or give another path"
            )
        if self.engine.dialect.name == "sqlite":
            with self.transaction() as session:  # only now: a foreign file must stay as it is
                session.connection().exec_driver_sql("PRAGMA journal_mode=WAL")  # readers never wait for a writer

    def _insert_new(self, session: Session, table: type[_Base], rows: list[dict[str, Any]]) -> None:
        """Insert the rows whose keys are not there yet, also if another process inserts them at the same moment."""
        insert = sqlite.insert if self.engine.dialect.name == "sqlite" else postgresql.insert
        session.execute(insert(table).on_conflict_do_nothing(), rows)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commit at the end or roll everything back; the database's errors come out as one sentence."""
        try:
            with Session(self.engine) as session, session.begin():
                yield session
        except DBAPIError as error:
            reason = str(error.orig).strip()
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
    "no such column": "another program wrote it, give another path",
}


def _remedy(reason: str) -> str:
    return next((remedy for part, remedy in _REMEDIES.items() if part in reason), "give another path or URL")


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
    return {
        **asdict(measurement.target),
        **asdict(measurement.workload),
        "reference_id": measurement.reference_id,
        "shape_id": measurement.shape.id,
        "shape": measurement.shape.to_json(),
        "role": measurement.role,
        "ratio": measurement.ratio,
        "spread_ratio": measurement.spread_ratio,
        "repeats": measurement.repeats,
        "reference_ms": measurement.reference_ms,
        "runtime_version": measurement.runtime_version,
        "created_at": measurement.created_at.isoformat(),
    }


_parse_shape = functools.lru_cache(maxsize=4096)(ModelShape.from_json)


def _from_row(row: _Measurement) -> Measurement:
    return Measurement(
        target=Target(row.device_id, row.runtime, cast(Precision, row.precision), row.threads),
        shape=_parse_shape(row.shape),
        workload=Workload(cast(Phase, row.phase), row.tokens, row.batch_size),
        role=cast(Role, row.role),
        reference_id=row.reference_id,
        ratio=row.ratio,
        spread_ratio=row.spread_ratio,
        repeats=row.repeats,
        reference_ms=row.reference_ms,
        runtime_version=row.runtime_version,
        created_at=datetime.fromisoformat(row.created_at),
    )


def _reference_key(measurement: Measurement) -> tuple[Target, Workload, str]:
    return measurement.target, measurement.workload, measurement.reference_id


def _typical_reference_ms(measurements: Sequence[Measurement]) -> dict[tuple[Target, Workload, str], float]:
    """Median over batches; those of one batch share the very same `reference_ms`, which counts once."""
    of_batches: dict[tuple[Target, Workload, str], set[float]] = {}
    for measurement in measurements:
        of_batches.setdefault(_reference_key(measurement), set()).add(measurement.reference_ms)
    return {key: statistics.median(values) for key, values in of_batches.items()}
