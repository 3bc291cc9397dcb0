"""A heterogeneous Hugging Face model as files that stock runtimes load, and the proof that they are the same model.

What needs transformers is imported when first asked for: a profile, which only writes graphs, starts seconds sooner.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from export.artefact import ArtefactError, LatencyPrediction, Manifest, Parity, read_manifest
from export.builders import BUILDERS, FORMAT_OF_RUNTIME
from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize
from export.verify import ProfiledReferences, Verification, verify

if TYPE_CHECKING:
    from export.folder import export_folder
    from export.huggingface import heterogeneous_model

__all__ = [
    "BUILDERS",
    "FORMAT_OF_RUNTIME",
    "ArtefactError",
    "LatencyPrediction",
    "Manifest",
    "Parity",
    "ProfiledReferences",
    "QuantizedWeight",
    "Verification",
    "dequantize",
    "export_folder",
    "fake_quantize",
    "heterogeneous_model",
    "quantize",
    "read_manifest",
    "verify",
]

_MODULES = {"export_folder": "export.folder", "heterogeneous_model": "export.huggingface"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
