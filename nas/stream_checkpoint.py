"""Residual streams between two layers, on disk now and then: a long pass over text goes on where it was killed.

A stream is a list of batches [n, T, hidden], all of one text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

#: Seconds between two checkpoints; writing one takes a few.
_EVERY_S = 60.0


class StreamCheckpoint:
    """In `folder`, of whoever makes its files layer by layer; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / "streams.safetensors"
        self._saved = time.monotonic()

    def load(self, streams: int) -> tuple[int, list[list[torch.Tensor]]] | None:
        """The layer that comes next and the streams before it; None where there is no sound file of so many."""
        if self._file is None:
            return None
        try:
            with safe_open(self._file, framework="pt") as file:
                names = sorted(file.keys(), key=lambda name: [int(number) for number in name.split(".")])
                found: list[list[torch.Tensor]] = [[] for _ in range(streams)]
                for name in names:
                    found[int(name.partition(".")[0])].append(file.get_tensor(name))
                return (int(file.metadata()["layer"]), found) if all(found) else None
        except (OSError, SafetensorError, LookupError, ValueError, TypeError):
            return None

    def save_if_due(self, layer: int, *streams: Sequence[torch.Tensor]) -> None:
        """Before `layer`, whose predecessors' files are there."""
        if self._file is None or time.monotonic() - self._saved < _EVERY_S:
            return
        tensors = {f"{s}.{b}": batch.contiguous() for s, stream in enumerate(streams) for b, batch in enumerate(stream)}
        partial = self._file.with_name(f".{os.getpid()}-streams.partial")
        save_file(tensors, partial, metadata={"layer": str(layer)})
        partial.replace(self._file)
        self._saved = time.monotonic()

    def remove(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
