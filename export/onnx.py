"""Write a decoder as ONNX for onnxruntime and onnxruntime-genai, with their fused operators.

One `GroupQueryAttention` per layer (rotary embedding and KV cache inside), `MatMulNBits` for quantised matrices, skip
connections fused with the norms. Logits come for the last position only, as onnxruntime-genai wants them: a prompt
must not pay the head once per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.decoder import Array, AttentionWeights, Decoder, HalfMatrix, Matrix, MlpWeights, Norm, PackedMatrix, stacked
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE, Precision

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

#: Smaller tensors stay in the graph's own file; larger ones start at a page of the data file, which is then mapped.
_INLINE_BYTES = 1024
_ALIGNMENT_BYTES = 4096

_MICROSOFT = "com.microsoft"
#: 4 lets MatMulNBits round the activations to int8 blocks of 32; 0 computes in fp32 with the exact weights.
ACCURACY_LEVEL = 4


def check_precision(precision: Precision) -> None:
    """Raises ValueError at bf16: ONNX Runtime's CPU provider has no kernel that multiplies bf16 matrices."""
    if precision == "bf16":
        raise ValueError(
            "wanted a precision that ONNX Runtime has kernels for on a CPU, got bf16; take another or openvino"
        )


def write_onnx(decoder: Decoder, directory: Path) -> Path:
    """Write `model.onnx` and `model.onnx.data` and return the path of the former.

    Inputs `input_ids` [B, S], `attention_mask` [B, P + S], `past_key_values.{i}.key|value` [B, KV heads, P, head_dim]
    with i counting the layers that keep attention; outputs `logits` [B, 1, V] and `present.{i}.key|value`.

    Raises ValueError as `check_precision` does.
    """
    check_precision(decoder.precision)
    path = directory / MODEL_FILE
    with (directory / DATA_FILE).open("wb") as data:
        model = _Graph(decoder, data).model()
    onnx.save_model(model, path)
    return path


