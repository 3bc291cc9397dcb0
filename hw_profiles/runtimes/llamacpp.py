"""llama.cpp: a GGUF file, through the bindings of the package llama-cpp-python."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from hw_profiles.devices import detect
from hw_profiles.runtimes import CPU, check_room, model_file, name_on
from hw_profiles.shapes import PRECISIONS, Precision

MODEL_FILE = "model.gguf"
GPU = "GPU"

#: Positions come in pages of this many.
_PAGE_TOKENS = 256
#: Caches of at most so many positions are kept when fewer are asked for.
_KEPT_TOKENS = 2048
#: What the cache that nobody filled is computed from.
_FILLING_TOKENS = 61
_ERROR_LEVEL = 4  # ggml_log_level
_errors: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, user_data: Any) -> None:
    """Its log would go to standard error, a page for each file; what went wrong belongs into the exception."""
    if level == _ERROR_LEVEL:
        _errors.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))


class LlamaCppRuntime:
    def __init__(self, device: str = CPU) -> None:
        self.name = name_on("llamacpp", device)
        self._device = device
        # elsewhere its kernels multiply bf16 as fp32, slower than fp32 itself
        self.precisions: tuple[Precision, ...] = tuple(
            precision for precision in PRECISIONS if precision != "bf16" or device != CPU or detect().has_bf16
        )

    def version(self) -> str:
        return str(llama_cpp.__version__)

    def devices(self) -> list[str]:
        return [CPU, *([GPU] if llama_cpp.llama_supports_gpu_offload() else [])]

    def load(self, path: Path, threads: int, max_tokens: int) -> LlamaCppSession:
        return self._load(path, threads, max_tokens)

    def load_exact(self, path: Path, threads: int, max_tokens: int) -> LlamaCppSession:
        """`load` without llama.cpp's own rounding of the cache and within the attention, to f16."""
        return self._load(path, threads, max_tokens, exact=True)

    def _load(self, path: Path, threads: int, max_tokens: int, exact: bool = False) -> LlamaCppSession:
        file = model_file(path, MODEL_FILE)
        _errors.clear()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0 if self._device == CPU else -1
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            raise ValueError(f"wanted a GGUF file that llama.cpp can load, got {file}: {' '.join(_errors)}")
        return LlamaCppSession(_Model(model), threads, max_tokens, exact, offload=self._device != CPU)


