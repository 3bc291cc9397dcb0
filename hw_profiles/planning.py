"""Choose which graphs to time on a target, so that a latency predictor can be fitted, judged, and its noise known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles.measurement import FINALIST_ROLES, Role
from hw_profiles.references import reference_shapes
from hw_profiles.shapes import NARROW_HEAD_BITS, PHASES, WIDE_BITS, BlockShape, ModelShape, Precision, Workload

#: Share of the largest block that a random shape keeps on average: the smallest and the largest drawn.
DENSITY_RANGE = (0.2, 0.95)
#: How far the density of the attention may lie from that of the MLPs, so that a fit can tell the two apart.
DENSITY_SKEW = 0.3
_DRAWS_PER_SHAPE = 50
#: Prompts of more tokens over all sequences, and caches of more positions, are left to the full model alone: what they
#: cost other graphs follows from shorter ones, and timing it would take most of a profile's time.
MOST_TOKENS_FED = 512
MOST_TOKENS_CACHED = 2**14
#: The workload nearest to this many tokens, batch 1, is one that every graph is timed on.
_COMMON_TOKENS = 128


@dataclass(frozen=True)
class PlannedGraph:
    shape: ModelShape
    role: Role


def plan(
    full: ModelShape,
    block_choices: Sequence[BlockShape],
    *,
    anchors: int = 12,
    heldout: int = 8,
    repeats: int = 2,
    mixed: int = 0,
    with_table: bool = True,
    seed: int = 0,
) -> list[PlannedGraph]:
    """The graphs to time, in their order: the references, all but the repeats in random order, the repeats.

    Machines change while a profile lasts, and ratios with them where the balance of memory and arithmetic shifts: in
    random order that is noise for fit and judgement alike, and no bias of one against the other.
    Table entries give all layers one choice of attention or MLP (no attention: every second layer), the rest of the
    full model being kept: blocks timed alone run from the cache and underestimate decode by half. Anchors and held-out
    shapes are random, their densities spread over DENSITY_RANGE.
    A profile without table entries is cheaper, and leans on that of a similar target.
    For int4 alone come `mixed` further anchors and as many held-out shapes, of whose parts some have 8 bits, every
    second with a narrow head, and table entries with 8 bits for all attention, or all MLPs, or with a narrow head.
    """
    if not block_choices:
        raise ValueError("block_choices must hold at least one block, got none")
    if not 0 <= repeats <= heldout:
        raise ValueError(f"repeats are held-out shapes timed again, so at most heldout, got {repeats=} {heldout=}")
    rng = np.random.default_rng(seed)
    table = _table_shapes(full, block_choices)
    # both ends among the anchors: of decoders much smaller than the table's the fit made a fifth too little
    references = reference_shapes(full)
    taken = {*references, *table}
    fitted = random_shapes(full, block_choices, np.linspace(*DENSITY_RANGE, anchors), taken, rng)
    held = random_shapes(full, block_choices, spread_densities(heldout, rng), taken | {*fitted}, rng)
    again = sorted(rng.permutation(heldout)[:repeats])
    once = [
        *(PlannedGraph(shape, "table") for shape in table),
        *(PlannedGraph(shape, "anchor") for shape in fitted),
        *(PlannedGraph(shape, "heldout") for shape in held),
    ]
    shuffled = [once[index] for index in rng.permutation(len(once))]
    own_bits = [PlannedGraph(shape, "table") for shape in _table_shapes_of_own_bits(full)] if mixed else []
    for role in ("anchor", "heldout"):
        drawn = random_shapes(full, block_choices, spread_densities(mixed, rng), {*references, *table}, rng)
        for index, shape in enumerate(drawn):
            head_bits = NARROW_HEAD_BITS if index % 2 else 0
            own_bits.append(PlannedGraph(replace(with_wide_parts(shape, rng), head_bits=head_bits), role))
    return [
        *(PlannedGraph(shape, "reference") for shape in references),
        *(graph for graph in shuffled if with_table or graph.role != "table"),
        *(PlannedGraph(held[index], "repeat") for index in again),
        *(own_bits[i] for i in rng.permutation(len(own_bits)) if with_table or own_bits[i].role != "table"),
    ]


def is_of_precision(shape: ModelShape, precision: Precision) -> bool:
    """Whether it is a model of this precision: what has bits of its own is an int4 model's alone."""
    return precision == "int4" or not shape.is_mixed


