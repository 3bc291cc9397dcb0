"""One graph timed on one workload: what is kept of it, in a database or in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args

from hw_profiles.devices import Target
from hw_profiles.references import at_profile_speed
from hw_profiles.shapes import ModelShape, Workload

#: reference: timed in every batch, the full model first (`references.py`); table: one choice in all layers, or in every
#: second; anchor: fits the predictor; heldout: judges it; repeat: a held-out shape once more, for the noise floor;
#: finalist: about to be the answer to a query; confirmation: the answer once more.
Role = Literal["reference", "table", "anchor", "heldout", "repeat", "finalist", "confirmation"]

ROLES: tuple[Role, ...] = get_args(Role)
#: Timed after a profile, for a query: what may answer it, and the answer once more.
FINALIST_ROLES: tuple[Role, ...] = ("finalist", "confirmation")


def median_error(spread: float, repeats: int) -> float:
    """Standard error of a median of `repeats` values, half of whose interquartile range is `spread`.

    For normal noise it is 1.25 sigma / sqrt(n), sigma being 1.48 times that half.
    """
    return 1.25 * 1.48 * spread / math.sqrt(repeats)


@dataclass(frozen=True)
class Measurement:
    """One graph timed on one workload. `ratio` is to the geometric mean of the references in the same batch.

    `references_ms` are their latencies there by shape id, and of a workload that came to an earlier profile what they
    would have taken at the speed of that. `reference_id` is the first one's, the full model's, and tells the model.

    `affinity` names the CPUs that the process was allowed, as `hw_profiles.devices.affinity` does; empty is unknown.
    """

    target: Target
    shape: ModelShape
    workload: Workload
    role: Role
    reference_id: str
    ratio: float
    spread_ratio: float
    repeats: int
    references_ms: Mapping[str, float]
    runtime_version: str
    affinity: str = ""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: Medians of `references_ms` over the batches of the profile, finalists' left out; filled in by
    #: `Store.measurements`.
    profile_ms: Mapping[str, float] | None = None

    @property
    def is_full_model(self) -> bool:
        """Whether this is the first of the references."""
        return self.role == "reference" and self.shape.id == self.reference_id

    @property
    def latency_ms(self) -> float:
        """At the speed of the profile."""
        profile_ms = self.references_ms if self.profile_ms is None else self.profile_ms
        if self.role == "reference" and self.shape.id in profile_ms:
            return profile_ms[self.shape.id]
        return at_profile_speed(self.ratio, self.references_ms, profile_ms)

    @property
    def high_ms(self) -> float:
        """Two standard errors of the median above it."""
        return self.latency_ms * (1 + 2 * median_error(self.spread_ratio, self.repeats) / self.ratio)


@dataclass(frozen=True)
class MemoryMeasurement:
    """One graph on one workload in a process of its own: what was resident at most, loading included.

    `baseline_bytes` is what that process held before: the interpreter with the runtime imported, and no model.
    """

    target: Target
    shape: ModelShape
    workload: Workload
    role: Role
    reference_id: str
    peak_bytes: int
    baseline_bytes: int
    runtime_version: str
    #: Energy of one step, a prompt or one token of every sequence; None where the machine does not tell.
    step_joules: float | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
