"""The baseline of latency prediction: a cost for each choice of a block's parts, added up.

A block timed alone runs hot in the cache, so costs come from whole graphs: one equal to the full model but for m layers
that carry another choice of attention (or of the MLP) gives that choice's cost relative to the full part,

    cost  =  (T(graph) - T(full)) / m,          T(model)  =  T(full) + sum of its parts' costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hw_profiles.shapes import NARROW_HEAD_BITS, WIDE_BITS, BlockShape, ModelShape
from predictors.metrics import FloatArray

Heads = tuple[int, int]
#: Of one part of a layer, and what it is: ("attention", heads), ("mlp", width), or its kind at WIDE_BITS; or of the
#: head, at NARROW_HEAD_BITS.
_Choice = tuple[str, Heads | int]


@dataclass(frozen=True)
class AdditiveTable:
    """Costs in ms relative to the full model's part, which itself costs 0; made by `fit`."""

    full: ModelShape
    full_latency_ms: float
    #: (num_attention_heads, num_key_value_heads) -> ms.
    attention_ms: dict[Heads, float]
    #: intermediate_size -> ms.
    mlp_ms: dict[int, float]
    #: What attention and MLP of an int4 model take more, or less, at WIDE_BITS, a smaller one its share of it, and what
    #: the head does at NARROW_HEAD_BITS.
    own_bits_ms: dict[str, float]

    @classmethod
    def fit(
        cls, full: ModelShape, full_latency_ms: float, graphs: Sequence[ModelShape], latency_ms: npt.ArrayLike
    ) -> AdditiveTable:
        """Every layer of `full` must be alike; several graphs of a choice combine by least squares over m."""
        if len(set(full.blocks)) != 1:
            raise ValueError(f"the full model's layers must be alike, got {len(set(full.blocks))} kinds")
        times = np.asarray(latency_ms, dtype=np.float64)
        if times.shape != (len(graphs),) or not np.isfinite(times).all() or not np.isfinite(full_latency_ms):
            raise ValueError(f"wanted one finite latency a graph, got {len(graphs)} graphs and shape {times.shape}")
        reference = full.blocks[0]
        seen: dict[_Choice, list[tuple[int, float]]] = defaultdict(list)
        for graph, time_ms in zip(graphs, times.tolist(), strict=True):
            choice, changed_layers = _changed_part(full, graph)
            seen[choice].append((changed_layers, time_ms - full_latency_ms))
        costs = {choice: sum(m * d for m, d in pairs) / sum(m * m for m, _ in pairs) for choice, pairs in seen.items()}
        attention = {key: cost for (_, key), cost in costs.items() if isinstance(key, tuple)}
        mlp = {key: cost for (part, key), cost in costs.items() if part == "mlp" and isinstance(key, int)}
        return cls(
            full,
            full_latency_ms,
            {**attention, _heads(reference): 0.0},
            dict(sorted({**mlp, reference.intermediate_size: 0.0}.items())),
            {part: cost for (part, _), cost in costs.items() if part.endswith("_bits")},
        )

    def predict(self, shapes: Sequence[ModelShape]) -> FloatArray:
        """Latencies in ms, [n]; widths between two tabulated ones are interpolated, but never towards a skipped MLP."""
        cost = {block: self._block_ms(block) for block in {block for shape in shapes for block in shape.blocks}}
        for shape in shapes:
            if len(shape.blocks) != len(self.full.blocks):
                raise ValueError(f"the table is of {len(self.full.blocks)} layers, got {len(shape.blocks)}")
        if "head_bits" not in self.own_bits_ms and any(shape.head_bits for shape in shapes):
            raise ValueError(f"no cost for a head of {NARROW_HEAD_BITS} bits: measure a graph with it")
        of_heads = [self.own_bits_ms["head_bits"] if shape.head_bits else 0.0 for shape in shapes]
        of_blocks = [sum(cost[block] for block in shape.blocks) for shape in shapes]
        return np.array(of_heads) + of_blocks + self.full_latency_ms

    def _block_ms(self, block: BlockShape) -> float:
        if _heads(block) not in self.attention_ms:
            raise ValueError(
                f"no cost for attention of {_heads(block)} heads and groups: measure a graph with it, "
                f"tabulated are {sorted(self.attention_ms)}"
            )
        width = block.intermediate_size
        at_same_bits_ms = self.attention_ms[_heads(block)] + self._wider_ms(block)
        if width in self.mlp_ms:
            return at_same_bits_ms + self.mlp_ms[width]
        kept = [tabulated for tabulated in self.mlp_ms if tabulated]
        if not kept or not kept[0] < width < kept[-1]:
            raise ValueError(
                f"no cost for an intermediate_size of {width}: measure a graph with it, tabulated are {kept}"
            )
        mlp_ms = float(np.interp(width, kept, [self.mlp_ms[tabulated] for tabulated in kept]))
        return at_same_bits_ms + mlp_ms

    def _wider_ms(self, block: BlockShape) -> float:
        full = self.full.blocks[0]
        shares = {
            "attention_bits": block.num_attention_heads / full.num_attention_heads if block.attention_bits else 0.0,
            "mlp_bits": block.intermediate_size / full.intermediate_size if block.mlp_bits else 0.0,
        }
        if missing := [part for part, share in shares.items() if share and part not in self.own_bits_ms]:
            raise ValueError(f"no cost for {missing[0]} of {WIDE_BITS}: measure a graph with it in all layers")
        return sum(share * self.own_bits_ms[part] for part, share in shares.items() if share)


def _heads(block: BlockShape) -> Heads:
    return block.num_attention_heads, block.num_key_value_heads


def _changed_part(full: ModelShape, graph: ModelShape) -> tuple[_Choice, int]:
    """The one choice that sets `graph` apart, and in how many layers."""
    reference = full.blocks[0]
    attention = [_heads(block) for block in graph.blocks if _heads(block) != _heads(reference)]
    widths = [b.intermediate_size for b in graph.blocks if b.intermediate_size != reference.intermediate_size]
    choices: list[_Choice] = [("attention", key) for key in attention]
    choices += [("mlp", width) for width in widths]
    choices += [("attention_bits", block.attention_bits) for block in graph.blocks if block.attention_bits]
    choices += [("mlp_bits", block.mlp_bits) for block in graph.blocks if block.mlp_bits]
    choices += [("head_bits", graph.head_bits)] if graph.head_bits else []
    if len(set(choices)) != 1 or len(graph.blocks) != len(full.blocks):
        raise ValueError(
            f"a table graph must be the full model with one other choice of one part in some layers, "
            f"got {len(graph.blocks)} layers and {len(set(choices))} other choices"
        )
    return choices[0], len(choices)
