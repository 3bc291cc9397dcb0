"""Measurements in one JSON file: what a device that has no database hands back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hw_profiles.devices import INSTRUCTIONS, Device, Target
from hw_profiles.measurement import ROLES, Measurement, MemoryMeasurement, Role
from hw_profiles.shapes import PRECISIONS, ModelShape, Workload
from hw_profiles.untrusted import MAX_ROUNDS, MAX_THREADS, Fields, model_shape, runtime_name, same_model, workload

MAX_FILE_BYTES = 32 * 2**20
MAX_MEASUREMENTS = 50_000

_FORMAT, _VERSION = "llm-nas measurements", 2
_MAX_SHAPES = 10_000
_MAX_RATIO = 1e6
_MAX_MS = 1e7  # three hours a token
_MAX_BYTES = 2**50
#: As many a round as any version has made.
_MAX_PASSES = 3 * MAX_ROUNDS
_MAX_JOULES = 1e9
_REMEDY = "run the pack again with another --output and import that"

#: What may be measured once: target, runtime's version, workload, shape, role.
_Key = tuple[Target, str, Workload, str, Role]
_Found = TypeVar("_Found", Measurement, MemoryMeasurement)


@dataclass(frozen=True)
class Measured:
    """What such a file says: all measurements are of one device and of subnets of one model, the reference."""

    device: Device
    reference: ModelShape
    measurements: tuple[Measurement, ...]
    memory: tuple[MemoryMeasurement, ...] = ()

    def to_json(self) -> str:
        measured = [*(found.shape for found in self.measurements), *(found.shape for found in self.memory)]
        shapes = dict.fromkeys([self.reference, *measured])
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "device": asdict(self.device),
                "reference_id": self.reference.id,
                "shapes": [json.loads(shape.to_json()) for shape in shapes],
                "measurements": [_row(found) for found in self.measurements],
                "memory": [_memory_row(found) for found in self.memory],
            },
            allow_nan=False,
            separators=(",", ":"),
        )


def read_measured(path: Path) -> Measured:
    """Read a file that anybody may have written; ValueError, in one sentence, unless all of it is valid."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path} must have at most {MAX_FILE_BYTES:,} bytes, got more; {_REMEDY}")
    fields = Fields.parse(content, str(path), _REMEDY)
    fields.header(_FORMAT, _VERSION)
    device = _device(fields.nested("device"))
    rows = fields.objects("shapes", 1, _MAX_SHAPES)
    shapes = {shape.id: shape for shape in map(model_shape, rows)}
    if len(shapes) < len(rows):
        raise ValueError(f"{path} must hold each shape once, got {len(rows) - len(shapes)} twice; {_REMEDY}")
    reference = _known_shape(fields, "reference_id", shapes)
    for row, shape in zip(rows, shapes.values(), strict=True):
        same_model(shape, reference, row)
    measured_rows = fields.objects("measurements", 0, MAX_MEASUREMENTS)
    # files of versions that measured no memory have none
    memory_rows = fields.objects("memory", 0, MAX_MEASUREMENTS) if "memory" in fields else []
    fields.end()
    measurements: dict[_Key, Measurement] = {}
    memory: dict[_Key, MemoryMeasurement] = {}
    for row in measured_rows:
        _add_new(measurements, _measurement(row, device, shapes, reference), row)
    for row in memory_rows:
        _add_new(memory, _memory_measurement(row, device, shapes, reference), row)
    for target, version, work, _, _ in measurements:
        if (target, version, work, reference.id, "reference") not in measurements:
            raise ValueError(
                f"{path} must hold the reference for each target and workload, got none for {target.key} "
                f"{work.phase} {work.tokens}; {_REMEDY}"
            )
    return Measured(device, reference, tuple(measurements.values()), tuple(memory.values()))


def _add_new(known: dict[_Key, _Found], found: _Found, row: Fields) -> None:
    key = (found.target, found.runtime_version, found.workload, found.shape.id, found.role)
    if key in known:
        raise ValueError(f"{row.where} must be measured once, got it twice; {_REMEDY}")
    known[key] = found