def with_wide_parts(shape: ModelShape, rng: np.random.Generator) -> ModelShape:
    """With WIDE_BITS in some parts, at least one and, of several, not in all."""
    parts = [
        (layer, name)
        for layer, block in enumerate(shape.blocks)
        for name, size in (("attention_bits", block.num_attention_heads), ("mlp_bits", block.intermediate_size))
        if size
    ]
    count = int(rng.integers(1, max(2, len(parts))))
    blocks = list(shape.blocks)
    for index in rng.permutation(len(parts))[:count]:
        layer, name = parts[index]
        blocks[layer] = replace(blocks[layer], **{name: WIDE_BITS})
    return replace(shape, blocks=tuple(blocks))


def workloads_of_graphs(planned: Sequence[PlannedGraph], workloads: Sequence[Workload]) -> list[tuple[Workload, ...]]:
    """What each planned graph is timed on: two workloads a phase, one that all share and one in turn.

    The full model is timed on all of them, and so are finalists; the other references on all that are affordable; a
    repeat is timed on what its first was.
    """
    all_of_them = tuple(sorted(set(workloads)))
    full = next((graph.shape for graph in planned if graph.role == "reference"), None)
    by_phase = [_shared_and_others([w for w in all_of_them if w.phase == phase]) for phase in PHASES]
    turns: dict[ModelShape, int] = {}
    seen: Counter[Role] = Counter()  # a turn among those of its role: of a few anchors each workload gets its share
    assigned = []
    for graph in planned:
        if graph.shape == full or graph.role in FINALIST_ROLES:
            assigned.append(all_of_them)
            continue
        if graph.role == "reference":
            assigned.append(tuple(filter(is_affordable, all_of_them)))
            continue
        if graph.shape not in turns:
            turns[graph.shape] = seen[graph.role]
            seen[graph.role] += 1
        turn = turns[graph.shape]
        assigned.append(
            tuple(
                sorted(
                    work
                    for shared, others in by_phase
                    for work in [*shared, *([others[turn % len(others)]] if others else [])]
                )
            )
        )
    return assigned


def _shared_and_others(of_phase: Sequence[Workload]) -> tuple[list[Workload], list[Workload]]:
    """The workload of one phase that all graphs share, in a list of at most one, and those that take turns."""
    affordable = list(filter(is_affordable, of_phase)) or list(of_phase[:1])
    shared = sorted(affordable, key=lambda work: doublings_apart(work, Workload(work.phase, _COMMON_TOKENS)))[:1]
    return shared, [work for work in affordable if work not in shared]


def is_affordable(work: Workload) -> bool:
    """Whether graphs other than the full model are timed on it."""
    return work.tokens * work.batch_size <= (MOST_TOKENS_FED if work.phase == "prefill" else MOST_TOKENS_CACHED)


def doublings_apart(one: Workload, other: Workload) -> float:
    """How far two workloads lie apart, in doublings of tokens and of batch; those of two phases infinitely."""
    if one.phase != other.phase:
        return math.inf
    return abs(math.log2((one.tokens + 1) / (other.tokens + 1))) + abs(math.log2(one.batch_size / other.batch_size))


def _table_shapes(full: ModelShape, block_choices: Sequence[BlockShape]) -> list[ModelShape]:
    """The full model with all layers given one attention (its MLP kept) or one MLP (its attention kept).

    Every layer tells a cost twice as well as every second, which is left for no attention: runtimes expect a KV cache.
    """
    heads = {(choice.num_attention_heads, choice.num_key_value_heads) for choice in block_choices}
    changes = [
        *({"num_attention_heads": query, "num_key_value_heads": groups} for query, groups in sorted(heads)),
        *({"intermediate_size": width} for width in sorted({choice.intermediate_size for choice in block_choices})),
    ]
    shapes = [
        replace(
            full,
            blocks=tuple(
                replace(block, **change) if i % 2 or change.get("num_attention_heads") != 0 else block
                for i, block in enumerate(full.blocks)
            ),
        )
        for change in changes
    ]
    return [shape for shape in shapes if shape != full]


