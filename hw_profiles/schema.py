"""Versioned tables: created, or brought up to date step by step, in one transaction under a lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, delete, func, insert, inspect, select, text
from sqlalchemy.schema import CreateTable

#: How long a writer waits for another process's transaction.
BUSY_TIMEOUT_MS = 30_000
#: Any number will do, if all writers take the same.
_ADVISORY_LOCK = 0x6E6173

VERSIONS = Table(
    "schema_version",
    MetaData(),
    Column("name", String, primary_key=True),
    Column("version", Integer, nullable=False),
)


class SchemaError(ValueError):
    """The tables are of a later version than this program knows."""


@dataclass(frozen=True)
class Schema:
    """The tables of one package, which share a database with those of others.

    `tables` are those of the last version, in the order of their foreign keys. `migrations[0]` takes version 1 to 2,
    and so on. A migration is never edited once released and spells out its own SQL: `tables` have moved on since.
    """

    name: str
    tables: Sequence[Table]
    migrations: Sequence[Callable[[Connection], None]] = ()

    @property
    def version(self) -> int:
        return 1 + len(self.migrations)

    def open(self, connection: Connection) -> None:
        """Create or migrate the tables in the connection's transaction, which must not have written anything yet.

        Tables that are up to date are only looked at. Raises SchemaError for those of a later version.
        """
        if self._found(connection) == self.version:
            return
        lock_for_writing(connection)
        found = self._found(connection)  # again: another process may have been first
        if found == self.version:
            return
        if found is None:
            for table in (VERSIONS, *self.tables):
                connection.execute(CreateTable(table, if_not_exists=True))
        else:
            for migrate in self.migrations[found - 1 :]:
                migrate(connection)
        connection.execute(delete(VERSIONS).where(VERSIONS.c.name == self.name))
        connection.execute(insert(VERSIONS).values(name=self.name, version=self.version))

    def _found(self, connection: Connection) -> int | None:
        """The version in the database, None where there are no tables."""
        present = inspect(connection).get_table_names()
        found = None
        if VERSIONS.name in present:
            found = connection.scalar(select(VERSIONS.c.version).where(VERSIONS.c.name == self.name))
        if found is None and any(table.name in present for table in self.tables):
            found = 1  # from before its package wrote down versions
        if found is not None and found > self.version:
            raise SchemaError(
                f"the tables of {self.name} have schema version {found}, wanted at most {self.version}; "
                "use the llm-nas that wrote them or a later one, or give another database"
            )
        return found


def lock_for_writing(connection: Connection) -> None:
    """Wait for other writers, and let later ones wait until this transaction ends: on PostgreSQL, too, one at a time.

    Without it two PostgreSQL writers that add the same rows in different orders would deadlock.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text(f"SET LOCAL lock_timeout = {BUSY_TIMEOUT_MS}"))
        connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
