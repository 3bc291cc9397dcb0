"""One graph timed on one workload: what is kept of it, in a database or in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args

from hw_profiles.devices import Target
from hw_profiles.shapes import ModelShape, Workload

#: reference: the full model; table: one choice in all layers, or in every second; anchor: fits the predictor; heldout:
#: judges it; repeat: a held-out shape once more, for the noise floor; finalist: about to be the answer to a query.
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
    """One graph timed on one workload. `reference_ms` is the reference graph's latency in the same batch.

    Of a workload that came to an earlier profile it is what the reference would have taken at the speed of that.

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
    reference_ms: float
    runtime_version: str
    affinity: str = ""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: Median of `reference_ms` over the batches of the profile, finalists' left out, filled in by `Store.measurements`.
    typical_reference_ms: float | None = None

    @property
    def latency_ms(self) -> float:
        typical = self.typical_reference_ms
        return self.ratio * (self.reference_ms if typical is None else typical)

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
