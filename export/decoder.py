"""A heterogeneous decoder as plain arrays: what the writers of ONNX, OpenVINO and GGUF files all read.

The writers see numpy only, so a decoder with random weights, made from a bare `ModelShape`, goes through the same code
as a trained one: what is profiled is what is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.quantize import QuantizedWeight, as_half, quantize
from hw_profiles.shapes import (
    BLOCK_BITS,
    HEAD_BITS,
    HIDDEN_ACTS,
    QUANTIZATION_BLOCK_SIZE,
    BlockShape,
    ModelShape,
    Precision,
)

if TYPE_CHECKING:  # a profile needs none of it, and it takes seconds to import
    from transformers import PreTrainedModel

Array = NDArray[np.float32]
#: fp16 [out, in], or bf16, which numpy does not know: the upper half of each fp32.
HalfMatrix = NDArray[np.float16] | NDArray[np.uint16]

#: Beyond those that a shape has learned: timing goes on for some steps behind the longest context.
_FURTHER_POSITIONS = 128
#: Those that a rotary model for timing can be fed: tables in ONNX files are so long.
TIMED_POSITIONS = 2**15
#: Rotary embeddings whose frequencies are fixed beforehand, whatever the length of the text.
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised matrix [out, in]: int8 `integers` [out, in], fp16 `scales` [out, in / 32], see `export.quantize`."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float16]
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.integers.shape
        return rows, columns


#: fp32 [out, in], or its rounded forms.
Matrix = Array | HalfMatrix | PackedMatrix


def stacked(*matrices: Matrix) -> Matrix:
    """Matrices on the same input as one, rows below rows."""
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
    if len(packed) == len(matrices):
        integers = np.concatenate([matrix.integers for matrix in packed])
        return PackedMatrix(integers, np.concatenate([matrix.scales for matrix in packed]), packed[0].bits)
    return np.concatenate([matrix for matrix in matrices if not isinstance(matrix, PackedMatrix)])


@dataclass(frozen=True)
class Norm:
    """`weight` and `bias` [hidden]; an RMS norm has no bias, and does not take off the mean."""

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """`q` [heads x head_dim, hidden]; `k`, `v` [KV heads x head_dim, hidden]; `o` is as `q`.T.

    Where the shape says so, `biases` are those of q, k and v, `output_bias` [hidden] that of o, `head_norms` the
    weights [head_dim] of the norms of q and k, and `post_norm` is that of what o gives; otherwise they are empty and
    None. `window` is how many positions a token attends to, its own included, 0 for all.
    """

    norm: Norm
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    biases: tuple[Array, ...] = ()
    output_bias: Array | None = None
    head_norms: tuple[Array, ...] = ()
    post_norm: Norm | None = None
    window: int = 0


@dataclass(frozen=True)
class MlpWeights:
    """`gate`, `up` [width, hidden]; `down` [hidden, width]; `post_norm` of what it gives.

    Without a gate it is None; `biases` are those of the maps that are there, in this order, or none.
    """

    norm: Norm
    gate: Matrix | None
    up: Matrix
    down: Matrix
    biases: tuple[Array, ...] = ()
    post_norm: Norm | None = None


@dataclass(frozen=True)
class Layer:
    """A skipped part is None."""

    attention: AttentionWeights | None
    mlp: MlpWeights | None


@dataclass(frozen=True)
class Decoder:
    """Weights and constants of one decoder; `head` is the same object as `embedding` where the two are tied.

    `inverse_frequencies` [head_dim / 2] are those of the rotary embedding, in fp32 as transformers computes them: the
    powers of `rope_theta`, or scaled ones; `local_inverse_frequencies` those of layers with a window. Scores are
    multiplied by `attention_scale`, embeddings, where that is not None, by `embedding_scale`. Where `positions`
    [max_position_embeddings, hidden] is not None it is added to embeddings, and nothing rotates.
    """

    shape: ModelShape
    precision: Precision
    rope_theta: float
    inverse_frequencies: Array
    local_inverse_frequencies: Array
    attention_scale: float
    norm_eps: float
    max_position_embeddings: int
    embedding: Matrix
    positions: Array | None
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix

    @property
    def embedding_scale(self) -> float | None:
        return self.shape.hidden_size**0.5 if self.shape.scaled_embedding else None


def decoder_shape(model: PreTrainedModel) -> ModelShape:
    """Read the shape of each layer off the weights of a Llama-style model, plain or heterogeneous."""
    weights = dict(model.named_parameters())
    empty = ModelShape.from_config(model.config, ())

    def rows(name: str) -> int:
        return weights[name].shape[0] if name in weights else 0

    blocks = tuple(
        BlockShape(
            num_attention_heads=rows(f"model.layers.{i}.self_attn.q_proj.weight") // empty.head_dim,
            num_key_value_heads=rows(f"model.layers.{i}.self_attn.k_proj.weight") // empty.head_dim,
            intermediate_size=rows(f"model.layers.{i}.mlp.up_proj.weight"),
        )
        for i in range(len(model.model.layers))
    )
    return replace(empty, blocks=blocks)


def decoder_from_model(
    model: PreTrainedModel, precision: Precision, quantized: Mapping[str, QuantizedWeight] | None = None
) -> Decoder:
    """Take the fp32 weights of a Llama-style model, quantised to `precision`.

    `quantized` holds matrices that were rounded before, by name in the state dict; others are rounded to the nearest.

    Raises ValueError for what the writers do not compute: other activations, rotary scaling that moves.
    """
    config = model.config
    shape = decoder_shape(model)
    # a subnet's own: transformers has no frequencies for a kind of layer all of which are skipped
    windows = [shape.window(i) for i, block in enumerate(shape.blocks) if block.num_attention_heads]
    only_local = bool(windows) and all(windows)
    rope_theta, frequencies = _rotary(model, "sliding_attention" if only_local else "full_attention")
    _, local_frequencies = _rotary(model, "sliding_attention") if any(windows) else (0.0, frequencies)
    if shape.hidden_act not in HIDDEN_ACTS:
        wanted = ", ".join(HIDDEN_ACTS)
        raise ValueError(f"wanted {wanted} in the MLPs, got {shape.hidden_act!r}; export to huggingface")
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}

    def matrix(name: str, bits: int) -> Matrix:
        packed = (quantized or {}).get(name)
        if packed is None and bits < 16:
            packed = quantize(weights[name], bits)
        if packed is not None:
            return PackedMatrix(packed.integers.numpy(), packed.scales.numpy(), packed.bits)
        if bits == 32:
            plain: Array = weights[name].contiguous().numpy()
            return plain
        half = as_half(weights[name], precision).contiguous()
        rounded: HalfMatrix = (half if precision == "fp16" else half.view(torch.uint16)).numpy()
        return rounded

    def vector(name: str) -> Array:
        # Gemma's norms hold what is added to 1
        stored: Array = (weights[name] + (shape.post_norms and "norm" in name)).contiguous().numpy()
        return stored

    embedding = matrix("model.embed_tokens.weight", HEAD_BITS[precision])
    return _assemble(
        shape,
        precision,
        vector=lambda name, size: vector(name),
        matrix=lambda name, rows, columns, bits: matrix(name, bits),
        embedding=embedding,
        positions=vector("model.embed_positions.weight") if shape.learned_positions else None,
        head=embedding if config.tie_word_embeddings else matrix("lm_head.weight", HEAD_BITS[precision]),
        rope_theta=rope_theta,
        inverse_frequencies=frequencies,
        local_inverse_frequencies=local_frequencies,
        attention_scale=(getattr(config, "query_pre_attn_scalar", None) or shape.head_dim) ** -0.5,
        norm_eps=float(config.layer_norm_eps if shape.layer_norm else config.rms_norm_eps),
        max_position_embeddings=int(config.max_position_embeddings),
    )


def _rotary(model: PreTrainedModel, kind: str) -> tuple[float, Array]:
    """Base and inverse frequencies of layers of this kind, where they are not the same for all, as in Gemma 3."""
    parameters = model.config.rope_parameters
    by_kind = kind in parameters
    if by_kind:
        parameters = parameters[kind]
    if parameters["rope_type"] not in _ROPE_TYPES:
        wanted = ", ".join(_ROPE_TYPES)
        raise ValueError(f"wanted a rope_type among {wanted}, got {parameters['rope_type']!r}; export to huggingface")
    # computed anew: a model cast to half precision has rounded its own
    module = type(model.model.rotary_emb)(config=model.config)
    frequencies: Array = getattr(module, f"{kind}_inv_freq" if by_kind else "inv_freq").numpy()
    return float(parameters["rope_theta"]), frequencies


def random_decoder(shape: ModelShape, precision: Precision, seed: int = 0) -> Decoder:
    """A decoder of this shape with random weights, for timing: latency does not depend on the numbers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(2**22, dtype=np.float32) * np.float32(0.02)
    halves = values.astype(np.float16) if precision == "fp16" else (values.view(np.uint32) >> 16).astype(np.uint16)
    factors = rng.uniform(0.01, 0.03, 2**18)
    scales = {bits: (factors / 2 ** (bits - 1)).astype(np.float16) for bits in (4, 8)}
    integers = {bits: rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 2**22, dtype=np.int8) for bits in (4, 8)}
    starts = count()
    frequencies = (10_000.0 ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)).astype(np.float32)

    def fill(source: NDArray[Any], start: int, rows: int, columns: int) -> NDArray[Any]:
        # no more of the source than is needed: np.resize copies all that it is given and keeps it
        return np.resize(source[start : start + rows * columns], (rows, columns))

    def matrix(rows: int, columns: int, bits: int) -> Matrix:
        # every matrix owns its memory and differs from all others, of which OpenVINO would store but one: weights
        # that shared pages would stay in the cache and flatter the timing
        start = next(starts)
        if bits >= 16:
            return fill(values if bits == 32 else halves, start, rows, columns)
        blocks = columns // QUANTIZATION_BLOCK_SIZE
        return PackedMatrix(fill(integers[bits], start, rows, columns), fill(scales[bits], start, rows, blocks), bits)

    embedding = matrix(shape.vocab_size, shape.hidden_size, HEAD_BITS[precision])
    positions = shape.learned_positions
    return _assemble(
        shape,
        precision,
        vector=lambda name, size: np.ones(size, np.float32),
        matrix=lambda name, rows, columns, bits: matrix(rows, columns, bits),
        embedding=embedding,
        positions=fill(values, next(starts), positions + _FURTHER_POSITIONS, shape.hidden_size) if positions else None,
        head=matrix(shape.vocab_size, shape.hidden_size, shape.head_bits or HEAD_BITS[precision])
        if shape.has_own_head
        else embedding,
        rope_theta=10_000.0,
        inverse_frequencies=frequencies,
        local_inverse_frequencies=frequencies,
        attention_scale=shape.head_dim**-0.5,
        norm_eps=1e-5,
        max_position_embeddings=positions + _FURTHER_POSITIONS if positions else TIMED_POSITIONS + _FURTHER_POSITIONS,
    )


