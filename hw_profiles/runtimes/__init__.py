"""The inference engines that can be timed, behind two small Protocols. An engine is imported when first asked for.

A runtime's name is its engine's, for the CPU, or carries one of the devices that the engine lists: `openvino`,
`openvino:GPU`, `onnxruntime:CUDA`. An engine reads the same files on all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hw_profiles.shapes import Precision

CPU = "CPU"
_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,31}")


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
    #: Those that it has kernels for, on the device of its name.
    precisions: tuple[Precision, ...]

    def version(self) -> str: ...

    def devices(self) -> list[str]:
        """What the engine itself lists here, `CPU` first: the devices that its name may carry."""
        ...

    def load(self, path: Path, threads: int, max_tokens: int) -> Session:
        """Load a model file, or the folder that holds one, for at most `max_tokens` tokens in the KV cache.

        ValueError unless the model runs on the device of the runtime's name.
        """
        ...


def _onnxruntime(device: str = CPU) -> Runtime:
    from hw_profiles.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(device)


def _openvino(device: str = CPU) -> Runtime:
    from hw_profiles.runtimes.openvino import OpenVinoRuntime

    return OpenVinoRuntime(device)


def _llamacpp(device: str = CPU) -> Runtime:
    from hw_profiles.runtimes.llamacpp import LlamaCppRuntime

    return LlamaCppRuntime(device)


#: Constructors: of the engine on its CPU, and, given one of its other devices, on that.
RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "llamacpp": _llamacpp,
}
#: Bytes of a quantised block's scale in the files that an engine reads: MatMulNBits wants it in the activations' type.
SCALE_BYTES = {"onnxruntime": 4, "openvino": 2, "llamacpp": 2}


def runtime(name: str) -> Runtime:
    """The engine of that name; ModuleNotFoundError where its package is not installed.

    ValueError for an engine that is not known, or a device that it does not list here.
    """
    engine = engine_of(name)
    if engine not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    on_cpu = RUNTIMES[engine]()
    if name == engine:
        return on_cpu
    here = names(on_cpu)
    if name not in here:
        raise ValueError(
            f"wanted a device that {engine} {on_cpu.version()} lists here ({', '.join(here)}), got {name}; take one of "
            "these, or install what that device needs"
        )
    return RUNTIMES[engine](name.removeprefix(f"{engine}:"))


def installed() -> list[Runtime]:
    """The engines whose packages are here, each on its CPU."""
    found = []
    for construct in RUNTIMES.values():
        with suppress(ImportError):
            found.append(construct())
    return found


def engine_of(name: str) -> str:
    """`openvino` of `openvino:GPU`: what decides which files are read."""
    return name.partition(":")[0]


def name_on(engine: str, device: str) -> str:
    """`openvino:GPU` for its GPU; an engine on the CPU has the plain name."""
    return engine if device == CPU else f"{engine}:{device}"


def names(engine: Runtime) -> list[str]:
    """What `runtime` takes here for this engine."""
    return [name_on(engine_of(engine.name), device) for device in engine.devices()]


def check_precision(engine: Runtime, precision: Precision) -> None:
    if precision not in engine.precisions:
        raise ValueError(
            f"wanted a precision that {engine.name} has kernels for on this device ({', '.join(engine.precisions)}), "
            f"got {precision}; take one of these, or for bf16 openvino on a CPU with bf16 instructions"
        )


def is_runtime_name(name: str) -> bool:
    """Whether some machine may have a runtime of that name: a known engine, alone or with any device but the CPU."""
    engine, colon, device = name.partition(":")
    return engine in RUNTIMES and (not colon or (device != CPU and _DEVICE.fullmatch(device) is not None))


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
