"""A heterogeneous Hugging Face model as files that stock runtimes load, and the proof that they are the same model."""

from export.artefact import ArtefactError, LatencyPrediction, Manifest, Parity, read_manifest
from export.builders import BUILDERS, FORMAT_OF_RUNTIME
from export.folder import export_folder
from export.huggingface import heterogeneous_model
from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize
from export.verify import ProfiledReference, Verification, verify

__all__ = [
    "BUILDERS",
    "FORMAT_OF_RUNTIME",
    "ArtefactError",
    "LatencyPrediction",
    "Manifest",
    "Parity",
    "ProfiledReference",
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
