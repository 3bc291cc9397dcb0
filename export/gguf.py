"""Write a decoder as the GGUF file that llama.cpp and everything built on it runs.

Layers that are alike make a file of the family's own architecture; others one of `deci`, whose heads and widths are
lists (https://github.com/ggml-org/llama.cpp/blob/master/src/models/deci.cpp). Integers and scales go unchanged into
the blocks of Q4_0 and Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray

from export.decoder import Array, AttentionWeights, Decoder, Layer, Matrix, MlpWeights, Norm, PackedMatrix, stacked
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE, HiddenAct, ModelShape, Precision

MODEL_FILE = "model.gguf"

#: The narrowest that llama.cpp runs.
_WIDTH_OF_NO_MLP = 1
_FILE_TYPES: dict[Precision, gguf.LlamaFileType] = {
    "fp32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_TENSOR_TYPES = {"float32": TensorType.F32, "float16": TensorType.F16, "uint16": TensorType.BF16}
_HETEROGENEOUS = "deci"
#: Architectures that rotate pairs of neighbours, where Hugging Face's weights have them half a head apart.
_ROTATING_NEIGHBOURS = ("llama", _HETEROGENEOUS)
#: What llama.cpp computes in MLPs, GPT-NeoX's as if it were the tanh form; in others it is silu.
_ACTIVATIONS: dict[str, HiddenAct] = {
    "gemma2": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "gpt2": "gelu_pytorch_tanh",
    "gptneox": "gelu",
}


@dataclass(frozen=True)
class _Tensor:
    """`heads` is above 0 where rows are to be put into the order of neighbours, head by head."""

    name: str
    values: Matrix
    heads: int = 0


def write_gguf(decoder: Decoder, directory: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write `model.gguf`, tensor by tensor, and return its path; `metadata` is that of name and tokenizer.

    Without metadata the file has no tokens, which suffices for timing. Raises ValueError for what llama.cpp does not
    compute: normed heads (Qwen3), norms behind parts (Gemma) and layer norms (GPT-2, GPT-NeoX) where layers differ,
    rotary scaling beside biases, scores scaled otherwise than by the head's size, caps in others than Gemma 2, a head
    of its own in that, windows in no regular order, other activations than the architecture's, no layer at all.
    """
    layers = _merged(decoder.layers)
    architecture = _architecture(decoder, layers)
    if architecture == _HETEROGENEOUS:
        layers = _with_zeros(layers, decoder.shape)
    path = directory / MODEL_FILE
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, decoder, layers)
    for key, value in (metadata or {"tokenizer.ggml.model": "none"}).items():
        _add(writer, key, value)
    tensors = list(_tensors(decoder, layers, architecture))
    types = {tensor.name: (_type(tensor.values), _stored_shape(tensor.values)) for tensor in tensors}
    _write_tensors(writer, types, (_stored(_reordered(tensor)) for tensor in tensors))
    return path


def write_fp32_copy(source: Path, target: Path) -> Path:
    """Write the same GGUF file with every tensor as fp32, as gguf's own reader understands it; return `target`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    types = {tensor.name: (TensorType.F32, tuple(map(int, reversed(tensor.shape)))) for tensor in reader.tensors}
    values = (gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors)
    _write_tensors(writer, types, values)
    return target


def _write_tensors(
    writer: gguf.GGUFWriter, types: Mapping[str, tuple[TensorType, tuple[int, ...]]], values: Iterable[NDArray[Any]]
) -> None:
    """Complete the file with the tensors of these types and shapes, of which one at a time is in memory."""
    for name, (kind, shape) in types.items():
        stored = np.dtype(np.float32 if kind == TensorType.F32 else np.uint8)
        writer.add_tensor_info(name, shape, stored, math.prod(shape) * stored.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in values:
        writer.write_tensor_data(value)
    writer.close()


def _merged(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same without empty layers, and with an attention whose MLP is skipped beside the MLP that comes next."""
    merged: list[Layer] = []
    for layer in layers:
        if layer.attention is None and layer.mlp is not None and merged and merged[-1].mlp is None:
            merged[-1] = Layer(merged[-1].attention, layer.mlp)
        elif layer.attention is not None or layer.mlp is not None:
            merged.append(layer)
    return tuple(merged)