class MeasuredFile:
    """Results of one device and model in a file, rewritten whole at every addition: it is never half written.

    A file that is there already is gone on with. ValueError where it is of another device or model.
    """

    def __init__(self, path: Path, device: Device, reference: ModelShape) -> None:
        self.path = path
        self.measured = Measured(device, reference, ())
        if path.exists():
            self.measured = read_measured(path)
            if (self.measured.device.id, self.measured.reference) != (device.id, reference):
                raise ValueError(
                    f"{path} must be of this device and model to go on with, got {self.measured.device.name} and model "
                    f"{self.measured.reference.id}; give another --output"
                )
        self._write()  # a folder that cannot be written to shows now, not after the first batch

    def add_device(self, device: Device) -> None:
        if device.id != self.measured.device.id:
            raise ValueError(f"{self.path} is of device {self.measured.device.id}, got {device.id}")

    def measurements(self, target: Target, *, reference_id: str) -> list[Measurement]:
        return [m for m in self.measured.measurements if m.target == target and m.reference_id == reference_id]

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        self.measured = replace(self.measured, measurements=(*self.measured.measurements, *measurements))
        self._write()

    def memory_measurements(self, target: Target, *, reference_id: str) -> list[MemoryMeasurement]:
        return [m for m in self.measured.memory if m.target == target and m.reference_id == reference_id]

    def add_memory_measurements(self, measurements: Sequence[MemoryMeasurement]) -> None:
        self.measured = replace(self.measured, memory=(*self.measured.memory, *measurements))
        self._write()

    def _write(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.write(self.measured.to_json())
            file.flush()
            os.fsync(file.fileno())  # boards lose power
        part.replace(self.path)


def _row(found: Measurement) -> dict[str, object]:
    return {
        **_graph_fields(found),
        "ratio": found.ratio,
        "spread_ratio": found.spread_ratio,
        "repeats": found.repeats,
        "references_ms": dict(found.references_ms),
        "affinity": found.affinity,
    }


def _memory_row(found: MemoryMeasurement) -> dict[str, object]:
    return {
        **_graph_fields(found),
        "peak_bytes": found.peak_bytes,
        "baseline_bytes": found.baseline_bytes,
        "step_joules": found.step_joules,
    }


def _graph_fields(found: Measurement | MemoryMeasurement) -> dict[str, object]:
    """Which graph was measured, on what, and when."""
    return {
        "runtime": found.target.runtime,
        "runtime_version": found.runtime_version,
        "precision": found.target.precision,
        "threads": found.target.threads,
        "shape_id": found.shape.id,
        **asdict(found.workload),
        "role": found.role,
        "created_at": found.created_at.isoformat(),
    }


def _device(fields: Fields) -> Device:
    device = Device(
        name=fields.text("name", 200),
        cores=fields.integer("cores", 1, MAX_THREADS),
        memory_bytes=fields.integer("memory_bytes", 0, 2**50),
        instructions=_instructions(fields),
        system=fields.text("system", 50),
        machine=fields.text("machine", 50),
        cpus=fields.text("cpus", 1000),
    )
    fields.end()
    return device


def _instructions(fields: Fields) -> tuple[str, ...]:
    found = fields.values("instructions", 0, len(INSTRUCTIONS))
    known = tuple(name for name in INSTRUCTIONS if name in found)
    if list(known) != found:
        raise ValueError(
            f"{fields.where}: instructions must be among {', '.join(INSTRUCTIONS)}, in that order, got others; "
            f"{fields.remedy}"
        )
    return known


def _known_shape(fields: Fields, name: str, shapes: Mapping[str, ModelShape]) -> ModelShape:
    shape_id = fields.text(name, 12)
    if shape_id not in shapes:
        raise fields.wrong(name, "the id of one of the file's shapes", shape_id)
    return shapes[shape_id]


def _measurement(
    fields: Fields, device: Device, shapes: Mapping[str, ModelShape], reference: ModelShape
) -> Measurement:
    references_ms = fields.nested("references_ms")
    if reference.id not in references_ms:
        raise ValueError(f"{references_ms.where} must hold the model itself, {reference.id}, got others; {_REMEDY}")
    found = Measurement(
        **_graph(fields, device, shapes, reference),
        ratio=fields.number("ratio", 1 / _MAX_RATIO, _MAX_RATIO),
        spread_ratio=fields.number("spread_ratio", 0, _MAX_RATIO),
        repeats=fields.integer("repeats", 1, _MAX_PASSES),
        references_ms={name: references_ms.number(name, 1e-6, _MAX_MS) for name in shapes if name in references_ms},
        affinity=fields.text("affinity", 1000),
    )
    references_ms.end()
    fields.end()
    return found


def _memory_measurement(
    fields: Fields, device: Device, shapes: Mapping[str, ModelShape], reference: ModelShape
) -> MemoryMeasurement:
    found = MemoryMeasurement(
        **_graph(fields, device, shapes, reference),
        peak_bytes=fields.integer("peak_bytes", 1, _MAX_BYTES),
        baseline_bytes=fields.integer("baseline_bytes", 0, _MAX_BYTES),
        step_joules=fields.optional_number("step_joules", 0, _MAX_JOULES),
    )
    fields.end()
    return found


def _graph(fields: Fields, device: Device, shapes: Mapping[str, ModelShape], reference: ModelShape) -> dict[str, Any]:
    """Takes what `_graph_fields` wrote out of an object that has others."""
    target = Target(
        device.id,
        runtime_name(fields),
        fields.choice("precision", PRECISIONS),
        fields.integer("threads", 1, MAX_THREADS),
    )
    shape = _known_shape(fields, "shape_id", shapes)
    return {
        "target": target,
        "shape": shape,
        "workload": workload(fields),
        "role": fields.choice("role", ROLES),
        "reference_id": reference.id,
        "runtime_version": fields.text("runtime_version", 100),
        "created_at": _moment(fields),
    }


def _moment(fields: Fields) -> datetime:
    text = fields.text("created_at", 40)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    if moment.tzinfo is None or not 2000 <= moment.year < 3000:
        raise fields.wrong("created_at", "an ISO 8601 time with its UTC offset", text)
    return moment