class _Model:
    """Owns the weights: freed when the last session lets go of it."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(pointer))
        weakref.finalize(self, llama_cpp.llama_model_free, pointer)  # at exit, too, while llama_cpp is still there


def _free_context(pointer: Any, batches: dict[tuple[int, int], Any]) -> None:
    for batch in batches.values():
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(pointer)


@dataclass
class _Context:
    """A KV cache of `room` positions for each of `batch_size` sequences."""

    model: _Model
    batch_size: int
    room: int
    pointer: Any
    #: By sequences and tokens fed to each: their layout does not change.
    batches: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weakref.finalize(self, _free_context, self.pointer, self.batches)

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.pointer)

    def decode(self, token_ids: NDArray[np.int64], past_tokens: int) -> NDArray[np.float32]:
        """Feed [B, S] tokens behind `past_tokens`; return the logits of the last, [B, V]."""
        batch_size, fed = token_ids.shape
        if token_ids.shape not in self.batches:
            self.batches[batch_size, fed] = _token_batch(batch_size, fed)
        batch, count = self.batches[batch_size, fed], batch_size * fed
        np.ctypeslib.as_array(batch.token, (count,))[:] = token_ids.reshape(-1)
        np.ctypeslib.as_array(batch.pos, (count,))[:] = np.tile(np.arange(past_tokens, past_tokens + fed), batch_size)
        _errors.clear()
        if code := llama_cpp.llama_decode(self.pointer, batch):
            raise RuntimeError(
                f"llama.cpp stopped with code {code} at {past_tokens} + {fed} tokens: {' '.join(_errors)}"
            )
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.pointer, last), (self.model.vocab_size,))
            for last in range(fed - 1, count, fed)
        ]
        return np.stack(rows)


def _token_batch(batch_size: int, fed: int) -> Any:
    """Room for the tokens of one step, sequence by sequence, of each of which the last one wants logits."""
    count = batch_size * fed
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
    logits = np.ctypeslib.as_array(batch.logits, (count,))
    logits[:] = 0
    logits[fed - 1 :: fed] = 1
    for token in range(count):
        batch.seq_id[token][0] = token // fed
    return batch


class LlamaCppSession:
    """Its cache has pages of 256 positions; keys and values are f16, or fp32 where it is to be exact.

    The cache is private to llama.cpp, so one "of arbitrary values" is computed once from arbitrary tokens, and its
    state kept to be put back.
    """

    def __init__(self, model: _Model, threads: int, max_tokens: int, exact: bool, offload: bool) -> None:
        self._model = model
        self._threads = threads
        self._max_tokens = max_tokens
        self._exact = exact
        self._offload = offload
        self._past_tokens = 0
        #: By sequences and positions: a context takes back no state of more cells, or sequences, than it has.
        self._fillings: dict[tuple[int, int], Any] = {}
        self._context = self._new_context(1, _PAGE_TOKENS)

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        room = self._max_tokens if new_tokens is None else past_tokens + new_tokens
        check_room(room - past_tokens, past_tokens, self._max_tokens)
        room = -(-room // _PAGE_TOKENS) * _PAGE_TOKENS
        if not self._fits(batch_size, room):
            del self._context  # before the next is allocated
            self._context = self._new_context(batch_size, room)
        self._past_tokens = past_tokens
        llama_cpp.llama_memory_clear(self._context.memory, False)
        if past_tokens:
            self._fill(past_tokens)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch_size, fed = token_ids.shape
        check_room(fed, self._past_tokens, self._max_tokens)
        if not self._past_tokens and (self._context.batch_size != batch_size or self._context.room < fed):
            self.reset(batch_size)
        logits = self._context.decode(token_ids, self._past_tokens)
        self._past_tokens += fed
        return logits

    def _fits(self, batch_size: int, room: int) -> bool:
        """Whether the present cache will do: a long one is given back when less is asked for."""
        held = self._context
        too_long = held.room > room and held.batch_size * held.room > _KEPT_TOKENS
        return held.batch_size == batch_size and held.room >= room and not too_long

    def _new_context(self, batch_size: int, room: int) -> _Context:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = batch_size * room
        parameters.n_seq_max = parameters.n_outputs_max = batch_size
        parameters.n_threads = parameters.n_threads_batch = self._threads
        if self._exact:
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.offload_kqv = parameters.op_offload = self._offload
        parameters.no_perf = True
        _errors.clear()
        pointer = llama_cpp.llama_init_from_model(self._model.pointer, parameters)
        if not pointer:
            raise ValueError(f"llama.cpp made no context of {batch_size} x {room} tokens: {' '.join(_errors)}")
        return _Context(self._model, batch_size, room, pointer)

    def _fill(self, past_tokens: int) -> None:
        """Put `past_tokens` positions into every sequence of the empty cache, the same values each time."""
        context = self._context
        key = context.batch_size, past_tokens
        if key not in self._fillings:
            pattern = np.resize(np.arange(min(_FILLING_TOKENS, self._model.vocab_size)), (1, past_tokens))
            context.decode(pattern, 0)
            size = llama_cpp.llama_state_seq_get_size(context.pointer, 0)
            self._fillings[key] = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(context.pointer, self._fillings[key], size, 0)
            llama_cpp.llama_memory_clear(context.memory, False)
        filling = self._fillings[key]
        for sequence in range(context.batch_size):
            if not llama_cpp.llama_state_seq_set_data(context.pointer, filling, len(filling), sequence):
                raise RuntimeError(f"llama.cpp did not take back a cache of {past_tokens} positions")
