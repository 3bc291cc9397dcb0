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
from nas.subnet import PARTS, Part

#: Channels dropped at a step of the elimination: at least so many, and of wide MLPs a forty-eighth, for a step passes
#: over two matrices that no cache holds.
_FEWEST_AT_ONCE = 32
_STEPS = 48


@dataclass(frozen=True)
class PartPlan:
    """Keep-order of one part's KV groups or channels, and per size short of full the reformed output weights.

    `outputs[k]` is fp32 [hidden, inputs of k]: o_proj or down_proj over the first k of `order`; `errors[k]` the share
    of the output's energy that it loses on the calibration text.
    """

    order: torch.Tensor
    outputs: dict[int, torch.Tensor]
    errors: dict[int, float]


def load_plans(
    statistics: Statistics,
    cache_dir: Path,
    depth: int,
    sizes: Mapping[Part, Sequence[int]],
    output_weight: Callable[[int, Part], torch.Tensor],
    progress: Progress = lambda done, total, what: None,
) -> list[dict[Part, PartPlan]]:
    """What `cache_dir` has, or after making what it lacks; `sizes` are those kept, ascending to the full one.

    `output_weight` gives the output map [hidden, inputs] of a whole part of a layer. Orders and weights are kept apart:
    other sizes need other weights, and orders take longer. Tensors are mapped from files, not read into memory.
    """
    short = {part: tuple(sizes[part][:-1]) for part in PARTS}
    of_orders = f"{statistics.key} {DAMPING} {_at_once(sizes['mlp'][-1])}"
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
                save_layer(orders, layer, {p: part_order(p, maps[p], read[p], sizes[p][-1]) for p in PARTS})
                order = load_layer(orders, layer, set(PARTS))
            made: dict[str, torch.Tensor] = {}
            for p in PARTS:
                reformed = part_outputs(maps[p], read[p], order[p], short[p])
                made |= {f"{p}.{k}": found.weight for k, found in reformed.items()}
                made[f"{p}.errors"] = torch.tensor([r.error for r in reformed.values()], dtype=torch.float64)
            save_layer(weights, layer, made)
            tensors = load_layer(weights, layer, names)
        plans.append({})
        for p in PARTS:
            errors = dict(zip(short[p], tensors[f"{p}.errors"].tolist(), strict=True))
            plans[layer][p] = PartPlan(order[p], {k: tensors[f"{p}.{k}"] for k in short[p]}, errors)
    return plans


def part_order(part: Part, weight: torch.Tensor, H: torch.Tensor, full_size: int) -> torch.Tensor:
    """Groups or channels, most important first, int64 [full_size]; the output map `weight` reads inputs of moments H.

    Channels are dropped some at a step, groups one by one.
    """
    chunk = 1 if part == "attention" else _at_once(full_size)
    return keep_order(weight, H, group=weight.shape[1] // full_size, chunk=chunk)


def _at_once(channels: int) -> int:
    return max(_FEWEST_AT_ONCE, channels // _STEPS)


def part_outputs(
    weight: torch.Tensor, H: torch.Tensor, order: torch.Tensor, sizes: Sequence[int]
) -> dict[int, Reformed]:
    """The output map refitted to the first k of `order`, for each k of `sizes`."""
    group = weight.shape[1] // len(order)
    reformed = reform(weight, H, grouped_rows(order, group), [k * group for k in sizes])
    return {k: reformed[k * group] for k in sizes}


def grouped_rows(order: torch.Tensor, group: int) -> torch.Tensor:
    """Indices of the rows (or columns) of groups of `group` consecutive ones."""
    return (order.unsqueeze(1) * group + torch.arange(group)).flatten()


def read_by_output(moments: LayerStatistics, part: Part) -> torch.Tensor:
    """H of what o_proj or down_proj reads."""
    return moments.attention_output if part == "attention" else moments.mlp_output


def cache_folder(cache_dir: Path, kind: str, protocol: str) -> Path:
    return cache_dir / f"{kind}-{hashlib.sha256(protocol.encode()).hexdigest()[:16]}"
