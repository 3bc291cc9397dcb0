"""The latency predictor of a target's measurements: leaning on another profile while they are few, and kept.

A fit takes up to seconds and its inputs change with a profile only: it is kept in the database beside the measurements.
What is kept is never trusted: it counts only if it is of the very measurements that a fit would be made on now, and
undamaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from hw_profiles import Measurement, Store, StoreError, Target
from hw_profiles.measurement import Role
from hw_profiles.schema import Schema
from hw_profiles.shapes import Phase
from predictors import LatencyPredictor, training_digest
from predictors.latency import MINIMUM_SAMPLES

#: References are timed in every batch, and what they take is what all else is told by. So weighed, predictions of the
#: full model itself are off by 0.9 % of decode and 1.5 % of prefill, where they were by 2.8 and 3.8, and those of
#: held-out graphs by as much as before (profiles of a demo's size, 232 timings; within 10 % of decode 79 % for 75).
_REFERENCE_WEIGHT = 8.0


class _Base(DeclarativeBase):
    pass


class _Fitted(_Base):
    __tablename__ = "fitted_predictors"

    #: What it is for: a later fit for the same takes its place.
    name: Mapped[str] = mapped_column(primary_key=True)
    #: `predictors.training_digest` of what it was fitted on.
    digest: Mapped[str]
    #: `LatencyPredictor.to_json`, provenance included, and its SHA-256.
    content: Mapped[str]
    checksum: Mapped[str]
    created_at: Mapped[str]


SCHEMA = Schema("fitted", _Base.metadata.sorted_tables)


def sample_weights(training: Sequence[Measurement]) -> list[float]:
    """What each counts in a fit."""
    return [_REFERENCE_WEIGHT if m.role == "reference" else 1.0 for m in training]


def fitted_predictor(store: Store, training: Sequence[Measurement], roles: Collection[Role]) -> LatencyPredictor:
    """Of measurements of one target, model and phase, those of `roles` that still hold.

    Those without a table, which `nas profile --transfer-from` made, may lean on `priors`, as far as that helps.
    """
    first, version = training[0], training[-1].runtime_version
    others = []
    if not any(m.role == "table" for m in training):
        others = priors(store, first.target, version, first.reference_id, first.workload.phase, roles)
    return _kept_or_fitted(store, training, roles, others)


def priors(
    store: Store, target: Target, runtime_version: str, reference_id: str, phase: Phase, roles: Collection[Role]
) -> list[LatencyPredictor]:
    """Of whole profiles of the same model, runtime and precision on other devices, thread counts or versions."""
    found = []
    for other in store.targets():
        if (other.runtime, other.precision) != (target.runtime, target.precision):
            continue
        of_versions: dict[str, list[Measurement]] = {}
        for m in store.measurements(other, roles=roles, reference_id=reference_id):
            if m.workload.phase == phase and (other, m.runtime_version) != (target, runtime_version):
                of_versions.setdefault(m.runtime_version, []).append(m)
        found += [
            _kept_or_fitted(store, training, roles, ()) for training in of_versions.values() if _is_whole(training)
        ]
    return found


def _is_whole(training: Sequence[Measurement]) -> bool:
    """Whether it has a table, and was not interrupted before it could be fitted on."""
    return any(m.role == "table" for m in training) and len({m.shape for m in training}) >= MINIMUM_SAMPLES


def _kept_or_fitted(
    store: Store, training: Sequence[Measurement], roles: Collection[Role], others: Sequence[LatencyPredictor]
) -> LatencyPredictor:
    first, version = training[0], training[-1].runtime_version
    target = f"{first.target.device_id}/{first.target.key}"
    samples = (
        [m.shape for m in training],
        [m.latency_ms for m in training],
        [m.workload for m in training],
        first.target.precision,
        0,  # seed
        sample_weights(training),
    )
    digest = training_digest(*samples, target=target, runtime_version=version, priors=others)
    leaning = "with priors" if others else "alone"
    name = "; ".join([target, version, first.reference_id, first.workload.phase, "+".join(sorted(roles)), leaning])
    content = _read(store, name, digest)
    if content is not None:
        try:
            return LatencyPredictor.from_json(content, target=target, runtime_version=version, digest=digest)
        except ValueError:
            pass  # written by another version of llm-nas
    fitted = LatencyPredictor.fit(*samples, target=target, runtime_version=version, priors=others)
    _keep(store, name, fitted)
    return fitted


def _read(store: Store, name: str, digest: str) -> str | None:
    """The content kept under `name`, None where there is none of this digest or it is damaged."""
    try:
        with store.transaction() as session:
            SCHEMA.open(session.connection())
            row = session.get(_Fitted, name)
            if row is None or row.digest != digest or row.checksum != _checksum(row.content):
                return None
            return row.content
    except StoreError:  # say a database that must not be written to, and has no such table yet
        return None


def _keep(store: Store, name: str, fitted: LatencyPredictor) -> None:
    """A predictor that cannot be kept is fitted again the next time, which is no reason to fail now."""
    content = fitted.to_json()
    row = {
        "digest": fitted.provenance.digest,
        "content": content,
        "checksum": _checksum(content),
        "created_at": datetime.now(UTC).isoformat(),
    }
    insert = sqlite.insert if store.engine.dialect.name == "sqlite" else postgresql.insert
    statement = insert(_Fitted).values(name=name, **row).on_conflict_do_update(index_elements=["name"], set_=row)
    try:
        with store.transaction() as session:
            SCHEMA.open(session.connection())
            session.execute(statement)
    except StoreError:
        return


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
