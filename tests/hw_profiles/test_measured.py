"""Files of measurements: whole, and hostile in every field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.devices import Device, Target
from hw_profiles.measured import MAX_FILE_BYTES, Measured, MeasuredFile, read_measured
from hw_profiles.measurement import Measurement, MemoryMeasurement
from hw_profiles.shapes import BlockShape, ModelShape, Workload

DEVICE = Device("Cortex-A76", 4, 8 * 2**30, ("asimddp",), "Linux", "aarch64")
FULL = ModelShape(64, 16, 100, True, (BlockShape(4, 2, 128),) * 2)
THIN = replace(FULL, blocks=(BlockShape(4, 2, 128), BlockShape(2, 1, 32)))
TARGET = Target(DEVICE.id, "onnxruntime", "int8", 4)
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
REFERENCE = Measurement(
    TARGET, FULL, Workload("decode", 8), "reference", FULL.id, 1.0, 0.0, 7, {FULL.id: 12.5}, "1.23", "0-1", MOMENT
)
IN_MEMORY = MemoryMeasurement(
    TARGET, FULL, Workload("decode", 8), "reference", FULL.id, 2 * 10**8, 10**7, "1.23", None, MOMENT
)
MEASURED = Measured(
    DEVICE,
    FULL,
    (
        REFERENCE,
        replace(REFERENCE, workload=Workload("prefill", 8)),
        replace(REFERENCE, shape=THIN, role="heldout", ratio=0.1 + 0.2, spread_ratio=0.01),
        replace(REFERENCE, shape=THIN, role="repeat", ratio=0.31, references_ms={FULL.id: 12.5, THIN.id: 5.0}),
    ),
    (IN_MEMORY, replace(IN_MEMORY, shape=THIN, role="heldout", peak_bytes=10**8, step_joules=0.25)),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(MEASURED.to_json())
    assert read_measured(path) == MEASURED


def test_a_file_without_memory_is_read(tmp_path: Path) -> None:
    content = json.loads(MEASURED.to_json())
    del content["memory"]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    assert read_measured(path) == replace(MEASURED, memory=())


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    first = MeasuredFile(path, DEVICE, FULL)
    assert read_measured(path).measurements == ()
    first.add_measurements(MEASURED.measurements[:2])
    second = MeasuredFile(path, replace(DEVICE, memory_bytes=DEVICE.memory_bytes - 1000), FULL)  # a kernel update
    second.add_device(DEVICE)
    assert second.measurements(TARGET, reference_id=FULL.id) == list(MEASURED.measurements[:2])
    assert second.measurements(replace(TARGET, threads=1), reference_id=FULL.id) == []
    second.add_measurements(MEASURED.measurements[2:])
    second.add_memory_measurements(MEASURED.memory)
    assert second.memory_measurements(TARGET, reference_id=FULL.id) == list(MEASURED.memory)
    assert read_measured(path) == MEASURED
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(MEASURED.to_json())
    for device, reference in ((replace(DEVICE, cores=2), FULL), (DEVICE, THIN)):
        with pytest.raises(ValueError, match="of this device and model to go on with, got Cortex-A76"):
            MeasuredFile(path, device, reference)
    with pytest.raises(FileNotFoundError):
        MeasuredFile(tmp_path / "nonesuch" / "measured.json", DEVICE, FULL)
    assert path.read_text() == MEASURED.to_json()


def set_(*path: str | int, to: object) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def drop(*path: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def double(name: str) -> Callable[[Any], None]:
    return lambda content: content[name].append(content[name][-1])


ROW = ("measurements", 2)
CHANGES = {
    "format": (set_("format", to="zip"), "format must be one of llm-nas measurements, got .zip"),
    "version": (set_("version", to=1), "format version 2, got 1; use the same llm-nas"),
    "no device": (drop("device"), "must have the field device, got none"),
    "more": (set_("extra", to=1), "no other fields than the known ones, got .extra"),
    "cores": (set_("device", "cores", to=0), "device: cores must be a whole number from 1"),
    "name": (set_("device", "name", to="a\x1b[31m"), "name must be at most 200 printable characters"),
    "long name": (set_("device", "name", to="a" * 201), "name must be at most 200 printable characters"),
    "instructions": (set_("device", "instructions", to=["avx2", "magic"]), "instructions must be among"),
    "NaN": (set_(*ROW, "ratio", to=float("nan")), "must be JSON, got something else .NaN is no number"),
    "infinite": (set_(*ROW, "ratio", to=float("inf")), "Infinity is no number"),
    "negative": (
        set_(*ROW, "ratio", to=-1.0),
        r"measurements\[2\]: ratio must be .* from 1e-06 to 1e\+06, got -1",
    ),
    "zero": (set_(*ROW, "ratio", to=0), "ratio must be a number from"),
    "true": (set_(*ROW, "ratio", to=True), "ratio must be a number from 1e-06 to 1e.06, got true"),
    "text": (set_(*ROW, "references_ms", FULL.id, to="1"), f"references_ms: {FULL.id} must be a number"),
    "references": (set_(*ROW, "references_ms", to=12.5), "references_ms must be a JSON object, got 12.5"),
    "another's reference": (set_(*ROW, "references_ms", to={THIN.id: 1.0}), "must hold the model itself"),
    "unknown reference": (set_(*ROW, "references_ms", "0" * 12, to=1.0), "no other fields than the known ones"),
    "spread": (set_(*ROW, "spread_ratio", to=-0.1), "spread_ratio must be a number from 0"),
    "repeats": (set_(*ROW, "repeats", to=1.5), "repeats must be a whole number"),
    "phase": (set_(*ROW, "phase", to="train"), "phase must be one of prefill, decode, got .train"),
    "tokens": (set_(*ROW, "tokens", to=10**9), "tokens must be a whole number from 0 to 1048576"),
    "activation": (set_("shapes", 0, "hidden_act", to="mish"), "hidden_act must be one of silu, gelu_pytorch_tanh"),
    "positions": (set_("shapes", 0, "learned_positions", to=-1), "learned_positions must be a whole number from 0 to"),
    "bits of the head": (set_("shapes", 0, "head_bits", to=2), "head_bits must be 0 or 4, got 2"),
    "windows": (set_("shapes", 0, "windows", to=[6]), "windows must be a list of 2 entries, or empty"),
    "a window": (set_("shapes", 0, "windows", to=[6, -1]), "windows must be whole numbers from 0 to 1048576"),
    "precision": (set_(*ROW, "precision", to="int3"), "precision must be one of fp32, bf16, fp16, int8, int4"),
    "role": (set_(*ROW, "role", to="winner"), "role must be one of reference, table"),
    "runtime": (set_(*ROW, "runtime", to="tvm"), "runtime must be one of onnxruntime, openvino, llamacpp"),
    "device of the runtime": (
        set_(*ROW, "runtime", to="openvino:../GPU"),
        "which may carry a device as in openvino:GPU",
    ),
    "CPU named": (set_(*ROW, "runtime", to="openvino:CPU"), "runtime must be one of onnxruntime, openvino, llamacpp"),
    "CPUs": (set_("device", "cpus", to=4), "device: cpus must be at most 1000 printable characters"),
    "threads": (set_(*ROW, "threads", to=10**6), "threads must be a whole number from 1 to 4096"),
    "shape": (set_(*ROW, "shape_id", to="0" * 12), "shape_id must be the id of one of the file's shapes"),
    "when": (set_(*ROW, "created_at", to="yesterday"), "created_at must be an ISO 8601 time"),
    "naive": (set_(*ROW, "created_at", to="2026-01-01T00:00:00"), "created_at must be an ISO 8601 time"),
    "ancient": (set_(*ROW, "created_at", to="0001-01-01T00:00:00+14:00"), "created_at must be an ISO 8601 time"),
    "no reference": (drop("measurements", 0), "must hold the reference for each target and workload, got none for"),
    "other threads": (set_(*ROW, "threads", to=1), "got none for onnxruntime/int8/1 thread decode 8"),
    "twice": (double("measurements"), r"measurements\[4\] must be measured once, got it twice"),
    "shape twice": (double("shapes"), "must hold each shape once"),
    "another model": (set_("shapes", 1, "hidden_size", to=32), r"shapes\[1\] must be the reference model"),
    "huge": (set_("shapes", 0, "hidden_size", to=10**12), r"shapes\[0\]: hidden_size must be a whole number"),
    "heads": (
        set_("shapes", 1, "blocks", 1, "num_attention_heads", to=3),
        "id of one of the file's shapes|multiple of",
    ),
    "ragged": (set_("shapes", 1, "blocks", 1, "num_key_value_heads", to=4), "must be a multiple of"),
    "no blocks": (set_("shapes", 1, "blocks", to=[]), "blocks must be a list of 1 to 1024 entries, got a list of 0"),
    "many": (set_("measurements", to=[0] * 50_001), "measurements must be a list of 0 to 50000 entries"),
    "no peak": (set_("memory", 0, "peak_bytes", to=0), r"memory\[0\]: peak_bytes must be a whole number from 1"),
    "joules": (set_("memory", 1, "step_joules", to=-1), r"memory\[1\]: step_joules must be a number from 0"),
    "memory twice": (double("memory"), r"memory\[2\] must be measured once, got it twice"),
    "no objects": (set_("measurements", to=[0]), r"measurements\[0\] must be a JSON object, got 0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_file_is_refused_in_one_sentence(tmp_path: Path, change: str) -> None:
    alter, words = CHANGES[change]
    content = json.loads(MEASURED.to_json())
    alter(content)
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as refusal:
        read_measured(path)
    assert str(path) in str(refusal.value)
    assert ";" in str(refusal.value)  # what to do
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


TEXTS = {
    "empty": (b"", "must be JSON"),
    "cut": (MEASURED.to_json().encode()[:-9], "must be JSON"),
    "binary": (b"\xff\xfe\x00", "must be JSON"),
    "list": (b"[]", "must be a JSON object, got a list of 0"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "digits": (b'{"format": ' + b"9" * 5000 + b"}", "must be JSON"),
    "duplicate": (b'{"format": 1, "format": 2}', 'the key "format" is there twice'),
    "duplicate inside": (MEASURED.to_json().replace('"cores":4', '"cores":4,"cores":5').encode(), "is there twice"),
    "overflow": (MEASURED.to_json().replace("12.5", "1e999").encode(), "must be a number from 1e-06"),
    "large": (b" " * (MAX_FILE_BYTES + 1), "must have at most"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_not_our_json_is_refused(tmp_path: Path, name: str) -> None:
    content, words = TEXTS[name]
    path = tmp_path / "measured.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_measured(path)


def leaves(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of everything in it, objects and lists included."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    if isinstance(content, list):
        for i, value in enumerate(content):
            yield from leaves(value, (*path, i))


@pytest.mark.parametrize("junk", [None, -1, 0, True, 10**30, 1.5, "", "decode", "\ud800", [], {}, [[]], [{}]])
def test_junk_in_any_place_is_refused_or_harmless(tmp_path: Path, junk: object) -> None:
    """Nothing but ValueError comes out, and what is let through can be written and read again."""
    path = tmp_path / "measured.json"
    for place in leaves(json.loads(MEASURED.to_json())):
        content = json.loads(MEASURED.to_json())
        set_(*place, to=junk)(content)
        path.write_text(json.dumps(content))
        try:
            found = read_measured(path)
        except ValueError:
            continue
        path.write_text(found.to_json())
        assert read_measured(path) == found
