"""Shapes and workloads -> physics columns: what a step computes, what it reads, and how many parts it has.

Shape letters: n models, L layers (the most of any model; shorter ones are padded with skipped layers), f columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from hw_profiles.shapes import (
    BLOCK_BITS,
    HEAD_BITS,
    VALUE_BYTES,
    WIDE_BITS,
    BlockShape,
    ModelShape,
    Precision,
    Workload,
    bits_per_weight,
)
from predictors.metrics import FloatArray

#: Widths are padded to this many channels: four AVX-512 registers, a cache line of int8, a tile of most GEMM kernels.
VECTOR_WIDTH = 64

#: For one model family and workload every cost of a layer is linear in these.
STEP_COLUMNS = (
    "constant",
    "attention_layers",
    "kv_groups",
    "query_heads",
    "mlp_layers",
    "intermediate_size",
    "width_padding",
)
#: What costs other than the rest, and only int4 models may have: the share of the above that is at WIDE_BITS, and a
#: head of more than NARROW_HEAD_BITS, where others of the models have no more.
MIXED_COLUMNS = ("wide_kv_groups", "wide_intermediate_size", "wide_head")
#: What sequences cost, and the positions attended to: needed as soon as workloads differ.
SEQUENCE_COLUMNS = ("batch_size", "attention_flops", "kv_bytes")

# Nominal kernels of one step: norm, q, k, v, rotary, attention, output, residual; norm, gate, up, product, down,
# residual; embedding, last norm, head. Runtimes fuse some; a layer skipped saves its share all the same.
_ATTENTION_KERNELS, _MLP_KERNELS, _FIXED_KERNELS = 8, 6, 3


def block_array(shapes: Sequence[ModelShape]) -> npt.NDArray[np.int64]:
    """[n, L, 5]: query heads, KV groups, intermediate size, bits of attention and MLP where they have their own.

    Zeros where a model has fewer layers.
    """
    layers = max((len(shape.blocks) for shape in shapes), default=0)
    sizes = attrgetter(*(field.name for field in fields(BlockShape)))
    padding = (0,) * len(fields(BlockShape))
    rows = (chain(map(sizes, s.blocks), [padding] * (layers - len(s.blocks))) for s in shapes)
    flat = chain.from_iterable(chain.from_iterable(rows))
    size = (len(shapes), layers, len(padding))
    return np.fromiter(flat, dtype=np.int64, count=int(np.prod(size))).reshape(size)


def select_columns(names: Sequence[str], X: FloatArray, wanted: Sequence[str]) -> FloatArray:
    """Those columns of X [n, f], in the order wanted."""
    return X[:, [names.index(name) for name in wanted]]


def mixed_columns(names: Sequence[str], X: FloatArray) -> tuple[str, ...]:
    """Those of MIXED_COLUMNS in which models [n, f] differ, or may differ from others: wide parts, narrow heads."""
    groups, widths, head = select_columns(names, X, MIXED_COLUMNS).T
    called_for = (groups.any(), widths.any(), not head.all())
    return tuple(name for name, called in zip(MIXED_COLUMNS, called_for, strict=True) if called)


def latency_features(
    shapes: Sequence[ModelShape], workloads: Sequence[Workload], precision: Precision
) -> tuple[tuple[str, ...], FloatArray]:
    """(names, X [n, f]) of one step of each model on its workload; names are the same for all of them and precisions.

    Bytes and FLOPs agree with `ModelShape.read_weight_bytes`, `.kv_cache_bytes` and `.flops`.
    """
    heads, groups, width, attention_bits, mlp_bits = np.moveaxis(block_array(shapes), -1, 0)  # each [n, L]
    hidden = np.array([s.hidden_size for s in shapes], dtype=np.int64)
    head_dim = np.array([s.head_dim for s in shapes], dtype=np.int64)
    vocab = np.array([s.vocab_size for s in shapes], dtype=np.int64)
    head_bits = np.array([bits_per_weight(s.head_bits or HEAD_BITS[precision]) for s in shapes])

    batch = np.array([work.batch_size for work in workloads], dtype=np.int64)
    tokens = np.array([work.tokens for work in workloads], dtype=np.int64)
    prefill = np.array([work.phase == "prefill" for work in workloads], dtype=np.bool_)
    fed = np.where(prefill, tokens, 1)
    seen = np.where(prefill, fed * (fed + 1) // 2, tokens + 1)
    cached = tokens + ~prefill

    attention_layers, mlp_layers = (heads > 0).sum(axis=1), (width > 0).sum(axis=1)
    query_heads, kv_groups, widths = heads.sum(axis=1), groups.sum(axis=1), width.sum(axis=1)
    wide_heads, wide_groups = ((sizes * (attention_bits > 0)).sum(axis=1) for sizes in (heads, groups))
    wide_widths = (width * (mlp_bits > 0)).sum(axis=1)
    mlp_maps = np.array([s.mlp_maps for s in shapes])
    matrices = hidden * (2 * head_dim * (query_heads + kv_groups) + mlp_maps * widths)
    wide = hidden * (2 * head_dim * (wide_heads + wide_groups) + mlp_maps * wide_widths)
    norm_vectors = np.array([s.norm_vectors * (1 + s.post_norms) for s in shapes])
    block_norms = hidden * (attention_layers + mlp_layers) * norm_vectors
    output_bias, mlp_bias = np.array([(s.output_bias, s.mlp_bias) for s in shapes]).reshape(-1, 2).T
    behind = hidden * (output_bias * attention_layers + mlp_bias * mlp_layers) + mlp_bias * (mlp_maps - 1) * widths
    ends = np.array([s.end_vector_parameters for s in shapes])
    biases = np.array([s.attention_bias for s in shapes]) * (query_heads + 2 * kv_groups)
    head_norms = np.array([s.qk_norm for s in shapes]) * 2 * attention_layers
    vectors = block_norms + head_dim * (biases + head_norms) + behind
    read_weight_bytes = (
        (matrices - wide) * bits_per_weight(BLOCK_BITS[precision]) / 8
        + wide * bits_per_weight(WIDE_BITS) / 8
        + hidden * vocab * head_bits / 8
        + (vectors + ends) * 4
    )
    # what the matrices of a layer read and write: the stream four times, heads, groups and widths once each way
    values = 4 * hidden * (attention_layers + mlp_layers) + 2 * head_dim * (query_heads + kv_groups) + 4 * widths

    columns: dict[str, npt.NDArray[np.int64] | FloatArray] = {
        "constant": np.ones(len(shapes)),
        "attention_layers": attention_layers,
        "kv_groups": kv_groups - wide_groups,
        "query_heads": query_heads,
        "mlp_layers": mlp_layers,
        "intermediate_size": widths - wide_widths,
        "wide_kv_groups": wide_groups,
        "wide_intermediate_size": wide_widths,
        "wide_head": np.array([not s.head_bits for s in shapes]),
        "width_padding": (-width % VECTOR_WIDTH).sum(axis=1),
        "layers_off_16": (width % 16 > 0).sum(axis=1),
        "layers_off_32": (width % 32 > 0).sum(axis=1),
        "layers_off_64": (width % 64 > 0).sum(axis=1),
        "layers_off_128": (width % 128 > 0).sum(axis=1),
        "read_weight_bytes": read_weight_bytes,
        "kv_bytes": 2 * kv_groups * head_dim * cached * batch * VALUE_BYTES[precision],
        "projection_flops": batch * 2 * (fed * (matrices + vectors) + hidden * vocab),
        "attention_flops": batch * 4 * query_heads * head_dim * seen,
        "activation_bytes": values * fed * batch * VALUE_BYTES[precision],
        "tokens_fed": fed * batch,
        "batch_size": batch,
        "tokens": tokens,
        "kernels": _ATTENTION_KERNELS * attention_layers + _MLP_KERNELS * mlp_layers + _FIXED_KERNELS,
    }
    return tuple(columns), np.column_stack([np.asarray(column, dtype=np.float64) for column in columns.values()])
