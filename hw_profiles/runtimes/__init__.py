"""The inference engines that can be timed, behind two small Protocols. An engine is imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """A loaded model with its KV cache. B batch, S tokens fed, P tokens already in the cache, V vocabulary."""

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        """Start anew: a KV cache of P = `past_tokens` positions of arbitrary values for each of B sequences.

        There is room for `new_tokens` more, by default for all that `max_tokens` of `load` leaves. An empty cache fits
        any batch size.
        """

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed [B, S] tokens, after which the cache holds P + S; return the logits of the last one, [B, V]."""
        ...


class Runtime(Protocol):
    name: str

    def version(self) -> str: ...

    def devices(self) -> list[str]:
        """What the engine itself lists."""
        ...

    def load(self, path: Path, threads: int, max_tokens: int) -> Session:
        """Load a model file, or the folder that holds one, for at most `max_tokens` tokens in the KV cache."""
        ...


def _onnxruntime() -> Runtime:
    from hw_profiles.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime()


def _openvino() -> Runtime:
    from hw_profiles.runtimes.openvino import OpenVinoRuntime

    return OpenVinoRuntime()


RUNTIMES: dict[str, Callable[[], Runtime]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def runtime(name: str) -> Runtime:
    """The engine of that name; ModuleNotFoundError where its package is not installed."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    return RUNTIMES[name]()


def model_file(path: Path, file_name: str) -> Path:
    """`path` itself, or `file_name` in it if it is a folder."""
    file = path / file_name if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"wanted a model file, or a folder with {file_name}, got {path}; export the model first"
        )
    return file


def check_room(fed: int, past: int, max_tokens: int) -> None:
    """Refuse a step that would overflow the KV cache."""
    if past + fed > max_tokens:
        raise ValueError(
            f"wanted at most {max_tokens} tokens in the cache, got {past} and {fed} more; load with a larger max_tokens"
        )
