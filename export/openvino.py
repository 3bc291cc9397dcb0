"""Write a decoder as the stateful OpenVINO IR that `openvino_genai.LLMPipeline` runs.

The graph is built operation by operation in the patterns that OpenVINO's fusions look for (RMS norm, rotary embedding,
KV cache inside scaled dot product attention), which takes about a second where tracing the torch model takes ten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops
from openvino.op import util as op_util

from export.decoder import Array, AttentionWeights, Decoder, Matrix, MlpWeights, Norm, PackedMatrix, stacked
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE, BlockShape

if TYPE_CHECKING:  # a profile needs none of it, and it takes seconds to import
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "openvino_model.xml"
#: Defaults that the file carries, so that a runtime computes with the numbers that were searched and verified:
#: OpenVINO's own would round the KV cache and the activations to 8 bits (mean KL 7e-3 at int8 weights instead of 1e-8).
RUNTIME_OPTIONS = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

#: Weights up to which matrices on the same input are multiplied as one. A product costs the plugin some 15 microseconds
#: whatever its size, where SmolLM2's take 10 to 80; of larger ones it is nothing, and stacking them takes memory.
_STACKED_WEIGHTS = 2**22


def openvino_model(decoder: Decoder) -> ov.Model:
    """Inputs `input_ids`, `attention_mask`, `position_ids`, `beam_idx`; output `logits` [B, S, V]; state: the cache."""
    return _Graph(decoder).model()


def write_openvino(decoder: Decoder, directory: Path) -> Path:
    """Write `openvino_model.xml` and its `.bin` and return the path of the former; ValueError as `check_heads`."""
    check_heads(decoder.shape.blocks)
    path = directory / MODEL_FILE
    model = openvino_model(decoder)
    own = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"} if decoder.precision == "bf16" else {}
    for option, value in (RUNTIME_OPTIONS | own).items():
        model.set_rt_info(value, ["runtime_options", option])
    ov.save_model(model, path, compress_to_fp16=False)
    if decoder.precision == "fp16":
        _keep_halves(path)
    return path


def check_heads(blocks: Iterable[BlockShape]) -> None:
    """ValueError where layers differ in heads per KV head.

    OpenVINO 2026.4's paged attention, which `LLMPipeline` runs, gives all layers the kernel of one and then computes
    other logits or corrupts the heap.
    """
    ratios = {block.num_attention_heads // block.num_key_value_heads for block in blocks if block.num_attention_heads}
    if len(ratios) > 1:
        numbers = ", ".join(map(str, sorted(ratios)))
        raise ValueError(
            f"wanted as many query heads per KV group in every layer for openvino, got {numbers}; take another "
            "runtime or format, or layers that are alike"
        )


def _keep_halves(path: Path) -> None:
    """Mark the matrices of an IR as compressed, which its Python API cannot.

    Otherwise the CPU plugin widens them all when it loads, and reads twice the bytes at every token.
    """
    tree = ElementTree.parse(path)
    for layer in tree.iter("layer"):
        port = layer.find("input/port")
        if layer.get("type") == "Convert" and port is not None and port.get("precision") == "FP16":
            info = ElementTree.Element("rt_info")
            ElementTree.SubElement(info, "attribute", name="decompression", version="0")
            layer.insert(1, info)
    tree.write(path)


def write_openvino_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer and detokenizer models that `LLMPipeline` looks for."""
    from openvino_tokenizers import convert_tokenizer

    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    ov.save_model(encoder, directory / "openvino_tokenizer.xml")
    ov.save_model(decoder, directory / "openvino_detokenizer.xml")


@dataclass(frozen=True)
class _View:
    """What layers of one kind see of a text: rotary `cos` and `sin` [B, 1, S, head_dim], `mask` [B, 1, S, P + S]."""

    cos: ov.Node
    sin: ov.Node
    mask: ov.Node


