"""Keep-orders and least-squares weights of every part at every size, made once and kept on disk layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hw_profiles.profile import Progress
from nas.calibration import LayerStatistics, Statistics, find_layer, load_layer, save_layer
from nas.importance import DAMPING, keep_order
from nas.reformation import Reformed, reform
from nas.subnet import PARTS, FewerHeads, Part, Size

#: Channels dropped at a step of the elimination: at least so many, and of wide MLPs a forty-eighth, for a step passes
#: over two matrices that no cache holds.
_FEWEST_AT_ONCE = 32
_STEPS = 48


@dataclass(frozen=True)
class PartPlan:
    """Keep-order of one part's KV groups or channels, and per size short of full the reformed output weights.

    `order` is int64 [units, each]: a row for each group or channel, most important first, and where query heads are a
    choice, too, in each row those of its group in their own order, counted through all groups.
    `outputs[k]` is fp32 [hidden, inputs of k]: o_proj or down_proj over what k keeps of `order`; `errors[k]` the share
    of the output's energy that it loses on the calibration text.
    """

    order: torch.Tensor
    outputs: dict[Size, torch.Tensor]
    errors: dict[Size, float]


def load_plans(
    statistics: Statistics,
    cache_dir: Path,
    depth: int,
    sizes: Mapping[Part, Sequence[Size]],
    order_shapes: Mapping[Part, tuple[int, int]],
    output_weight: Callable[[int, Part], torch.Tensor],
    progress: Progress = lambda done, total, what: None,
) -> list[dict[Part, PartPlan]]:
    """What `cache_dir` has, or after making what it lacks; `sizes` are those to make, short of full.

    `order_shapes` are [units, each] of a PartPlan's orders.
    `output_weight` gives the output map [hidden, inputs] of a whole part of a layer. Orders and weights are kept apart:
    other sizes need other weights, and orders take longer. Tensors are mapped from files, not read into memory.
    """
    short = {part: tuple(sizes[part]) for part in PARTS}
    of_orders = f"{statistics.key} {DAMPING} {_at_once(order_shapes['mlp'][0])}"
    if (heads := order_shapes["attention"][1]) > 1:
        of_orders += f" {heads} heads"
    orders = cache_folder(cache_dir, "orders", of_orders)
    weights = cache_folder(cache_dir, "supernet", f"{of_orders} {short}")
    names = {f"{p}.errors" for p in PARTS} | {f"{p}.{k}" for p in PARTS for k in short[p]}
    plans: list[dict[Part, PartPlan]] = []
    for layer in range(depth):
        order, tensors = find_layer(orders, layer, set(PARTS)), find_layer(weights, layer, names)
        if order is None or tensors is None:
            progress(layer, depth, f"reforming layer {layer}")
            moments = statistics.layer(layer)
            maps = {p: output_weight(layer, p) for p in PARTS}
            read = {p: read_by_output(moments, p) for p in PARTS}
            if order is None:
                save_layer(orders, layer, {p: part_order(p, maps[p], read[p], order_shapes[p]) for p in PARTS})
                order = load_layer(orders, layer, set(PARTS))
            made: dict[str, torch.Tensor] = {}
            for p in PARTS:
                reformed = part_outputs(maps[p], read[p], order[p].view(order_shapes[p]), short[p])
                made |= {f"{p}.{k}": found.weight for k, found in reformed.items()}
                made[f"{p}.errors"] = torch.tensor([reformed[k].error for k in short[p]], dtype=torch.float64)
            save_layer(weights, layer, made)
            tensors = load_layer(weights, layer, names)
        plans.append({})
        for p in PARTS:
            errors = dict(zip(short[p], tensors[f"{p}.errors"].tolist(), strict=True))
            outputs = {k: tensors[f"{p}.{k}"] for k in short[p]}
            plans[layer][p] = PartPlan(order[p].view(order_shapes[p]), outputs, errors)
    return plans


def part_order(part: Part, weight: torch.Tensor, H: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """As in a PartPlan, int64 of that shape [units, each]; the output map `weight` reads inputs of moments H.

    Channels are dropped some at a step, groups one by one. A group's heads stand in the order of dropping heads of all
    groups one by one.
    """
    units, each = shape
    order = keep_order(
        weight, H, group=weight.shape[1] // units, chunk=1 if part == "attention" else _at_once(units)
    ).unsqueeze(1)
    if each == 1:
        return order
    place = keep_order(weight, H, group=weight.shape[1] // (units * each)).argsort()
    within = place.view(shape).argsort(dim=1)
    return order * each + within[order.flatten()]


def _at_once(channels: int) -> int:
    return max(_FEWEST_AT_ONCE, channels // _STEPS)


def part_outputs(
    weight: torch.Tensor, H: torch.Tensor, order: torch.Tensor, sizes: Sequence[Size]
) -> dict[Size, Reformed]:
    """The output map refitted to what each of `sizes`, short of full, keeps of `order`.

    As many heads of every group are a prefix of one order, the others behind them, so one factorisation serves them.
    """
    group = weight.shape[1] // order.numel()
    widths = {size: kept_of(order, size).numel() * group for size in sizes}
    outputs: dict[Size, Reformed] = {}
    for each in sorted({kept_of(order, size).shape[1] for size in sizes}):
        those = [size for size in sizes if kept_of(order, size).shape[1] == each]
        columns = torch.cat([order[:, :each].flatten(), order[:, each:].flatten()])
        reformed = reform(weight, H, grouped_rows(columns, group), [widths[size] for size in those])
        outputs |= {size: reformed[widths[size]] for size in those}
    return outputs


def kept_of(order: torch.Tensor, size: Size) -> torch.Tensor:
    """What `size` keeps of an order [units, each], [units kept, each kept]."""
    units, each = size if isinstance(size, FewerHeads) else (size, order.shape[1])
    return order[:units, :each]


def kept_rows(order: torch.Tensor, size: Size, dimension: int, *, by_group: bool) -> torch.Tensor:
    """Indices of what `size` keeps of a part's dimension, which runs over its groups or over their query heads."""
    kept = kept_of(order, size)
    if by_group:
        return grouped_rows(kept[:, 0] // order.shape[1], dimension // len(order))
    return grouped_rows(kept.flatten(), dimension // order.numel())


def grouped_rows(order: torch.Tensor, group: int) -> torch.Tensor:
    """Indices of the rows (or columns) of groups of `group` consecutive ones."""
    return (order.unsqueeze(1) * group + torch.arange(group)).flatten()


def read_by_output(moments: LayerStatistics, part: Part) -> torch.Tensor:
    """H of what o_proj or down_proj reads."""
    return moments.attention_output if part == "attention" else moments.mlp_output


def cache_folder(cache_dir: Path, kind: str, protocol: str) -> Path:
    return cache_dir / f"{kind}-{hashlib.sha256(protocol.encode()).hexdigest()[:16]}"
