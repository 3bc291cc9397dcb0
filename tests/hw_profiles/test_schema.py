from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, Table, inspect, text

from hw_profiles.schema import Schema, SchemaError
from hw_profiles.store import Store


def table(*columns: str) -> Table:
    return Table("toys", MetaData(), Column("id", Integer, primary_key=True), *(Column(c, String) for c in columns))


def adds(column: str, then: str | None = None) -> object:
    def migrate(connection: Connection) -> None:
        connection.execute(text(f"ALTER TABLE toys ADD COLUMN {column} VARCHAR"))
        if then:
            connection.execute(text(then))

    return migrate


def schema(*columns: str, last: str | None = None) -> Schema:
    """One column in version 1, one more in each that follows."""
    steps = [adds(column, last if column == columns[-1] else None) for column in columns[1:]]
    return Schema("toys", [table(*columns)], steps)  # type: ignore[arg-type]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    with Store(database_url) as store:
        yield store.engine


def open_with(engine: Engine, wanted: Schema) -> None:
    with engine.begin() as connection:
        wanted.open(connection)


def state(engine: Engine) -> tuple[Sequence[str], int | None]:
    with engine.connect() as connection:
        version = connection.scalar(text("SELECT version FROM schema_version WHERE name = 'toys'"))
        return [column["name"] for column in inspect(connection).get_columns("toys")], version


def test_new_tables_are_made_in_their_last_version(engine: Engine) -> None:
    open_with(engine, schema("a", "b", "c"))
    assert state(engine) == (["id", "a", "b", "c"], 3)


def test_every_missing_step_is_taken_once_and_rows_stay(engine: Engine) -> None:
    open_with(engine, schema("a"))
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO toys (id, a) VALUES (7, 'bear')"))
    for wanted in (schema("a", "b"), schema("a", "b"), schema("a", "b", "c", "d")):
        open_with(engine, wanted)
    assert state(engine) == (["id", "a", "b", "c", "d"], 4)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM toys")).all() == [(7, "bear", None, None, None)]


def test_tables_from_before_versions_were_written_are_version_1(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE toys (id INTEGER PRIMARY KEY, a VARCHAR)"))
    open_with(engine, schema("a"))  # nothing to do, hence nothing written: it may be read-only
    assert state(engine) == (["id", "a"], None)
    open_with(engine, schema("a", "b"))
    assert state(engine) == (["id", "a", "b"], 2)


def test_a_later_version_is_refused_and_left_alone(engine: Engine) -> None:
    open_with(engine, schema("a", "b", "c"))
    with pytest.raises(
        SchemaError, match="the tables of toys have schema version 3, wanted at most 2; use the llm-nas"
    ):
        open_with(engine, schema("a", "b"))
    assert state(engine) == (["id", "a", "b", "c"], 3)


def test_steps_are_taken_all_or_not_at_all(engine: Engine, database_url: str) -> None:
    open_with(engine, schema("a"))
    with pytest.raises(Exception, match="nonesuch"):
        open_with(engine, schema("a", "b", "c", last="DELETE FROM nonesuch"))
    assert state(engine) == (["id", "a"], 1)
    open_with(engine, schema("a", "b"))
    assert state(engine) == (["id", "a", "b"], 2)