class _Graph:
    """Weights go to `data` as they come up, so that memory holds one of them beside the decoder."""

    def __init__(self, decoder: Decoder, data: BinaryIO) -> None:
        self.decoder = decoder
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.stored: set[str] = set()
        self.inputs = [
            _value("input_ids", TensorProto.INT64, ["B", "S"]),
            _value("attention_mask", TensorProto.INT64, ["B", "T"]),
        ]
        self.outputs = [_value("logits", TensorProto.FLOAT, ["B", 1, decoder.shape.vocab_size])]

    def model(self) -> onnx.ModelProto:
        decoder = self.decoder
        self._sequence_lengths()
        self._rotary()
        hidden, skip = self._embedding(), ""
        slot = 0
        for i, layer in enumerate(decoder.layers):
            if layer.attention is not None:
                normed, hidden = self._norm(f"layers.{i}.input_layernorm", hidden, skip, layer.attention.norm)
                skip = self._attention(f"layers.{i}.self_attn", normed, layer.attention, slot)
                skip = self._post_norm(f"layers.{i}.post_self_attn", skip, layer.attention.post_norm)
                slot += 1
            if layer.mlp is not None:
                attended = skip if decoder.shape.parallel_residual and layer.attention is not None else ""
                skip = "" if attended else skip
                normed, hidden = self._norm(f"layers.{i}.post_attention_layernorm", hidden, skip, layer.mlp.norm)
                skip = self._mlp(f"layers.{i}.mlp", normed, layer.mlp)
                skip = self._post_norm(f"layers.{i}.post_mlp", skip, layer.mlp.post_norm)
                if attended:
                    skip = self._node("Add", [attended, skip], f"layers.{i}.added")
        normed, _ = self._norm("norm", hidden, skip, decoder.norm)
        self._capped(self._head(self._last_of_each(normed)))
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="llm-nas")

    def _sequence_lengths(self) -> None:
        total = self._node("ReduceSum", ["attention_mask", self._int64("axis_1", [1])], "tokens_kept", keepdims=0)
        last = self._node("Sub", [total, self._int64("one", [1])], "last_token")
        self._node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = self._node("Shape", ["attention_mask"], "mask_shape", start=1)
        length = self._node("Squeeze", [shape], "mask_length")
        self._node("Cast", [length], "total_sequence_length", to=TensorProto.INT32)

    def _last_of_each(self, hidden: str) -> str:
        """Of the tokens fed [B, S, hidden] each row's last that the mask keeps, [B, 1, hidden].

        onnxruntime-genai fills shorter prompts of a batch up on the right.
        """
        fed = self._node("Shape", ["input_ids"], "tokens_fed", start=1)
        past = self._node("Sub", ["mask_shape", fed], "past_tokens")
        last = self._node("Sub", ["last_token", past], "last_fed")
        known = self._node("Max", [last, self._int64("zero", [0])], "last_known")
        rows = self._node("Unsqueeze", [known, self._int64("row_axes", [1, 2])], "last_rows")
        return self._node("GatherND", [hidden, rows], "last_hidden", batch_dims=1)

    def _rotary(self) -> None:
        decoder = self.decoder
        if decoder.positions is not None:
            return
        kinds = {"": decoder.inverse_frequencies}
        if any(decoder.shape.windows):
            kinds["local_"] = decoder.local_inverse_frequencies
        # angles in fp32, as transformers computes them
        positions = np.arange(decoder.max_position_embeddings, dtype=np.float32)
        for kind, frequencies in kinds.items():
            angles = np.outer(positions, frequencies)
            self._tensor(f"{kind}cos_cache", np.cos(angles))
            self._tensor(f"{kind}sin_cache", np.sin(angles))

    def _embedding(self) -> str:
        rows = self._embedding_rows()
        if self.decoder.positions is not None:
            table = self._tensor("embed_positions.weight", self.decoder.positions)
            embedded = self._node("Gather", [table, self._position_ids()], "position_embeddings", axis=0)
            return self._node("Add", [rows, embedded], "positioned_hidden_states")
        if self.decoder.embedding_scale is None:
            return rows
        scale = self._tensor("embedding_scale", np.array(self.decoder.embedding_scale, np.float32))
        return self._node("Mul", [rows, scale], "scaled_hidden_states")

    def _position_ids(self) -> str:
        """Of the tokens fed, [B, S]: how many that are kept come before each."""
        counted = self._node("CumSum", ["attention_mask", self._int64("axis_1", [1])], "tokens_so_far")
        before = self._node("Sub", [counted, self._int64("one", [1])], "positions")
        known = self._node("Max", [before, self._int64("zero", [0])], "positions_known")
        fed = self._node("Shape", ["input_ids"], "fed", start=1)
        first = self._node("Neg", [fed], "first_fed")
        end = self._int64("end", [2**31 - 1])
        return self._node("Slice", [known, first, end, self._int64("axis_1", [1])], "position_ids")

    def _embedding_rows(self) -> str:
        embedding = self.decoder.embedding
        if not isinstance(embedding, PackedMatrix):
            table = self._tensor("embed_tokens.weight", embedding)
            return self._widened(self._node("Gather", [table, "input_ids"], "hidden_states", axis=0), embedding)
        weight, scales = self._packed("embed_tokens", embedding)
        rows = self._node(
            "Reshape", [weight, self._int64("embedding_shape", [embedding.shape[0], -1])], "embedding_rows"
        )
        return self._node(
            "GatherBlockQuantized",
            [rows, "input_ids", scales],
            "hidden_states",
            domain=_MICROSOFT,
            bits=embedding.bits,
            block_size=QUANTIZATION_BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )

    def _head(self, last: str) -> str:
        decoder = self.decoder
        output = "head" if decoder.shape.final_logit_softcapping else "logits"
        if isinstance(decoder.head, PackedMatrix):
            name = "embed_tokens" if decoder.head is decoder.embedding else "lm_head"
            return self._linear(name, last, decoder.head, output)
        if decoder.head is decoder.embedding:
            # onnxruntime folds the transpose away when it loads; the file holds the matrix once
            transposed = self._node("Transpose", ["embed_tokens.weight"], "lm_head.weight", perm=[1, 0])
            return self._node("MatMul", [last, self._widened(transposed, decoder.head)], output)
        return self._linear("lm_head", last, decoder.head, output)

    def _capped(self, logits: str) -> None:
        if cap := self.decoder.shape.final_logit_softcapping:
            limit = self._tensor("logit_cap", np.array(cap, np.float32))
            bounded = self._node("Tanh", [self._node("Div", [logits, limit], "head_by_cap")], "head_bounded")
            self._node("Mul", [bounded, limit], "logits")

    def _attention(self, name: str, x: str, weights: AttentionWeights, slot: int) -> str:
        head_dim = self.decoder.shape.head_dim
        heads, groups = weights.q.shape[0] // head_dim, weights.k.shape[0] // head_dim
        projected = self._projected(name, x, weights)
        past, present = [], []
        for part in ("key", "value"):
            past.append(f"past_key_values.{slot}.{part}")
            present.append(f"present.{slot}.{part}")
            self.inputs.append(_value(past[-1], TensorProto.FLOAT, ["B", groups, "P", head_dim]))
            self.outputs.append(_value(present[-1], TensorProto.FLOAT, ["B", groups, "T", head_dim]))
        kind = "local_" if weights.window else ""
        rotates = self.decoder.positions is None
        rotary = [f"{kind}cos_cache", f"{kind}sin_cache"] if rotates else []
        inputs = [*projected, *past, "seqlens_k", "total_sequence_length", *rotary]
        window = {"local_window_size": weights.window} if weights.window else {}
        cap = self.decoder.shape.attn_logit_softcapping
        attended = self._node(
            "GroupQueryAttention",
            inputs,
            f"{name}.attended",
            *present,
            domain=_MICROSOFT,
            num_heads=heads,
            kv_num_heads=groups,
            scale=self.decoder.attention_scale,
            do_rotary=int(rotates),
            rotary_interleaved=0,
            **window,
            **({"softcap": cap} if cap else {}),
        )
        return self._biased(f"{name}.o_proj", self._linear(f"{name}.o_proj", attended, weights.o), weights.output_bias)

    def _projected(self, name: str, x: str, weights: AttentionWeights) -> list[str]:
        """Queries, keys and values for GroupQueryAttention: in one tensor, unless heads are normed."""
        maps = {"q": weights.q, "k": weights.k, "v": weights.v}
        if not weights.head_norms:
            packed = self._linear(f"{name}.qkv_proj", x, stacked(*maps.values()))
            if weights.biases:
                bias = self._tensor(f"{name}.qkv_proj.bias", np.concatenate(weights.biases))
                packed = self._node("Add", [packed, bias], f"{name}.qkv_biased")
            return [packed, "", ""]
        projected = {n: self._linear(f"{name}.{n}_proj", x, matrix) for n, matrix in maps.items()}
        for n, norm in zip("qk", weights.head_norms, strict=True):
            by_head = self._int64("by_head", [0, 0, -1, self.decoder.shape.head_dim])
            heads = self._node("Reshape", [projected[n], by_head], f"{name}.{n}_by_head")
            gamma = self._tensor(f"{name}.{n}_norm.weight", norm)
            normed = self._node(
                "SimplifiedLayerNormalization",
                [heads, gamma],
                f"{name}.{n}_normed",
                axis=-1,
                epsilon=self.decoder.norm_eps,
            )
            projected[n] = self._node("Reshape", [normed, self._int64("heads_in_row", [0, 0, -1])], f"{name}.{n}_rows")
        return list(projected.values())

    def _mlp(self, name: str, x: str, weights: MlpWeights) -> str:
        *into, down = weights.biases or (None, None, None)
        up = self._biased(f"{name}.up_proj", self._linear(f"{name}.up_proj", x, weights.up), into[-1])
        if weights.gate is None:
            product = self._activated(name, up)
        else:
            gate = self._biased(f"{name}.gate_proj", self._linear(f"{name}.gate_proj", x, weights.gate), into[0])
            product = self._node("Mul", [self._activated(name, gate), up], f"{name}.product")
        return self._biased(f"{name}.down_proj", self._linear(f"{name}.down_proj", product, weights.down), down)

    def _activated(self, name: str, x: str) -> str:
        activation = self.decoder.shape.hidden_act
        if activation == "silu":
            return self._node("Mul", [x, self._node("Sigmoid", [x], f"{name}.sigmoid")], f"{name}.silu")
        if activation == "relu":
            return self._node("Relu", [x], f"{name}.relu")
        return self._node("Gelu", [x], f"{name}.gelu", approximate="none" if activation == "gelu" else "tanh")

    def _biased(self, name: str, x: str, bias: Array | None) -> str:
        return x if bias is None else self._node("Add", [x, self._tensor(f"{name}.bias", bias)], f"{name}.biased")

    def _norm(self, name: str, hidden: str, skip: str, norm: Norm) -> tuple[str, str]:
        """Names of the normed hidden states and of `hidden + skip`, which the next residual continues."""
        vectors = [self._tensor(f"{name}.weight", norm.weight)]
        if norm.bias is not None:
            vectors.append(self._tensor(f"{name}.bias", norm.bias))
        kind = "SimplifiedLayerNormalization" if norm.bias is None else "LayerNormalization"
        epsilon = self.decoder.norm_eps
        if not skip:
            self._node(kind, [hidden, *vectors], f"{name}.output", axis=-1, epsilon=epsilon)
            return f"{name}.output", hidden
        self.nodes.append(
            helper.make_node(
                f"Skip{kind}",
                [hidden, skip, *vectors],
                [f"{name}.output", "", "", f"{name}.residual"],
                name=name,
                domain=_MICROSOFT,
                epsilon=epsilon,
            )
        )
        return f"{name}.output", f"{name}.residual"

    def _post_norm(self, name: str, x: str, norm: Norm | None) -> str:
        """What a part adds, normed where its family does that."""
        return x if norm is None else self._norm(f"{name}_layernorm", x, "", norm)[0]

    def _linear(self, name: str, x: str, matrix: Matrix, output: str | None = None) -> str:
        output = output or f"{name}.output"
        if not isinstance(matrix, PackedMatrix):
            weight = self._tensor(f"{name}.weight", np.ascontiguousarray(matrix.T))
            return self._node("MatMul", [x, self._widened(weight, matrix)], output)
        weight, scales = self._packed(name, matrix)
        rows, columns = matrix.shape
        return self._node(
            "MatMulNBits",
            [x, weight, scales],
            output,
            domain=_MICROSOFT,
            K=columns,
            N=rows,
            bits=matrix.bits,
            block_size=QUANTIZATION_BLOCK_SIZE,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _widened(self, name: str, matrix: Array | HalfMatrix) -> str:
        """A matrix of fp16 as fp32, which onnxruntime makes of it once, when it loads."""
        if matrix.dtype != np.float16:
            return name
        return self._node("Cast", [name], f"{name}.widened", to=TensorProto.FLOAT)

    def _packed(self, name: str, matrix: PackedMatrix) -> tuple[str, str]:
        """Names of the unsigned blocks [out, in / 32, 32 x bits / 8] and fp32 scales; a shared matrix is kept once."""
        rows, columns = matrix.shape
        weight, scales = f"{name}.weight", f"{name}.scales"
        if weight in self.stored:
            return weight, scales
        unsigned = (matrix.integers.astype(np.int16) + 2 ** (matrix.bits - 1)).astype(np.uint8)
        if matrix.bits == 4:
            unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
        self._tensor(weight, unsigned.reshape(rows, columns // QUANTIZATION_BLOCK_SIZE, -1))
        self._tensor(scales, matrix.scales.astype(np.float32))
        return weight, scales

    def _node(
        self, operator: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: float | str | list[int]
    ) -> str:
        self.nodes.append(
            helper.make_node(operator, inputs, list(outputs), name=outputs[0], domain=domain, **attributes)
        )
        return outputs[0]

    def _tensor(self, name: str, array: NDArray[np.generic]) -> str:
        if array.nbytes < _INLINE_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
        else:
            self.initializers.append(self._external(name, np.ascontiguousarray(array)))
        self.stored.add(name)
        return name

    def _external(self, name: str, array: NDArray[np.generic]) -> onnx.TensorProto:
        self.data.seek(-(-self.data.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        place = {"location": DATA_FILE, "offset": str(self.data.tell()), "length": str(array.nbytes)}
        self.data.write(array.data)
        return onnx.TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
            external_data=[onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items()],
        )

    def _int64(self, name: str, values: list[int]) -> str:
        return name if name in self.stored else self._tensor(name, np.array(values, np.int64))


def _value(name: str, dtype: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)
