"""OpenVINO: a stateful decoder IR, whose KV cache lives inside the infer request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from hw_profiles.devices import detect
from hw_profiles.runtimes import CPU, check_room, model_file, name_on
from hw_profiles.shapes import PRECISIONS, Precision

MODEL_FILE = "openvino_model.xml"
#: OpenVINO's choice among the devices that are here; it does not list it with them.
AUTO = "AUTO"

#: Activations are quantised on the fly in groups of this many values before meeting int8 or int4 weights; "0" keeps
#: them fp32. Quantising them is faster in prefill, but moves the logits away from the ones that the search evaluated.
DYNAMIC_QUANTIZATION_GROUP_SIZE = "0"

#: What may stand between the head's matrix product and the logits: scaling, soft capping, a change of type.
_AFTER_HEAD = ("Add", "Multiply", "Divide", "Tanh", "Convert", "Transpose")


def compile_properties(threads: int, arithmetic: str = "f32") -> dict[str, str]:
    """Plugin properties of every model timed or verified. The defaults compute in reduced precision: other tokens."""
    return {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "KV_CACHE_PRECISION": arithmetic,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_QUANTIZATION_GROUP_SIZE,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(threads),
    }


#: What a cache that nobody filled holds: ordinary numbers, since arithmetic on denormal ones is slow.
_CACHE_VALUES = np.linspace(-1, 1, 64, dtype=np.float32)


def arithmetic(model: ov.Model) -> str:
    """What a file asks to be computed in, by its own `runtime_options`, where the plugins do not look for it."""
    path = ["runtime_options", "INFERENCE_PRECISION_HINT"]
    return str(model.get_rt_info(path).value) if model.has_rt_info(path) else "f32"


class OpenVinoRuntime:
    def __init__(self, device: str = CPU) -> None:
        self.name = name_on("openvino", device)
        self._device = device
        # only where the CPU itself multiplies bf16, not where the plugin would have to emulate it
        self.precisions: tuple[Precision, ...] = tuple(
            precision for precision in PRECISIONS if precision != "bf16" or (device == CPU and detect().has_bf16)
        )

    def version(self) -> str:
        return str(ov.__version__)

    def devices(self) -> list[str]:
        return [*map(str, ov.Core().available_devices), AUTO]

    def load(self, path: Path, threads: int, max_tokens: int) -> OpenVinoSession:
        file = model_file(path, MODEL_FILE)
        core = ov.Core()
        try:
            model = core.read_model(str(file))
            slice_before_head(model)
            compiled = core.compile_model(model, self._device, self._properties(core, threads, arithmetic(model)))
        except RuntimeError as error:
            raise ValueError(f"wanted an IR that OpenVINO can compile, got {file}: {error}") from error
        return OpenVinoSession(compiled, max_tokens)

    def _properties(self, core: ov.Core, threads: int, arithmetic: str) -> dict[str, Any]:
        """Of `compile_properties` what the device knows; AUTO hands them on to the device that it chooses."""
        wanted = compile_properties(threads, arithmetic)

        def known(device: str) -> dict[str, str]:
            supported = core.get_property(device, "SUPPORTED_PROPERTIES")
            return {name: value for name, value in wanted.items() if name in supported}

        if self._device != AUTO:
            return known(self._device)
        # by default the CPU answers until the chosen device has compiled: two devices in one measurement
        own = {"PERFORMANCE_HINT": wanted["PERFORMANCE_HINT"], "ENABLE_STARTUP_FALLBACK": "NO"}
        return {**own, "DEVICE_PROPERTIES": {device: known(device) for device in core.available_devices}}


class OpenVinoSession:
    """Inputs `input_ids` [B, S], `attention_mask` [B, P + S], `position_ids` [B, S], `beam_idx` [B]."""

    def __init__(self, compiled: ov.CompiledModel, max_tokens: int) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._max_tokens = max_tokens
        self._past_tokens = 0

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        check_room(new_tokens or 0, past_tokens, self._max_tokens)
        self._request.reset_state()
        self._past_tokens = past_tokens
        if past_tokens:
            for variable in self._request.query_state():
                _, heads, _, head_dim = variable.state.shape
                # one row for all: reading it costs what reading any other values would
                row = np.resize(_CACHE_VALUES, (1, 1, 1, head_dim))
                shape = (batch_size, heads, past_tokens, head_dim)
                variable.state = ov.Tensor(np.ascontiguousarray(np.broadcast_to(row, shape)))

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch_size, fed = token_ids.shape
        past = self._past_tokens
        check_room(fed, past, self._max_tokens)
        inputs = {
            "input_ids": np.ascontiguousarray(token_ids),
            "attention_mask": np.ones((batch_size, past + fed), np.int64),
            "position_ids": np.tile(np.arange(past, past + fed, dtype=np.int64), (batch_size, 1)),
            "beam_idx": np.arange(batch_size, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._inputs}, share_inputs=True)
        self._past_tokens += fed
        # the tensor is the request's own and the next step overwrites it
        last: NDArray[np.float32] = self._request.get_tensor("logits").data[:, -1].copy()
        return last


def slice_before_head(model: ov.Model) -> bool:
    """Let the head see only the last token, as openvino_genai does: logits [B, 1, V] in place of [B, S, V].

    Follows the logits back to the matrix product that makes them and slices its activations [B, S, hidden] along S.
    Returns False, the model unchanged, where no such product is found.
    """
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _AFTER_HEAD:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or len(node.input_value(0).get_partial_shape()) != 3:
        return False
    minus_one = ops.constant(np.array([-1], np.int64))
    end = ops.constant(np.array([np.iinfo(np.int64).max], np.int64))
    step, sequence_axis = (ops.constant(np.array([1], np.int64)) for _ in range(2))
    last = ops.slice(node.input_value(0), minus_one, end, step, sequence_axis)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return True