class _Graph:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.input_ids = _parameter("input_ids", ov.Type.i64, 2)
        self.attention_mask = _parameter("attention_mask", ov.Type.i64, 2)
        self.position_ids = _parameter("position_ids", ov.Type.i64, 2)
        self.beam_idx = _parameter("beam_idx", ov.Type.i32, 1)
        self.assigns: list[ov.Node] = []

    def model(self) -> ov.Model:
        decoder = self.decoder
        embedding = _constant(decoder.embedding)
        head = embedding if decoder.head is decoder.embedding else _constant(decoder.head)
        hidden = ops.gather(embedding, ops.convert(self.input_ids, "i32"), _i64(0))
        if decoder.embedding_scale is not None:
            hidden = ops.multiply(hidden, ops.constant(np.float32(decoder.embedding_scale)))
        if decoder.positions is not None:
            table = ops.constant(decoder.positions, shared_memory=True)
            hidden = ops.add(hidden, ops.gather(table, ops.convert(self.position_ids, "i32"), _i64(0)))
        batch = ops.gather(ops.shape_of(self.input_ids, "i64"), _i64([0]), _i64(0))
        views = {window: self._view(window) for window in sorted(set(decoder.shape.windows) or {0})}
        slot = 0
        for layer in decoder.layers:
            before = hidden
            if layer.attention is not None:
                normed = self._norm(hidden, layer.attention.norm)
                added = self._attention(normed, layer.attention, slot, batch, views[layer.attention.window])
                hidden = ops.add(hidden, self._post_norm(added, layer.attention.post_norm))
                slot += 1
            if layer.mlp is not None:
                read = before if decoder.shape.parallel_residual else hidden
                added = self._mlp(self._norm(read, layer.mlp.norm), layer.mlp)
                hidden = ops.add(hidden, self._post_norm(added, layer.mlp.post_norm))
        logits = _capped(_linear(self._norm(hidden, decoder.norm), head), decoder.shape.final_logit_softcapping)
        logits.output(0).get_tensor().set_names({"logits"})
        result = ops.result(logits, name="logits")
        inputs = [self.input_ids, self.attention_mask, self.position_ids, self.beam_idx]
        return ov.Model([result], self.assigns, inputs, "decoder")

    def _view(self, window: int) -> _View:
        """Of layers with this window, 0 for none."""
        decoder = self.decoder
        frequencies = decoder.local_inverse_frequencies if window else decoder.inverse_frequencies
        positions = ops.convert(ops.unsqueeze(self.position_ids, _i64([1, 3])), "f32")
        angles = ops.multiply(positions, ops.constant(frequencies.reshape(1, 1, 1, -1)))
        both_halves = ops.concat([angles, angles], axis=-1)
        return _View(ops.cos(both_halves), ops.sin(both_halves), self._causal_mask(window))

    def _causal_mask(self, window: int) -> ov.Node:
        """fp32 [B, 1, S, P + S], 0 or the least number: a token sees itself and what `attention_mask` keeps before it.

        With a window, only so far back. Padding sees itself too: the softmax of an empty row is not a number, which
        later layers would spread. As a boolean the mask would send the plugin's attention to a kernel that takes three
        times as long over a prompt.
        """
        total = ops.gather(ops.shape_of(self.attention_mask, "i64"), _i64(1), _i64(0))
        fed = ops.gather(ops.shape_of(self.input_ids, "i64"), _i64(1), _i64(0))
        columns = ops.unsqueeze(ops.range(_i64(0), total, _i64(1), output_type="i64"), _i64([0]))
        rows = ops.unsqueeze(ops.range(ops.subtract(total, fed), total, _i64(1), output_type="i64"), _i64([1]))
        itself = ops.unsqueeze(ops.equal(columns, rows), _i64([0, 1]))
        kept = ops.convert(ops.unsqueeze(self.attention_mask, _i64([1, 2])), "boolean")
        zero, least = ops.constant(np.float32(0)), ops.constant(np.finfo(np.float32).min)
        if not window:
            before = ops.unsqueeze(ops.less(columns, rows), _i64([0, 1]))
            return ops.select(ops.logical_or(ops.logical_and(before, kept), itself), zero, least)
        # the operators, the products with true among them, in which openvino_genai's paged attention finds a window
        # (StateManagementPattern); written otherwise it attends to everything
        true = ops.constant(np.array([[[[True]]]]))
        near = ops.greater(columns, ops.add(rows, _i64(-window)))
        seen = ops.bitwise_and(ops.less_equal(columns, rows), near)
        seen = ops.bitwise_and(seen, ops.logical_or(kept, itself))
        seen = ops.bitwise_and(ops.bitwise_and(true, seen), true)
        mask = ops.select(ops.broadcast(seen, ops.shape_of(seen, "i64")), zero, least)
        return ops.slice(mask, _i64([0]), _i64([2**63 - 1]), _i64([1]), _i64([3]))

    def _attention(
        self,
        x: ov.Node,
        weights: AttentionWeights,
        slot: int,
        batch: ov.Node,
        view: _View,
    ) -> ov.Node:
        head_dim = self.decoder.shape.head_dim
        heads, groups = weights.q.shape[0] // head_dim, weights.k.shape[0] // head_dim
        query, key, value = _products(x, weights.q, weights.k, weights.v)
        if weights.biases:
            query, key, value = map(_biased, (query, key, value), weights.biases)
        query, key, value = self._heads(query, heads), self._heads(key, groups), self._heads(value, groups)
        if weights.head_norms:
            query, key = map(self._rms_norm, (query, key), weights.head_norms)
        if self.decoder.positions is None:
            query, key = self._rotate(query, view.cos, view.sin), self._rotate(key, view.cos, view.sin)
        key = self._cached(key, f"past_key_values.{slot}.keypresent.{slot}.key", groups, batch)
        value = self._cached(value, f"past_key_values.{slot}.valuepresent.{slot}.value", groups, batch)
        key, value = self._repeat(key, groups, heads), self._repeat(value, groups, heads)
        attended = self._attended(query, key, value, view.mask)
        merged = ops.reshape(ops.transpose(attended, _i64([0, 2, 1, 3])), _i64([0, 0, heads * head_dim]), True)
        return _biased(_linear(merged, _constant(weights.o)), weights.output_bias)

    def _attended(self, query: ov.Node, key: ov.Node, value: ov.Node, mask: ov.Node) -> ov.Node:
        """[B, heads, S, head_dim]. Capped scores have no operator of their own, and paged attention has none of it."""
        scale = ops.constant(np.float32(self.decoder.attention_scale))
        if not (cap := self.decoder.shape.attn_logit_softcapping):
            return ops.scaled_dot_product_attention(query, key, value, mask, scale, causal=False)
        scores = _capped(ops.multiply(ops.matmul(query, key, False, True), scale), cap)
        return ops.matmul(ops.softmax(ops.add(scores, mask), -1), value, False, False)

    def _heads(self, x: ov.Node, heads: int) -> ov.Node:
        """[B, S, heads x head_dim] to [B, heads, S, head_dim]."""
        split = ops.reshape(x, _i64([0, 0, heads, self.decoder.shape.head_dim]), True)
        return ops.transpose(split, _i64([0, 2, 1, 3]))

    def _rotate(self, x: ov.Node, cos: ov.Node, sin: ov.Node) -> ov.Node:
        half = self.decoder.shape.head_dim // 2
        first = ops.slice(x, _i64([0]), _i64([half]), _i64([1]), _i64([3]))
        second = ops.slice(x, _i64([half]), _i64([2**63 - 1]), _i64([1]), _i64([3]))
        rotated = ops.concat([ops.multiply(second, ops.constant(np.float32(-1.0))), first], axis=-1)
        return ops.add(ops.multiply(x, cos), ops.multiply(rotated, sin))

    def _cached(self, new: ov.Node, name: str, groups: int, batch: ov.Node) -> ov.Node:
        """Append [B, groups, S, head_dim] to the state of that name and return all of it."""
        head_dim = self.decoder.shape.head_dim
        variable_info = op_util.VariableInfo()
        variable_info.data_shape = ov.PartialShape([-1, groups, -1, head_dim])
        variable_info.data_type = ov.Type.f32
        variable_info.variable_id = name
        variable = op_util.Variable(variable_info)
        empty_shape = ops.concat([batch, _i64([groups]), _i64([0]), _i64([head_dim])], axis=0)
        empty = ops.broadcast(ops.constant(np.float32(0)), empty_shape)
        past = ops.gather(ops.read_value(empty, variable), self.beam_idx, _i64(0))
        present = ops.concat([past, new], axis=2)
        self.assigns.append(ops.assign(present, variable))
        return present

    def _repeat(self, x: ov.Node, groups: int, heads: int) -> ov.Node:
        """Each KV head serves `heads / groups` query heads.

        As a broadcast in both directions, the one form of grouped queries that the plugin fuses into its attention with
        a KV cache and that turns into paged attention (openvino_genai's continuous batching, OpenVINO Model Server).
        """
        if heads == groups:
            return x
        times = _i64([1, 1, heads // groups, 1, 1])
        repeated = ops.broadcast(ops.unsqueeze(x, _i64([2])), times, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(repeated, _i64([0, heads, -1, self.decoder.shape.head_dim]), True)

    def _mlp(self, x: ov.Node, weights: MlpWeights) -> ov.Node:
        *into, down = weights.biases or (None, None, None)
        if weights.gate is None:
            product = self._activated(_biased(_linear(x, _constant(weights.up)), into[-1]))
        else:
            gate, up = _products(x, weights.gate, weights.up)
            product = ops.multiply(self._activated(_biased(gate, into[0])), _biased(up, into[-1]))
        return _biased(_linear(product, _constant(weights.down)), down)

    def _activated(self, x: ov.Node) -> ov.Node:
        match self.decoder.shape.hidden_act:
            case "silu":
                return ops.swish(x)
            case "relu":
                return ops.relu(x)
            case "gelu":
                return ops.gelu(x, "erf")
            case "gelu_pytorch_tanh":
                return ops.gelu(x, "tanh")

    def _norm(self, x: ov.Node, norm: Norm) -> ov.Node:
        if norm.bias is None:
            return self._rms_norm(x, norm.weight)
        normed = ops.mvn(x, _i64([-1]), True, self.decoder.norm_eps, "inside_sqrt")
        return _biased(ops.multiply(normed, ops.constant(norm.weight.reshape(1, 1, -1))), norm.bias)

    def _post_norm(self, x: ov.Node, norm: Norm | None) -> ov.Node:
        """What a part adds, normed where its family does that."""
        return x if norm is None else self._norm(x, norm)

    def _rms_norm(self, x: ov.Node, weight: NDArray[np.float32]) -> ov.Node:
        squares = ops.power(x, ops.constant(np.float32(2)))
        mean = ops.reduce_mean(squares, _i64([-1]), keep_dims=True)
        deviation = ops.sqrt(ops.add(mean, ops.constant(np.float32(self.decoder.norm_eps))))
        normed = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), deviation))
        return ops.multiply(normed, ops.constant(weight.reshape(1, 1, -1)))


