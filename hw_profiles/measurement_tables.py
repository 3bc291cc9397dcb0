"""The tables of the measurement database, and the steps that bring those of earlier versions up to date."""

from __future__ import annotations

from sqlalchemy import BigInteger, Connection, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

from hw_profiles.schema import Schema


class Row(DeclarativeBase):
    pass


class DeviceRow(Row):
    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    #: The fields of Device as JSON.
    description: Mapped[str]


class GraphRow:
    """One graph on one workload of one target, there once for each role and version of the runtime."""

    @declared_attr.directive
    def __table_args__(cls) -> tuple[UniqueConstraint]:  # noqa: N805
        return (
            UniqueConstraint(
                *("device_id", "runtime", "precision", "threads"),
                *("reference_id", "shape_id", "phase", "tokens", "batch_size", "role", "runtime_version"),
            ),
        )

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
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
    runtime_version: Mapped[str]
    created_at: Mapped[str]


class MeasurementRow(GraphRow, Row):
    __tablename__ = "measurements"

    ratio: Mapped[float]
    spread_ratio: Mapped[float]
    repeats: Mapped[int]
    #: JSON: milliseconds by shape id.
    references_ms: Mapped[str]
    affinity: Mapped[str]


class MemoryMeasurementRow(GraphRow, Row):
    __tablename__ = "memory_measurements"

    peak_bytes: Mapped[int] = mapped_column(BigInteger)
    baseline_bytes: Mapped[int] = mapped_column(BigInteger)
    step_joules: Mapped[float | None]


def _version_2(connection: Connection) -> None:
    """Adds `affinity`, and `runtime_version` to what makes a measurement unique; SQLite can only copy for that."""
    number = "SERIAL" if connection.dialect.name == "postgresql" else "INTEGER"
    key = "device_id, runtime, precision, threads, reference_id, shape_id, phase, tokens, batch_size, role"
    copied = f"{key}, shape, ratio, spread_ratio, repeats, reference_ms, runtime_version, created_at"
    connection.exec_driver_sql(
        f"""
        CREATE TABLE measurements_2 (
            id {number} NOT NULL PRIMARY KEY,
            device_id VARCHAR NOT NULL REFERENCES devices (id),
            runtime VARCHAR NOT NULL,
            precision VARCHAR NOT NULL,
            threads INTEGER NOT NULL,
            reference_id VARCHAR NOT NULL,
            shape_id VARCHAR NOT NULL,
            shape VARCHAR NOT NULL,
            phase VARCHAR NOT NULL,
            tokens INTEGER NOT NULL,
            batch_size INTEGER NOT NULL,
            role VARCHAR NOT NULL,
            ratio DOUBLE PRECISION NOT NULL,
            spread_ratio DOUBLE PRECISION NOT NULL,
            repeats INTEGER NOT NULL,
            reference_ms DOUBLE PRECISION NOT NULL,
            runtime_version VARCHAR NOT NULL,
            affinity VARCHAR NOT NULL,
            created_at VARCHAR NOT NULL,
            UNIQUE ({key}, runtime_version)
        )
        """
    )
    connection.exec_driver_sql(
        f"INSERT INTO measurements_2 ({copied}, affinity) SELECT {copied}, '' FROM measurements ORDER BY id"
    )
    connection.exec_driver_sql("DROP TABLE measurements")
    connection.exec_driver_sql("ALTER TABLE measurements_2 RENAME TO measurements")


def _version_3(connection: Connection) -> None:
    """Adds the measurements of memory and energy."""
    number = "SERIAL" if connection.dialect.name == "postgresql" else "INTEGER"
    key = "device_id, runtime, precision, threads, reference_id, shape_id, phase, tokens, batch_size, role"
    connection.exec_driver_sql(
        f"""
        CREATE TABLE memory_measurements (
            id {number} NOT NULL PRIMARY KEY,
            device_id VARCHAR NOT NULL REFERENCES devices (id),
            runtime VARCHAR NOT NULL,
            precision VARCHAR NOT NULL,
            threads INTEGER NOT NULL,
            reference_id VARCHAR NOT NULL,
            shape_id VARCHAR NOT NULL,
            shape VARCHAR NOT NULL,
            phase VARCHAR NOT NULL,
            tokens INTEGER NOT NULL,
            batch_size INTEGER NOT NULL,
            role VARCHAR NOT NULL,
            peak_bytes BIGINT NOT NULL,
            baseline_bytes BIGINT NOT NULL,
            step_joules DOUBLE PRECISION,
            runtime_version VARCHAR NOT NULL,
            created_at VARCHAR NOT NULL,
            UNIQUE ({key}, runtime_version)
        )
        """
    )


def _version_4(connection: Connection) -> None:
    """Several references instead of the full model alone."""
    connection.exec_driver_sql("ALTER TABLE measurements ADD COLUMN references_ms VARCHAR NOT NULL DEFAULT '{}'")
    connection.exec_driver_sql(
        """UPDATE measurements SET references_ms = '{"' || reference_id || '": ' || reference_ms || '}'"""
    )
    connection.exec_driver_sql("ALTER TABLE measurements DROP COLUMN reference_ms")


SCHEMA = Schema("hw_profiles", Row.metadata.sorted_tables, migrations=[_version_2, _version_3, _version_4])
