"""How far off predictions of peak memory are on a profile's held-out graphs, target by target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hw_profiles import ModelShape, Store, Target
from nas.memory import memory_profile
from predictors import mape


@dataclass(frozen=True)
class MemoryRow:
    """Held-out graphs of a target, each run in a process of its own for a short and a long workload."""

    target: str
    measurements: int
    mape: float
    worst: float
    interval_coverage: float


def memory_errors(store: Store, family: str, full: ModelShape, targets: Iterable[Target]) -> list[MemoryRow]:
    """None of targets whose memory was not measured, or for too few graphs to predict from."""
    rows = []
    for target in targets:
        found = memory_profile(store, target, full)
        if found is None or found.predicted is None:
            continue
        peaks = np.array([m.peak_bytes for m in found.held_out])
        covered = (found.predicted.low_bytes <= peaks) & (peaks <= found.predicted.high_bytes)
        rows.append(
            MemoryRow(
                target=f"{family}/{target.key}",
                measurements=len(peaks),
                mape=mape(found.predicted.value_bytes, peaks),
                worst=float(np.max(np.abs(found.predicted.value_bytes / peaks - 1))),
                interval_coverage=float(np.mean(covered)),
            )
        )
    return rows
