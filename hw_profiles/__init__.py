"""What a device does with decoders, measured: shapes, devices, runtimes, timing, and the database of measurements.

The database's names are imported when first asked for: a board that only times a pack has no SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hw_profiles.devices import Device, Target, detect
from hw_profiles.measurement import Measurement
from hw_profiles.planning import PlannedGraph, plan
from hw_profiles.profile import ProfileError
from hw_profiles.runtimes import RUNTIMES, runtime
from hw_profiles.shapes import BlockShape, ModelShape, Workload

if TYPE_CHECKING:
    from hw_profiles.store import Store, StoreError

__all__ = [
    "RUNTIMES",
    "BlockShape",
    "Device",
    "Measurement",
    "ModelShape",
    "PlannedGraph",
    "ProfileError",
    "Store",
    "StoreError",
    "Target",
    "Workload",
    "detect",
    "plan",
    "runtime",
]


def __getattr__(name: str) -> Any:
    if name not in ("Store", "StoreError"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hw_profiles.store"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
