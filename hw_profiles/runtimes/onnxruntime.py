"""ONNX Runtime: a decoder file with the KV cache as inputs and outputs, as onnxruntime-genai names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hw_profiles.runtimes import CPU, check_room, model_file, name_on
from hw_profiles.shapes import Precision

MODEL_FILE = "model.onnx"
_FATAL_ONLY = 4


@dataclass(frozen=True)
class Provider:
    """One execution provider: its name in onnxruntime, where its KV cache lies, and its options for so many threads."""

    name: str
    memory: str = "cpu"
    options: Callable[[int], dict[str, str]] = lambda threads: {}


#: By the device in a runtime's name. Of these CPU and OpenVINO have run here; the others' rows follow their manuals.
PROVIDERS = {
    CPU: Provider("CPUExecutionProvider"),
    "CUDA": Provider("CUDAExecutionProvider", "cuda"),
    "TensorRT": Provider("TensorrtExecutionProvider", "cuda"),
    "DirectML": Provider("DmlExecutionProvider", "dml"),
    "OpenVINO": Provider(
        "OpenVINOExecutionProvider",
        options=lambda threads: {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(threads)},
    ),
}

#: Where the time goes: a provider that leaves one of these to the CPU was not timed.
_HEAVY_OPERATORS = {"MatMul", "MatMulNBits", "Gemm", "GroupQueryAttention"}


class OnnxRuntime:
    #: Its CPU provider has no kernels that multiply bf16 matrices, and the writer writes no such files.
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")

    def __init__(self, device: str = CPU) -> None:
        self.name = name_on("onnxruntime", device)
        self._provider = PROVIDERS[device]

    def version(self) -> str:
        return str(ort.__version__)

    def devices(self) -> list[str]:
        listed = ort.get_available_providers()
        return [device for device, provider in PROVIDERS.items() if provider.name in listed]

    def load(self, path: Path, threads: int, max_tokens: int) -> OnnxSession:
        file = model_file(path, MODEL_FILE)
        provider = self._provider
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _FATAL_ONLY  # errors are raised, not printed as well
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = ort.InferenceSession(
                str(file), options, providers=[(provider.name, provider.options(threads))], enable_fallback=0
            )
            self._check_placement(session)
            return OnnxSession(session, max_tokens, provider.memory)
        except Exception as error:  # its exceptions share no base class but Exception
            raise ValueError(
                f"wanted a decoder with a KV cache that ONNX Runtime can run, got {file}: {error}"
            ) from error

    def _check_placement(self, session: ort.InferenceSession) -> None:
        """Providers leave what they cannot run to the CPU, which would then be timed under their name."""
        provider = self._provider.name
        first = session.get_providers()[0]
        if first != provider:
            raise ValueError(f"{provider} did not start and left the session to {first}")
        if provider == PROVIDERS[CPU].name:
            return
        elsewhere = {
            node.op_type
            for subgraph in session.get_provider_graph_assignment_info()
            for node in subgraph.get_nodes()
            if subgraph.ep_name != provider and node.op_type in _HEAVY_OPERATORS
        }
        if elsewhere:
            raise ValueError(f"{provider} leaves {', '.join(sorted(elsewhere))} to the CPU")


class OnnxSession:
    """Inputs `input_ids` [B, S], `attention_mask` [B, P + S], `past_key_values.{i}.key|value` [B, kv, P, head_dim].

    GroupQueryAttention appends to the cache in place when one buffer with room for what is to come is bound as both
    past and present, taking P from the mask. Graphs that cannot copy the cache each step; `shares_cache` is then False.
    """

    def __init__(self, session: ort.InferenceSession, max_tokens: int, memory: str = "cpu") -> None:
        self._session = session
        self._max_tokens = max_tokens
        self._memory = memory
        shapes = {node.name: node.shape for node in session.get_inputs() if node.name.startswith("past_key_values.")}
        self._cache_shapes = {name: (int(shape[1]), int(shape[3])) for name, shape in shapes.items()}
        self._past: dict[str, ort.OrtValue] = {}
        self._held = (0, 0)  # batch size and positions of the buffers
        self._past_tokens = 0
        self.shares_cache = self._sharing_changes_nothing()
        self.reset()

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        room = self._max_tokens if new_tokens is None else past_tokens + new_tokens
        check_room(room - past_tokens, past_tokens, self._max_tokens)
        self._past_tokens = past_tokens
        held = (batch_size, room if self.shares_cache else past_tokens)
        if not self.shares_cache or self._held != held:  # shared buffers that fit are kept: new ones cost page faults
            self._past = {}  # before the next are allocated
            self._past = self._buffers(*held)
        self._held = held

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch_size, fed = token_ids.shape
        check_room(fed, self._past_tokens, self._max_tokens)
        if not self._past_tokens and self._held[0] != batch_size:
            self.reset(batch_size)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids))
        binding.bind_cpu_input("attention_mask", np.ones((batch_size, self._past_tokens + fed), np.int64))
        binding.bind_output("logits", "cpu")
        for name, buffer in self._past.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, buffer)
            if self.shares_cache:
                binding.bind_ortvalue_output(present, buffer)
            else:
                binding.bind_output(present, self._memory)
        self._session.run_with_iobinding(binding)
        logits, *present_buffers = binding.get_outputs()
        if not self.shares_cache:
            self._past = dict(zip(self._past, present_buffers, strict=True))
        self._past_tokens += fed
        last: NDArray[np.float32] = logits.numpy()[:, -1]
        return last

    def _buffers(self, batch_size: int, tokens: int) -> dict[str, ort.OrtValue]:
        return {
            name: ort.OrtValue.ortvalue_from_numpy(
                np.full((batch_size, heads, tokens, head_dim), 0.5, np.float32), self._memory
            )
            for name, (heads, head_dim) in self._cache_shapes.items()
        }

    def _sharing_changes_nothing(self) -> bool:
        """Whether three tokens, two and then one, give the same logits with shared and with separate buffers."""
        if self._max_tokens < 3:
            return False
        try:
            self.shares_cache = False
            separate = self._three_tokens()
            self.shares_cache = True
            return bool(np.allclose(separate, self._three_tokens(), rtol=1e-4, atol=1e-5))
        except RuntimeError:
            if not self.shares_cache:
                raise
            return False

    def _three_tokens(self) -> NDArray[np.float32]:
        """Logits [2, V] after a prompt of two tokens and after one more."""
        self.reset()
        return np.stack([self.step(np.array([ids], np.int64))[0] for ids in ([1, 2], [3])])
