"""The card of an exported folder: a README.md that says what it is, how good, how fast, and how to run it.

Made from the manifest when the folder is written, and again with the measurements of every `nas verify`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from export.artefact import Format, Manifest, model_bytes, read_manifest
from hw_profiles.devices import Device

CARD_FILE = "README.md"
VERIFICATION_FILE = "verification.json"

_LIBRARIES: dict[Format, str] = {
    "huggingface": "transformers",
    "openvino": "openvino",
    "onnx": "onnxruntime-genai",
    "gguf": "llama.cpp",
}


def write_card(directory: Path) -> None:
    """(Re)write the card of a folder that `nas export` wrote, with what its verification file says, if any."""
    manifest = read_manifest(directory)
    verification = directory / VERIFICATION_FILE
    verified = json.loads(verification.read_text()) if verification.exists() else None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # it is no HTML
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    blocks = manifest.shape.blocks
    text = environment.get_template("card.md.jinja").render(
        vars(manifest),
        title=manifest.title,
        folder=directory.name,
        own_code=next((file for file in manifest.files if file.endswith(".py")), ""),
        arithmetic="bf16" if manifest.precision == "bf16" else "f32",
        library=_LIBRARIES[manifest.format],
        parameters=manifest.shape.parameters,
        wide_parts=sum((block.attention_bits > 0) + (block.mlp_bits > 0) for block in blocks),
        size_bytes=model_bytes(manifest),
        layers=len(blocks),
        attentions=len(manifest.shape.attention_blocks),
        mlps=sum(block.intermediate_size > 0 for block in blocks),
        latencies=_latencies(manifest, verified),
        verified=verified,
    )
    _write(directory / CARD_FILE, text)


def record_verification(directory: Path, fields: Mapping[str, Any], device: Device, threads: int) -> None:
    """Keep what `nas verify --json` says of a folder, and where, beside its files; write the card anew."""
    holds, within = fields["parity_holds"], fields["within_budget"]
    verdict = ("parity holds" if holds else "PARITY DOES NOT HOLD") + ("" if within else ", over the budget")
    record = {
        **fields,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.title,
        "threads": threads,
        "verdict": verdict,
    }
    _write(directory / VERIFICATION_FILE, json.dumps(record, indent=2, sort_keys=True) + "\n")
    write_card(directory)


def _write(path: Path, text: str) -> None:
    """In place of what lies there, never through it: in a folder from elsewhere it may be a link to another file."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("x") as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _latencies(manifest: Manifest, verified: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """A row each for the first token and the next, where predicted or measured."""
    rows = []
    for phase, name, what in (
        ("prefill", "ttft", "first token, prompt of {}"),
        ("decode", "tpot", "next token after {}"),
    ):
        predicted = next((found for found in manifest.predictions if found.phase == phase), None)
        tokens = verified[f"{phase}_tokens"] if verified else predicted.tokens if predicted else None
        if tokens is None:
            continue
        same = predicted is not None and predicted.tokens == tokens
        rows.append({
            "what": what.format(f"{tokens} tokens"),
            "predicted": f"{predicted.value_ms:.2f} ms ({predicted.low_ms:.2f} to {predicted.high_ms:.2f})"
            if predicted is not None and same else "",
            "measured": f"{verified[f'{name}_ms']:.2f} ms" if verified else "",
        })  # fmt: skip
    return rows