def _table_shapes_of_own_bits(full: ModelShape) -> list[ModelShape]:
    """The full model with WIDE_BITS in all attention, and in all MLPs, and with a narrow head."""
    changes = ({"attention_bits": WIDE_BITS}, {"mlp_bits": WIDE_BITS})
    wide = [replace(full, blocks=tuple(replace(block, **change) for block in full.blocks)) for change in changes]
    return [*wide, replace(full, head_bits=NARROW_HEAD_BITS)]


def spread_densities(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Densities [count] that cover DENSITY_RANGE evenly, one at random in each equal share of it."""
    low, high = DENSITY_RANGE
    return low + (high - low) * (np.arange(count) + rng.random(count)) / max(count, 1)


def random_shapes(
    full: ModelShape,
    block_choices: Sequence[BlockShape],
    densities: NDArray[np.float64],
    taken: set[ModelShape],
    rng: np.random.Generator,
) -> list[ModelShape]:
    """Distinct shapes, none of them `taken`, one of about each density, in random order."""
    shapes: list[ModelShape] = []
    for density in rng.permutation(densities):
        for _ in range(_DRAWS_PER_SHAPE):
            shape = replace(full, blocks=_random_blocks(len(full.blocks), block_choices, density, rng))
            if shape.attention_blocks and shape not in taken:  # runtimes expect a KV cache
                break
        else:
            raise ValueError(
                f"wanted {len(densities)} more random shapes, found {len(shapes)} among {len(set(block_choices))} "
                f"block choices in {len(full.blocks)} layers; plan fewer or offer more choices"
            )
        taken = taken | {shape}
        shapes.append(shape)
    return shapes


def _random_blocks(
    layers: int, block_choices: Sequence[BlockShape], density: float, rng: np.random.Generator
) -> tuple[BlockShape, ...]:
    """Layers whose mean MLP width is near `density` of the widest, and whose mean attention is within DENSITY_SKEW."""
    attentions = sorted({(choice.num_attention_heads, choice.num_key_value_heads) for choice in block_choices})
    widths = sorted({choice.intermediate_size for choice in block_choices})
    allowed = set(block_choices)
    attention_density = float(np.clip(density + rng.uniform(-DENSITY_SKEW, DENSITY_SKEW), *DENSITY_RANGE))
    attention_odds = _tilted_odds([query + groups for query, groups in attentions], attention_density, rng)
    width_odds = _tilted_odds(widths, density, rng)
    blocks = []
    for index in rng.choice(len(attentions), size=layers, p=attention_odds):
        query, groups = attentions[index]
        offered = np.array([BlockShape(query, groups, width) in allowed for width in widths])
        odds = np.where(offered, width_odds, 0)
        blocks.append(BlockShape(query, groups, widths[rng.choice(len(widths), p=odds / odds.sum())]))
    return tuple(blocks)


def _tilted_odds(sizes: Sequence[int], density: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Probabilities favour_i * exp(tilt * size_i) with random favours and the tilt that makes the mean size `density`.

    Sizes count as shares of the largest. A density that the sizes cannot reach gives the nearest that they can.
    """
    shares = np.array(sizes) / max(max(sizes), 1)
    favours = 0.1 + rng.exponential(size=len(sizes))
    low, high = -50.0, 50.0
    odds: NDArray[np.float64] = favours
    for _ in range(50):
        tilt = (low + high) / 2
        odds = favours * np.exp(tilt * (shares - shares.max()))
        odds = odds / odds.sum()
        low, high = (tilt, high) if odds @ shares < density else (low, tilt)
    return odds