def _with_zeros(layers: tuple[Layer, ...], shape: ModelShape) -> tuple[Layer, ...]:
    """The same with parts that add nothing, where llama.cpp cannot do without: any MLP, and the first attention.

    It leaves a layer's attention out where there is no MLP behind it, and learns a head's size from the first layer.
    """
    norm = Norm(np.ones(shape.hidden_size, np.float32))
    rows = np.zeros((_WIDTH_OF_NO_MLP, shape.hidden_size), np.float32)
    mlp = MlpWeights(norm, rows, rows, np.ascontiguousarray(rows.T))
    layers = tuple(replace(layer, mlp=layer.mlp or mlp) for layer in layers)
    if layers[0].attention is None:
        head = np.zeros((shape.head_dim, shape.hidden_size), np.uint16)  # bf16: any width will do, half the bytes
        attention = AttentionWeights(norm, head, head, head, np.ascontiguousarray(head.T))
        layers = (replace(layers[0], attention=attention), *layers[1:])
    return layers


def _architecture(decoder: Decoder, layers: tuple[Layer, ...]) -> str:
    shape = decoder.shape
    if not layers:
        raise ValueError("wanted a layer that keeps its attention or its MLP, got none; export to onnx")
    sizes = {_sizes(decoder, layer) for layer in layers}
    alike = len(sizes) == 1 and 0 not in next(iter(sizes))
    if (shape.qk_norm or shape.post_norms) and not alike:
        raise ValueError(
            "wanted layers of one shape, since llama.cpp runs Qwen3's and Gemma's norms in such models alone, got "
            f"{len(sizes)} shapes; search with --homogeneous, or export to openvino or onnx"
        )
    if not math.isclose(decoder.attention_scale, shape.head_dim**-0.5):
        raise ValueError(
            f"wanted scores scaled by {shape.head_dim**-0.5:.4g}, 1 / sqrt(head_dim), as llama.cpp does, got "
            f"{decoder.attention_scale:.4g}; export to onnx"
        )
    name = _name(shape, alike)
    if shape.layer_norm and not (alike and next(iter(sizes))[0] * shape.head_dim == shape.hidden_size):
        raise ValueError(
            f"wanted layers of one width with all heads, since llama.cpp runs {name} in such models alone, got "
            f"{len(sizes)} shapes or fewer heads; export to openvino or onnx"
        )
    caps = {bool(shape.attn_logit_softcapping), bool(shape.final_logit_softcapping)}
    if caps != {name == "gemma2"}:
        raise ValueError(
            f"wanted caps on both scores and logits in Gemma 2 and none elsewhere, as llama.cpp has them, got "
            f"{shape.attn_logit_softcapping:g} and {shape.final_logit_softcapping:g} in {name}; export to onnx"
        )
    if name == "gemma2" and decoder.head is not decoder.embedding:
        raise ValueError(
            "wanted a head tied to the embedding in Gemma 2, as llama.cpp has it, got another; export to onnx"
        )
    if shape.hidden_act != (activation := _ACTIVATIONS.get(name, "silu")):
        raise ValueError(
            f"wanted {activation} in the MLPs, as llama.cpp's {name} has it, got {shape.hidden_act}; export to "
            "openvino or onnx"
        )
    if name not in _ROTATING_NEIGHBOURS and _linear_factor(decoder) is None and _rope_factors(decoder) is not None:
        raise ValueError(f"wanted plain rotary embeddings beside those of {name}, got scaled ones; export to onnx")
    return name if alike else _HETEROGENEOUS


def _name(shape: ModelShape, alike: bool) -> str:
    if shape.layer_norm:
        return "gpt2" if shape.learned_positions else "gptneox"
    if shape.post_norms:
        return "gemma3" if shape.qk_norm else "gemma2"
    if shape.qk_norm:
        return "qwen3"
    return "qwen2" if shape.attention_bias and not shape.output_bias and alike else "llama"


def _sizes(decoder: Decoder, layer: Layer) -> tuple[int, int, int]:
    """Heads, KV heads and width."""
    head_dim = decoder.shape.head_dim
    return (
        layer.attention.q.shape[0] // head_dim if layer.attention else 0,
        layer.attention.k.shape[0] // head_dim if layer.attention else 0,
        layer.mlp.up.shape[0] if layer.mlp else 0,
    )


