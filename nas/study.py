"""A study in the database: a model, a space, how quality is measured, and every trial made so far.

Quality does not depend on the device and latency not on the weights, so one study answers for every profiled device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Connection, ForeignKey, PrimaryKeyConstraint, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from hw_profiles import Store
from hw_profiles.schema import Schema
from nas.quality import Quality
from nas.space import SearchSpace
from nas.subnet import Subnet

#: full: all layers kept; seed: an additive solution; search: proposed by evolution on the predictors.
TrialRole = Literal["full", "seed", "search", "refined"]
#: What chooses them: nas.search's own, its additive seeds alone, or a search of nas.published_searches.
Algorithm = Literal["seeded", "additive", "random", "nsga2", "linas"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


class StudyError(ValueError):
    """The study asked for is not there, or was made for something else."""


@dataclass(frozen=True)
class Trial:
    """`additive_kl` is what the additive estimate said before the trial; None where there was none."""

    subnet: Subnet
    quality: Quality
    role: TrialRole
    additive_kl: float | None = None


class _Base(DeclarativeBase):
    pass


class _Study(_Base):
    __tablename__ = "studies"

    name: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    fingerprint: Mapped[str]
    space: Mapped[str]
    protocol: Mapped[str]
    created_at: Mapped[str]
    #: JSON list of the paths of a user's own text.
    text: Mapped[str] = mapped_column(server_default="[]")


class _Trial(_Base):
    __tablename__ = "trials"
    __table_args__ = (PrimaryKeyConstraint("study", "subnet_id"),)

    study: Mapped[str] = mapped_column(ForeignKey(_Study.name))
    subnet_id: Mapped[str]
    subnet: Mapped[str]
    role: Mapped[str]
    kl: Mapped[float]
    perplexity: Mapped[float]
    tokens: Mapped[int]
    seconds: Mapped[float]
    additive_kl: Mapped[float | None]
    created_at: Mapped[str]
    task_loss: Mapped[float | None]


class _Score(_Base):
    __tablename__ = "scores"
    __table_args__ = (PrimaryKeyConstraint("study", "name"),)

    study: Mapped[str] = mapped_column(ForeignKey(_Study.name))
    name: Mapped[str]
    kl: Mapped[float]


def _version_2(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE studies ADD COLUMN text VARCHAR DEFAULT '[]' NOT NULL")


def _version_3(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE trials ADD COLUMN task_loss DOUBLE PRECISION")


SCHEMA = Schema("nas", _Base.metadata.sorted_tables, migrations=[_version_2, _version_3])


@dataclass(frozen=True, eq=False)
class Study:
    """`model` is what `nas.families.load_model` takes, a file or folder by its whole path; `protocol` says how quality
    is measured, and on which text.

    `text` says where that is, if it is a user's own.
    """

    store: Store
    name: str
    model: str
    fingerprint: str
    space: SearchSpace
    protocol: Mapping[str, Any]
    text: Sequence[Path] = ()

    @classmethod
    def create(
        cls,
        store: Store,
        name: str,
        model: str,
        fingerprint: str,
        space: SearchSpace,
        protocol: Mapping[str, object],
        text: Sequence[Path] = (),
    ) -> Study:
        """The study of that name, made now if there is none; the same model and text may have moved since.

        Raises StudyError where the name belongs to a study of another model, space or protocol.
        """
        wanted = {
            "fingerprint": fingerprint,
            "space": space.to_json(),
            "protocol": json.dumps(dict(protocol), sort_keys=True),
        }
        with store.transaction() as session:
            SCHEMA.open(session.connection())
            model = _from_anywhere(model)
            _insert_new(session, _Study, name=name, model=model, created_at=_now(), **wanted)
            row = session.get_one(_Study, name)
            differing = [what for what, value in wanted.items() if getattr(row, what) != value]
            if differing:
                what = "model" if "fingerprint" in differing else " and ".join(differing)
                raise StudyError(
                    f"study {name!r} was made for another {what} (it is of {row.model}); give another --study name"
                )
            row.model, row.text = model, json.dumps([str(file.resolve()) for file in text])
        return cls(store, name, model, fingerprint, space, protocol, text)

    @classmethod
    def load(cls, store: Store, name: str) -> Study:
        """The study of that name; StudyError, with the names there are, where it does not exist."""
        with store.transaction() as session:
            SCHEMA.open(session.connection())
            row = session.get(_Study, name)
            if row is None:
                names = ", ".join(sorted(session.scalars(select(_Study.name)))) or "none"
                raise StudyError(f"there is no study {name!r} in {store.where} (there: {names}); run nas search first")
            with store.readable_rows():
                space, protocol = SearchSpace.from_json(row.space), dict(json.loads(row.protocol))
                text = tuple(Path(file) for file in json.loads(row.text))
            return cls(store, name, row.model, row.fingerprint, space, protocol, text)

    def trials(self) -> list[Trial]:
        """In the order they were made."""
        query = select(_Trial).filter_by(study=self.name).order_by(_Trial.created_at, _Trial.subnet_id)
        with self.store.transaction() as session, self.store.readable_rows():
            return [_trial(row) for row in session.scalars(query)]

    def add(self, trial: Trial) -> None:
        """One that is there already is kept and the new one dropped."""
        row = {
            "study": self.name,
            "subnet_id": trial.subnet.id,
            "subnet": trial.subnet.to_json(),
            "role": trial.role,
            **asdict(trial.quality),
            "additive_kl": trial.additive_kl,
            "created_at": _now(),
        }
        with self.store.transaction() as session:
            _insert_new(session, _Trial, **row)

    def scores(self) -> dict[str, float]:
        """KL of single replaced parts, by the name that `add_score` was given."""
        with self.store.transaction() as session, self.store.readable_rows():
            return {row.name: float(row.kl) for row in session.scalars(select(_Score).filter_by(study=self.name))}

    def add_score(self, name: str, kl: float) -> None:
        with self.store.transaction() as session:
            _insert_new(session, _Score, study=self.name, name=name, kl=kl)


def _from_anywhere(model: str) -> str:
    """A Hugging Face id as it is, and the path of what lies here whole: commands may run in any folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _insert_new(session: Session, table: type[_Base], **row: object) -> None:
    """Nothing where its key is there, also if another process inserts it at the same moment."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    session.execute(insert(table).values(row).on_conflict_do_nothing())


def _trial(row: _Trial) -> Trial:
    if row.role not in get_args(TrialRole):
        raise ValueError(f"a trial of no known role, {row.role!r}")
    task_loss, additive_kl = (None if value is None else float(value) for value in (row.task_loss, row.additive_kl))
    quality = Quality(float(row.kl), float(row.perplexity), int(row.tokens), float(row.seconds), task_loss)
    return Trial(Subnet.from_json(row.subnet), quality, row.role, additive_kl)  # type: ignore[arg-type]


def _now() -> str:
    """Always with microseconds: trials are put in order by this text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
