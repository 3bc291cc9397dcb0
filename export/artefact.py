"""What an exported folder says of itself, and how it comes to be whole or not at all.

Beside the model files lie `llm-nas.json`, the manifest, and `parity.safetensors`, real text with the logits that the
active supernet gives on it: enough to verify the folder on any machine, without the study or the original model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hw_profiles.shapes import PRECISIONS, ModelShape, Precision

Format = Literal["huggingface", "openvino", "onnx", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)

MANIFEST_FILE = "llm-nas.json"
PARITY_FILE = "parity.safetensors"
_MANIFEST_VERSION = 1


class ArtefactError(ValueError):
    """An exported folder that cannot be trusted as it lies there."""


@dataclass(frozen=True)
class LatencyPrediction:
    """Predicted milliseconds of a workload on a target, with its 90 % interval."""

    phase: str
    tokens: int
    batch_size: int
    target: str
    value_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class TextQuality:
    """On `tokens` of text that nothing was chosen by: mean KL from the full model in nats, and both perplexities."""

    kl: float
    perplexity: float
    full_perplexity: float
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """`files` maps each file's name to its size in bytes; sizes are filled in when the folder is complete.

    `licence` is the base model's, as its own files name it.
    """

    format: Format
    precision: Precision
    shape: ModelShape
    base_model: str
    base_fingerprint: str
    subnet_id: str
    predictions: tuple[LatencyPrediction, ...] = ()
    quality: TextQuality | None = None
    licence: str | None = None
    #: How its weights were trained, in words; None where they were not.
    tuning: str | None = None
    #: `genai_special_tokens` of the tokenizer, in the format that onnxruntime-genai runs.
    genai_special_tokens: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.base_model}, subnet {self.subnet_id}"

    def to_json(self) -> str:
        fields = {"manifest_version": _MANIFEST_VERSION, **asdict(self)}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("manifest_version") != _MANIFEST_VERSION or fields["format"] not in FORMATS:
            raise ValueError("unknown manifest version or format")
        if fields["precision"] not in PRECISIONS:
            raise ValueError("unknown precision")
        fields["shape"] = ModelShape.from_json(json.dumps(fields["shape"]))
        if fields.get("quality") is not None:
            fields["quality"] = TextQuality(**fields["quality"])
        fields["predictions"] = tuple(LatencyPrediction(**entry) for entry in fields["predictions"])
        fields["files"] = {str(name): int(size) for name, size in fields["files"].items()}
        manifest = cls(**fields)
        manifest._check()
        return manifest

    def _check(self) -> None:
        """ValueError for values that no card could be made of: a file may come from anywhere."""
        said = [self.base_model, self.base_fingerprint, self.subnet_id, *self.versions, *self.versions.values()]
        said += [text for text in (self.licence, self.tuning) if text is not None]
        numbers = [value for found in self.predictions for value in (found.value_ms, found.low_ms, found.high_ms)]
        numbers += [] if self.quality is None else [*asdict(self.quality).values()]
        if not all(isinstance(text, str) for text in said) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("text or numbers of another type")


@dataclass(frozen=True)
class Parity:
    """Real text and what the active supernet says of it.

    `token_ids` [N, T]; of each window the first `prompt_tokens` are fed at once and the rest one by one; `logits`
    [N, K, V] are the fp32 logits at `positions` [K], each at or past the prompt's last token.
    """

    token_ids: Tensor
    positions: Tensor
    logits: Tensor

    @property
    def prompt_tokens(self) -> int:
        return int(self.positions[0]) + 1

    def save(self, directory: Path) -> None:
        tensors = {"token_ids": self.token_ids, "positions": self.positions, "logits": self.logits}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / PARITY_FILE)

    @classmethod
    def load(cls, directory: Path) -> Parity:
        try:
            parity = cls(**load_file(directory / PARITY_FILE))
            parity._check()
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{directory / PARITY_FILE} is not the parity data that nas export writes ({error}); export again"
            ) from error
        return parity

    def _check(self) -> None:
        """Raises ValueError for tensors that do not fit together: a file may come from anywhere."""
        ids, positions, logits = self.token_ids, self.positions, self.logits
        if ids.dim() != 2 or positions.dim() != 1 or logits.shape[:-1] != (len(ids), len(positions)):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (ids, positions, logits))
            raise ValueError(f"wanted token_ids [N, T], positions [K] and logits [N, K, V], got {shapes}")
        if (ids.dtype, positions.dtype, logits.dtype) != (
            torch.int64,
            torch.int64,
            torch.float32,
        ) or not logits.numel():
            raise ValueError(f"wanted int64 and fp32 tensors, got {ids.dtype}, {positions.dtype}, {logits.dtype}")
        if ids.min() < 0 or ids.max() >= logits.shape[-1] or not logits.isfinite().all():
            raise ValueError(f"wanted ids of a vocabulary of {logits.shape[-1]} and finite logits")
        if positions[0] < 0 or positions[-1] >= ids.shape[1] or (positions.diff() <= 0).any():
            raise ValueError(f"wanted ascending positions below {ids.shape[1]}, got {positions.tolist()}")


def check_replaceable(directory: Path) -> None:
    """Raises ArtefactError where `directory` holds something that is no earlier export."""
    if (
        directory.exists()
        and (not directory.is_dir() or any(directory.iterdir()))
        and not (directory / MANIFEST_FILE).exists()
    ):
        raise ArtefactError(
            f"{directory} exists and is no folder of ours to replace; give another --output or remove it"
        )


@contextmanager
def whole_or_absent(directory: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the name `directory`, manifest and all, only once it is complete.

    Raises ArtefactError as `check_replaceable`.
    """
    check_replaceable(directory)
    directory = directory.resolve()  # a link stays one
    unfinished, earlier = (directory.with_name(directory.name + suffix) for suffix in (".unfinished", ".earlier"))
    if earlier.exists() and not directory.exists():
        earlier.rename(directory)  # killed between the two renames below
    for left in (unfinished, earlier):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sizes = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir()) if path.is_file()}
        complete = Manifest(**{**manifest.__dict__, "files": sizes})
        (unfinished / MANIFEST_FILE).write_text(complete.to_json())
        if directory.exists():
            directory.rename(earlier)
        try:
            unfinished.rename(directory)
        except BaseException:
            if earlier.exists():
                earlier.rename(directory)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest: every file named lies in the folder, at its size. Raises ArtefactError."""
    path = directory / MANIFEST_FILE
    if not directory.is_dir() or not path.is_file():
        raise ArtefactError(
            f"{directory} is not a folder that nas export wrote (no {MANIFEST_FILE}); give one that it wrote"
        )
    try:
        manifest = Manifest.from_json(path.read_text())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged or from another version ({error!r}); export again") from error
    for name, size in manifest.files.items():
        file = directory / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ArtefactError(f"{path} names {name!r}, which is no plain file of that folder; export again")
        if file.stat().st_size != size:
            raise ArtefactError(f"{file} has {file.stat().st_size:,} bytes where {size:,} were written; export again")
    return manifest


def model_bytes(manifest: Manifest) -> int:
    """Bytes of the folder that a runtime needs: everything but our own evidence."""
    return sum(size for name, size in manifest.files.items() if name not in (MANIFEST_FILE, PARITY_FILE))
