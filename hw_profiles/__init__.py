"""What a device does with decoders, measured: shapes, devices, runtimes, timing, and the database of measurements."""

from hw_profiles.devices import Device, Target, detect
from hw_profiles.planning import PlannedGraph, plan
from hw_profiles.profile import ProfileError
from hw_profiles.runtimes import RUNTIMES, runtime
from hw_profiles.shapes import BlockShape, ModelShape, Workload
from hw_profiles.store import Measurement, Store, StoreError

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