def _describe(writer: gguf.GGUFWriter, decoder: Decoder, layers: tuple[Layer, ...]) -> None:
    shape = decoder.shape
    heads, groups, widths = (list(sizes) for sizes in zip(*(_sizes(decoder, layer) for layer in layers), strict=True))
    if writer.arch == _HETEROGENEOUS:
        writer.add_head_count(heads)
        writer.add_head_count_kv(groups)
        writer.add_feed_forward_length(widths)
    else:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(groups[0])
        writer.add_feed_forward_length(widths[0])
    writer.add_block_count(len(layers))
    writer.add_context_length(decoder.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    if decoder.positions is None:
        writer.add_rope_dimension_count(2 * int(np.count_nonzero(decoder.inverse_frequencies)))
        writer.add_rope_freq_base(decoder.rope_theta)
    if (factor := _linear_factor(decoder)) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    if shape.layer_norm:
        writer.add_layer_norm_eps(decoder.norm_eps)
        writer.add_parallel_residual(shape.parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(decoder.norm_eps)
    if shape.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(shape.attn_logit_softcapping)
        writer.add_final_logit_softcapping(shape.final_logit_softcapping)
    if any(windows := [layer.attention.window if layer.attention else 0 for layer in layers]):
        writer.add_sliding_window(max(windows))
        writer.add_sliding_window_pattern(_period(windows, wanted=2 if writer.arch == "gemma2" else None))
        # of bare frequencies the base is what the second is a power of
        bases = decoder.local_inverse_frequencies[1:2] ** (-shape.head_dim / 2)
        writer.add_rope_freq_base_swa(float(bases[0]))
    writer.add_file_type(_FILE_TYPES[decoder.precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _period(windows: list[int], wanted: int | None) -> int:
    """The number of layers from one without a window to the next, 0 where there is none.

    ValueError where it varies, or is not the one that is `wanted`.
    """
    for period in range(len(windows) + 1) if wanted is None else [wanted]:
        if all((window == 0) == (period > 0 and i % period == period - 1) for i, window in enumerate(windows)):
            return period
    raise ValueError(
        f"wanted layers without a window at regular distances, as llama.cpp runs them, got {windows}; skip none, or "
        "export to openvino or onnx"
    )


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def _tensors(decoder: Decoder, layers: tuple[Layer, ...], architecture: str) -> Iterator[_Tensor]:
    yield _Tensor("token_embd.weight", decoder.embedding)
    if decoder.positions is not None:
        yield _Tensor("position_embd.weight", decoder.positions)
    yield from _norm("output_norm", decoder.norm)
    if decoder.head is not decoder.embedding or architecture == "gptneox":  # which has to have one
        yield _Tensor("output.weight", decoder.head)
    if _linear_factor(decoder) is None and (factors := _rope_factors(decoder)) is not None:
        yield _Tensor("rope_freqs.weight", factors)
    for index, layer in enumerate(layers):
        block, (heads, groups, _) = f"blk.{index}", _sizes(decoder, layer)
        if layer.attention is not None and decoder.shape.layer_norm:
            yield from _fused_attention(block, layer.attention, decoder)
        elif layer.attention is not None:
            rotated = architecture in _ROTATING_NEIGHBOURS
            yield from _attention(block, layer.attention, heads if rotated else 0, groups if rotated else 0)
        if layer.mlp is not None:
            yield from _mlp(block, layer.mlp)


def _attention(block: str, weights: AttentionWeights, heads: int, groups: int) -> Iterator[_Tensor]:
    yield from _norm(f"{block}.attn_norm", weights.norm)
    yield _Tensor(f"{block}.attn_q.weight", weights.q, heads)
    yield _Tensor(f"{block}.attn_k.weight", weights.k, groups)
    yield _Tensor(f"{block}.attn_v.weight", weights.v)
    yield _Tensor(f"{block}.attn_output.weight", weights.o)
    for name, bias, rotated in zip("qkv", weights.biases, (heads, groups, 0), strict=False):
        yield _Tensor(f"{block}.attn_{name}.bias", bias, rotated)
    if weights.output_bias is not None:
        yield _Tensor(f"{block}.attn_output.bias", weights.output_bias)
    for name, norm in zip("qk", weights.head_norms, strict=False):
        yield _Tensor(f"{block}.attn_{name}_norm.weight", norm)
    if weights.post_norm is not None:
        yield from _norm(f"{block}.post_attention_norm", weights.post_norm)


def _fused_attention(block: str, weights: AttentionWeights, decoder: Decoder) -> Iterator[_Tensor]:
    """Queries, keys and values in one matrix, the dimensions that rotate first in each head."""
    shape, order = decoder.shape, np.arange(decoder.shape.head_dim)
    if decoder.positions is None:
        rotary, half = int(np.count_nonzero(decoder.inverse_frequencies)), shape.head_dim // 2
        order = np.concatenate([order[:rotary], order[half:][:rotary], order[rotary:half], order[half + rotary :]])

    def ordered(rows: NDArray[Any]) -> NDArray[Any]:
        by_head = rows.reshape(-1, shape.head_dim, *rows.shape[1:])
        return np.ascontiguousarray(by_head[:, order]).reshape(rows.shape)

    rows = stacked(_by_rows(weights.q, ordered), _by_rows(weights.k, ordered), weights.v)
    none = np.zeros(shape.hidden_size, np.float32)  # which llama.cpp cannot do without
    q, k, v = weights.biases or (none, none, none)
    yield from _norm(f"{block}.attn_norm", weights.norm)
    yield _Tensor(f"{block}.attn_qkv.weight", rows)
    yield _Tensor(f"{block}.attn_qkv.bias", np.concatenate([ordered(q), ordered(k), v]))
    yield _Tensor(f"{block}.attn_output.weight", weights.o)
    yield _Tensor(f"{block}.attn_output.bias", none if weights.output_bias is None else weights.output_bias)


def _mlp(block: str, weights: MlpWeights) -> Iterator[_Tensor]:
    yield from _norm(f"{block}.ffn_norm", weights.norm)
    maps = {"gate": weights.gate, "up": weights.up, "down": weights.down}
    found = {name: matrix for name, matrix in maps.items() if matrix is not None}
    for name, matrix in found.items():
        yield _Tensor(f"{block}.ffn_{name}.weight", matrix)
    for name, bias in zip(found, weights.biases, strict=False):
        yield _Tensor(f"{block}.ffn_{name}.bias", bias)
    if weights.post_norm is not None:
        yield from _norm(f"{block}.post_ffw_norm", weights.post_norm)


def _norm(name: str, norm: Norm) -> Iterator[_Tensor]:
    yield _Tensor(f"{name}.weight", norm.weight)
    if norm.bias is not None:
        yield _Tensor(f"{name}.bias", norm.bias)


def _rope_factors(decoder: Decoder) -> Array | None:
    """What the frequencies of rope_theta are divided by; None where they are the model's own."""
    if decoder.shape.layer_norm:  # which are of some dimensions, and never scaled
        return None
    exponents = np.arange(0, decoder.shape.head_dim, 2) / decoder.shape.head_dim
    factors = decoder.rope_theta**-exponents / decoder.inverse_frequencies
    return None if np.allclose(factors, 1, rtol=1e-5) else factors.astype(np.float32)


def _linear_factor(decoder: Decoder) -> float | None:
    """The factor of all frequencies of a Gemma 3 (from 4B on), which llama.cpp leaves out where there is a window."""
    factors = _rope_factors(decoder)
    gemma3 = decoder.shape.post_norms and decoder.shape.qk_norm
    alike = factors is not None and gemma3 and np.allclose(factors, factors[0], rtol=1e-5)
    return float(factors[0]) if factors is not None and alike else None


def _reordered(tensor: _Tensor) -> Matrix:
    """Rows [heads x head_dim, ...] with the two halves of each head dealt out in turn."""
    if not tensor.heads:
        return tensor.values

    def reorder(rows: NDArray[Any]) -> NDArray[Any]:
        halves = rows.reshape(tensor.heads, 2, -1, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    return _by_rows(tensor.values, reorder)


def _by_rows(values: Matrix, reorder: Callable[[NDArray[Any]], NDArray[Any]]) -> Matrix:
    """What `reorder` makes of the rows, scales going with their integers."""
    if isinstance(values, PackedMatrix):
        return PackedMatrix(reorder(values.integers), reorder(values.scales), values.bits)
    return reorder(values)


def _type(values: Matrix) -> TensorType:
    if isinstance(values, PackedMatrix):
        return TensorType.Q4_0 if values.bits == 4 else TensorType.Q8_0
    return _TENSOR_TYPES[values.dtype.name]


def _stored_shape(values: Matrix) -> tuple[int, ...]:
    """Of the array that `_stored` makes: bytes but for fp32."""
    if isinstance(values, PackedMatrix):
        rows, columns = values.shape
        return rows, columns // QUANTIZATION_BLOCK_SIZE * (2 + QUANTIZATION_BLOCK_SIZE * values.bits // 8)
    return values.shape if values.dtype == np.float32 else (values.shape[0], 2 * values.shape[1])


def _stored(values: Matrix) -> NDArray[Any]:
    """As the file has it: a block of 32 weights is its fp16 scale, then the integers.

    Of four bits, byte i holds weight i below and weight i + 16 above, both with 8 added.
    """
    if not isinstance(values, PackedMatrix):
        return values if values.dtype == np.float32 else values.view(np.uint8)
    blocks = values.integers.reshape(-1, QUANTIZATION_BLOCK_SIZE)
    if values.bits == 4:
        codes, half = (blocks + 8).astype(np.uint8), QUANTIZATION_BLOCK_SIZE // 2
        integers = codes[:, :half] | codes[:, half:] << 4
    else:
        integers = blocks.view(np.uint8)
    scales = np.ascontiguousarray(values.scales).reshape(-1, 1).view(np.uint8)
    return np.concatenate([scales, integers], axis=1).reshape(_stored_shape(values))
