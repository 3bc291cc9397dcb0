"""Peak memory of decoders on one target, learned from a handful of processes that each ran one graph on one workload.

    peak bytes  =  x . b,  b >= 0

A process holds the runtime (the constant, with the embedding, which all graphs of a model share), the blocks' weights
as often as the runtime copies them while it packs them, the KV cache, and what one layer's activations and attention
take at once. The fit minimises relative errors; its interval comes from graphs held out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hw_profiles.memory import fed_at_once
from hw_profiles.shapes import HEAD_BITS, BlockShape, ModelShape, Precision, Workload, bits_per_weight
from predictors.intervals import log_interval
from predictors.linear import fit_relative
from predictors.metrics import FloatArray

COLUMNS = (
    "constant",
    "block_weight_bytes",
    "kv_cache_bytes",
    "activation_bytes",
    "attention_bytes",
    "logits_bytes",
)
#: The fewest for which a 90 % interval is finite.
MINIMUM_SAMPLES = 9

_BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class MemoryPrediction:
    """One entry a model: the expected peak of its process and the interval, in bytes."""

    value_bytes: FloatArray
    low_bytes: FloatArray
    high_bytes: FloatArray


@dataclass(frozen=True, eq=False)
class MemoryPredictor:
    """Made by `fit`; holds for models that differ only in their blocks."""

    precision: Precision
    #: Those measured.
    workloads: tuple[Workload, ...]
    #: In bytes per unit of each of COLUMNS.
    coefficients: FloatArray
    #: log actual - log predicted of each sample, by a fit that had not seen its graph.
    held_out_log_errors: FloatArray

    @classmethod
    def fit(
        cls,
        shapes: Sequence[ModelShape],
        peak_bytes: npt.ArrayLike,
        workloads: Sequence[Workload],
        precision: Precision,
    ) -> MemoryPredictor:
        """Fit on whole models, each measured on its own workload, prefill and decode together."""
        y = np.asarray(peak_bytes, dtype=np.float64)
        if y.shape != (len(shapes),) or len(workloads) != len(shapes):
            raise ValueError(
                f"wanted one peak and one workload a shape, got {len(shapes)} shapes, {y.shape} and {len(workloads)}"
            )
        if len(y) < MINIMUM_SAMPLES or len(set(shapes)) < 2:
            raise ValueError(
                f"memory needs at least {MINIMUM_SAMPLES} measurements of several models, got {len(y)} of "
                f"{len(set(shapes))}: measure more"
            )
        if not (np.isfinite(y).all() and (y > 0).all()):
            raise ValueError("peaks must be finite and above 0: leave failed measurements out")
        X = memory_features(shapes, workloads, precision)
        errors = np.empty(len(y))
        for left_out in set(shapes):
            held = np.array([shape == left_out for shape in shapes])
            errors[held] = np.log(y[held] / (X[held] @ _fit(X[~held], y[~held])))
        return cls(precision, tuple(sorted(set(workloads))), _fit(X, y), errors)

    def covers(self, workload: Workload) -> bool:
        """Whether as many tokens and sequences were measured: memory only shrinks with either."""
        return any(
            workload.phase == measured.phase
            and workload.tokens <= measured.tokens
            and workload.batch_size <= measured.batch_size
            for measured in self.workloads
        )

    def predict(
        self, shapes: Sequence[ModelShape], workloads: Sequence[Workload], coverage: float = 0.9
    ) -> MemoryPrediction:
        """Peaks [n], each on its own workload, with intervals that hold the truth with probability `coverage`.

        ValueError for a workload beyond those measured.
        """
        for workload in set(workloads):
            if not self.covers(workload):
                raise ValueError(
                    f"memory was not measured for {workload.phase} at {workload.tokens} tokens and batch "
                    f"{workload.batch_size}: profile that"
                )
        value_bytes = memory_features(shapes, workloads, self.precision) @ self.coefficients
        return MemoryPrediction(value_bytes, *log_interval(value_bytes, self.held_out_log_errors, coverage))


def memory_features(shapes: Sequence[ModelShape], workloads: Sequence[Workload], precision: Precision) -> FloatArray:
    """[n, columns] of COLUMNS. Buffers are used again from layer to layer, so the largest layer counts alone."""
    rows = []
    for shape, work in zip(shapes, workloads, strict=True):
        batch = work.batch_size
        fed = fed_at_once(work)
        cached = work.tokens if work.phase == "prefill" else work.tokens + 1
        # what all graphs of a model share; a narrow head is beside it
        shared_bytes = shape.embedding_parameters * bits_per_weight(HEAD_BITS[precision]) / 8
        widest = max(_values_per_token(shape, block) for block in shape.blocks)
        heads = max(block.num_attention_heads for block in shape.blocks)
        rows.append(
            [
                1.0,
                shape.weight_bytes(precision) - shared_bytes,
                shape.kv_cache_bytes(cached, batch, _BYTES_PER_VALUE),
                widest * fed * batch * _BYTES_PER_VALUE,
                heads * fed * cached * batch * _BYTES_PER_VALUE,
                shape.vocab_size * batch * _BYTES_PER_VALUE,
            ]
        )
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(COLUMNS))


def _values_per_token(shape: ModelShape, block: BlockShape) -> int:
    """The stream twice, beside it either queries, keys, values and their mix, or gate, up and their product."""
    attention = 2 * shape.head_dim * (block.num_attention_heads + block.num_key_value_heads)
    return 2 * shape.hidden_size + max(attention, 3 * block.intermediate_size)


def _fit(columns: FloatArray, peak_bytes: FloatArray) -> FloatArray:
    return fit_relative(columns, peak_bytes, np.ones(len(peak_bytes)))
