"""The same writers, for the profiler: files of a given shape with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.artefact import Format
from export.decoder import random_decoder
from export.gguf import write_gguf
from export.onnx import write_onnx
from export.openvino import write_openvino
from hw_profiles.shapes import ModelShape, Precision

#: The format each runtime reads.
FORMAT_OF_RUNTIME: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino", "llamacpp": "gguf"}
RUNTIME_OF_FORMAT: dict[Format, str] = {format_: name for name, format_ in FORMAT_OF_RUNTIME.items()}


def build_onnx(shape: ModelShape, precision: Precision, directory: Path) -> Path:
    return write_onnx(random_decoder(shape, precision), directory)


def build_openvino(shape: ModelShape, precision: Precision, directory: Path) -> Path:
    return write_openvino(random_decoder(shape, precision), directory)


def build_gguf(shape: ModelShape, precision: Precision, directory: Path) -> Path:
    return write_gguf(random_decoder(shape, precision), directory)


#: For each runtime, what `hw_profiles.profile` takes as `build`.
BUILDERS: dict[str, Callable[[ModelShape, Precision, Path], Path]] = {
    "onnxruntime": build_onnx,
    "openvino": build_openvino,
    "llamacpp": build_gguf,
}
