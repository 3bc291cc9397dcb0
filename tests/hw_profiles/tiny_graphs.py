"""Decoders of one or two attention layers and random weights, in the formats of the runtimes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import openvino as ov
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops
from openvino.op import util as op_util

VOCAB_SIZE, HIDDEN_SIZE, HEAD_DIM, MAX_POSITIONS = 23, 32, 16, 1024


def _weights(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def write_onnx(directory: Path) -> Path:
    """Two GroupQueryAttention layers with different KV heads, wired as onnxruntime-genai's builder does."""
    rng = np.random.default_rng(0)
    angles = np.arange(MAX_POSITIONS)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    constants: dict[str, NDArray[np.generic]] = {
        "one": np.array([1], np.int64),
        "axis": np.array(1, np.int64),
        "last": np.array([-1], np.int64),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "embedding": _weights(rng, VOCAB_SIZE, HIDDEN_SIZE),
        "head": _weights(rng, HIDDEN_SIZE, VOCAB_SIZE),
    }
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["last_positions"]),
        helper.make_node("Cast", ["last_positions"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "axis"], ["total_long"]),
        helper.make_node("Cast", ["total_long"], ["total"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden.0"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, VOCAB_SIZE])]
    for i, (heads, groups) in enumerate([(4, 2), (3, 1)]):
        for name, count in (("q", heads), ("k", groups), ("v", groups)):
            constants[f"{name}_proj.{i}"] = _weights(rng, HIDDEN_SIZE, count * HEAD_DIM)
            nodes.append(helper.make_node("MatMul", [f"hidden.{i}", f"{name}_proj.{i}"], [f"{name}.{i}"]))
        constants[f"o_proj.{i}"] = _weights(rng, heads * HEAD_DIM, HIDDEN_SIZE)
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        for name, axis in [(name, "P") for name in past] + [(name, "P + S") for name in present]:
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", groups, axis, HEAD_DIM])
            (inputs if name in past else outputs).append(info)
        nodes += [
            helper.make_node(
                "GroupQueryAttention",
                [f"q.{i}", f"k.{i}", f"v.{i}", *past, "seqlens_k", "total", "cos", "sin"],
                [f"attention.{i}", *present],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=groups,
                do_rotary=1,
            ),
            helper.make_node("MatMul", [f"attention.{i}", f"o_proj.{i}"], [f"output.{i}"]),
            helper.make_node("Add", [f"hidden.{i}", f"output.{i}"], [f"hidden.{i + 1}"]),
        ]
    nodes += [
        helper.make_node("Gather", ["hidden.2", "last"], ["last_hidden"], axis=1),
        helper.make_node("MatMul", ["last_hidden", "head"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    path = directory / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def write_onnx_without_fused_attention(directory: Path) -> Path:
    """One layer whose cache grows by Concat, so that past and present cannot share a buffer."""
    rng = np.random.default_rng(0)
    constants: dict[str, NDArray[np.generic]] = {
        "last": np.array([-1], np.int64),
        "head_axis": np.array([1], np.int64),
        "mask_axes": np.array([1, 2], np.int64),
        "embedding": _weights(rng, VOCAB_SIZE, HEAD_DIM),
        "head": _weights(rng, HEAD_DIM, VOCAB_SIZE),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "head_axis"], ["hidden"]),
        helper.make_node("Concat", ["past_key_values.0.key", "hidden"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "hidden"], ["present.0.value"], axis=2),
        helper.make_node("Transpose", ["present.0.key"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["hidden", "keys"], ["scores"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Log", ["kept"], ["log_kept"]),
        helper.make_node("Unsqueeze", ["log_kept", "mask_axes"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["odds"], axis=-1),
        helper.make_node("MatMul", ["odds", "present.0.value"], ["attention"]),
        helper.make_node("Squeeze", ["attention", "head_axis"], ["mixed"]),
        helper.make_node("Gather", ["mixed", "last"], ["last_hidden"], axis=1),
        helper.make_node("MatMul", ["last_hidden", "head"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", name]) for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, VOCAB_SIZE])]
    for part in ("key", "value"):
        past, present = f"past_key_values.0.{part}", f"present.0.{part}"
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["B", 1, "P", HEAD_DIM]))
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["B", 1, "P + S", HEAD_DIM]))
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    path = directory / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def openvino_model() -> ov.Model:
    """One attention layer; the last logits need no causal mask.

    The state must sit in the pattern that OpenVINO fuses into its attention: outside it, an empty initial state made
    plugin 2026.4 raise or, its length computed at run time, keep old tokens through `reset_state`.
    """
    rng = np.random.default_rng(0)
    names = {"input_ids": (2, np.int64), "attention_mask": (2, np.int64), "position_ids": (2, np.int64)}
    parameters = {name: ops.parameter([-1] * rank, kind, name=name) for name, (rank, kind) in names.items()}
    parameters["beam_idx"] = ops.parameter([-1], np.int32, name="beam_idx")
    for name, parameter in parameters.items():
        parameter.output(0).set_names({name})
    ids, beam_idx = parameters["input_ids"], parameters["beam_idx"]
    positions = ops.unsqueeze(ops.convert(parameters["position_ids"], "f32"), ops.constant(2))
    embedding = ops.gather(ops.constant(_weights(rng, VOCAB_SIZE, HIDDEN_SIZE)), ids, ops.constant(0))
    hidden = ops.add(embedding, ops.multiply(positions, ops.constant(np.float32(0.1))))
    batch = ops.gather(ops.shape_of(ids, "i64"), ops.constant(np.array([0])), ops.constant(0))
    empty_shape = ops.concat([batch, ops.constant(np.array([1, 0, HIDDEN_SIZE]))], 0)
    swap_axes = ops.constant(np.array([0, 2, 1, 3]))
    assigns = []

    def one_head() -> ov.Node:
        projected = ops.matmul(hidden, ops.constant(_weights(rng, HIDDEN_SIZE, HIDDEN_SIZE)), False, False)
        split = ops.reshape(projected, ops.constant(np.array([0, 0, 1, HIDDEN_SIZE])), True)
        return ops.transpose(split, swap_axes)

    def cached(new: ov.Node, name: str) -> ov.Node:
        info = op_util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, 1, -1, HIDDEN_SIZE]), ov.Type.f32, name
        variable = op_util.Variable(info)
        state = ops.read_value(ops.broadcast(ops.constant(np.float32(0)), empty_shape), variable)
        present = ops.concat([ops.gather(state, beam_idx, ops.constant(0)), new], 2)
        assigns.append(ops.assign(present, variable))
        return present

    query, key, value = (one_head() for _ in range(3))
    attended = ops.scaled_dot_product_attention(query, cached(key, "key"), cached(value, "value"))
    mixed = ops.reshape(ops.transpose(attended, swap_axes), ops.constant(np.array([0, 0, HIDDEN_SIZE])), True)
    logits = ops.matmul(mixed, ops.constant(_weights(rng, VOCAB_SIZE, HIDDEN_SIZE)), False, True)
    logits.output(0).set_names({"logits"})
    return ov.Model([ops.result(logits)], assigns, list(parameters.values()), "tiny")


def write_openvino(directory: Path) -> Path:
    path = directory / "openvino_model.xml"
    ov.save_model(openvino_model(), path, compress_to_fp16=False)
    return path


def write_gguf(directory: Path) -> Path:
    """Two layers of a Llama with two KV heads."""
    rng = np.random.default_rng(0)
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(HIDDEN_SIZE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", _weights(rng, VOCAB_SIZE, HIDDEN_SIZE))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN_SIZE, np.float32))
    rows = {"attn_q": 4 * HEAD_DIM, "attn_k": 2 * HEAD_DIM, "attn_v": 2 * HEAD_DIM, "ffn_gate": HIDDEN_SIZE}
    for i in range(2):
        for name, count in {**rows, "ffn_up": HIDDEN_SIZE, "ffn_down": HIDDEN_SIZE}.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", _weights(rng, count, HIDDEN_SIZE))
        writer.add_tensor(f"blk.{i}.attn_output.weight", _weights(rng, HIDDEN_SIZE, 4 * HEAD_DIM))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(HIDDEN_SIZE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: By engine.
WRITERS = {"onnxruntime": write_onnx, "openvino": write_openvino, "llamacpp": write_gguf}