def _assemble(
    shape: ModelShape,
    precision: Precision,
    *,
    vector: Callable[[str, int], Array],
    matrix: Callable[[str, int, int, int], Matrix],
    embedding: Matrix,
    positions: Array | None,
    head: Matrix,
    rope_theta: float,
    inverse_frequencies: Array,
    local_inverse_frequencies: Array,
    attention_scale: float,
    norm_eps: float,
    max_position_embeddings: int,
) -> Decoder:
    layers = []
    # of two norms a part, Llama's second name is that of the one behind the attention
    mlp_norm = "pre_feedforward_layernorm" if shape.post_norms else "post_attention_layernorm"

    def norm(name: str) -> Norm:
        bias = vector(f"{name}.bias", shape.hidden_size) if shape.layer_norm else None
        return Norm(vector(f"{name}.weight", shape.hidden_size), bias)

    def post_norm(name: str) -> Norm | None:
        return norm(name) if shape.post_norms else None

    for i, block in enumerate(shape.blocks):
        path, hidden = f"model.layers.{i}", shape.hidden_size
        queries, keys = block.num_attention_heads * shape.head_dim, block.num_key_value_heads * shape.head_dim
        width, attends = block.intermediate_size, f"{path}.self_attn"
        attention_bits, mlp_bits = (own or BLOCK_BITS[precision] for own in (block.attention_bits, block.mlp_bits))
        biased = {"q": queries, "k": keys, "v": keys} if shape.attention_bias else {}
        of_mlp = {"gate": width, "up": width, "down": hidden} if shape.mlp_bias else {}
        attention = (
            AttentionWeights(
                norm(f"{path}.input_layernorm"),
                matrix(f"{attends}.q_proj.weight", queries, hidden, attention_bits),
                matrix(f"{attends}.k_proj.weight", keys, hidden, attention_bits),
                matrix(f"{attends}.v_proj.weight", keys, hidden, attention_bits),
                matrix(f"{attends}.o_proj.weight", hidden, queries, attention_bits),
                tuple(vector(f"{attends}.{name}_proj.bias", size) for name, size in biased.items()),
                vector(f"{attends}.o_proj.bias", hidden) if shape.output_bias else None,
                tuple(vector(f"{attends}.{name}_norm.weight", shape.head_dim) for name in "qk" if shape.qk_norm),
                post_norm(f"{path}.post_attention_layernorm"),
                shape.window(i),
            )
            if queries
            else None
        )
        mlp = (
            MlpWeights(
                norm(f"{path}.{mlp_norm}"),
                matrix(f"{path}.mlp.gate_proj.weight", width, hidden, mlp_bits) if shape.gated_mlp else None,
                matrix(f"{path}.mlp.up_proj.weight", width, hidden, mlp_bits),
                matrix(f"{path}.mlp.down_proj.weight", hidden, width, mlp_bits),
                tuple(
                    vector(f"{path}.mlp.{name}_proj.bias", size)
                    for name, size in of_mlp.items()
                    if shape.gated_mlp or name != "gate"
                ),
                post_norm(f"{path}.post_feedforward_layernorm"),
            )
            if width
            else None
        )
        layers.append(Layer(attention, mlp))
    return Decoder(
        shape,
        precision,
        rope_theta,
        inverse_frequencies,
        local_inverse_frequencies,
        attention_scale,
        norm_eps,
        max_position_embeddings,
        embedding,
        positions,
        tuple(layers),
        norm("model.norm"),
        head,
    )