def _parameter(name: str, dtype: ov.Type, rank: int) -> ov.Node:
    node = ops.parameter([-1] * rank, dtype, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def _linear(x: ov.Node, weight: ov.Node) -> ov.Node:
    return ops.matmul(x, weight, False, True)


def _products(x: ov.Node, *matrices: Matrix) -> list[ov.Node]:
    """x multiplied by each of the matrices [out, in]."""
    rows = [matrix.shape[0] for matrix in matrices]
    if sum(rows) * matrices[0].shape[1] > _STACKED_WEIGHTS:
        return [_linear(x, _constant(matrix)) for matrix in matrices]
    together = _linear(x, _constant(stacked(*matrices), shared=False))
    return list(ops.variadic_split(together, _i64(2), _i64(rows)).outputs())


def _capped(x: ov.Node, cap: float) -> ov.Node:
    limit = ops.constant(np.float32(cap))
    return ops.multiply(ops.tanh(ops.divide(x, limit)), limit) if cap else x


def _biased(x: ov.Node, bias: Array | None) -> ov.Node:
    return x if bias is None else ops.add(x, ops.constant(bias.reshape(1, 1, -1)))


def _constant(matrix: Matrix, shared: bool = True) -> ov.Node:
    """fp32 [out, in]; a rounded matrix stays compressed, with the decompression that the plugins fuse.

    `shared` memory has to outlive the graph.
    """
    if not isinstance(matrix, PackedMatrix):
        if matrix.dtype == np.float32:
            return ops.constant(matrix, shared_memory=shared)
        halves = matrix
        if matrix.dtype == np.uint16:
            halves = ov.Tensor(matrix, ov.Shape(matrix.shape), ov.Type.bf16)
        return ops.convert(ops.constant(halves, shared_memory=shared), "f32")
    rows, columns = matrix.shape
    blocks = columns // QUANTIZATION_BLOCK_SIZE
    shape = [rows, blocks, QUANTIZATION_BLOCK_SIZE]
    if matrix.bits == 4:
        nibbles = matrix.integers.reshape(-1).view(np.uint8) & 0xF
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        integers = ops.constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.i4), shared_memory=False)
    else:
        integers = ops.constant(matrix.integers.reshape(shape), shared_memory=shared)
    scales = ops.constant(matrix.scales.reshape(rows, blocks, 1), shared_memory=shared)
    scaled = ops.multiply(ops.convert(integers, "f16"), scales)
    return ops.convert(ops.reshape(scaled, _i64([rows, columns]), False), "f32")


def _i64(values: int | list[int]) -> ov.Node:
    return ops.constant(np.array(values, dtype=np.int64))
