"""A space, its qualities and its latencies as formulas: what the search and its neighbours are tested on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hw_profiles import BlockShape, Device, Measurement, ModelShape, Store, Target, Workload, plan
from hw_profiles.measurement import MemoryMeasurement, Role
from hw_profiles.memory import memory_plan
from hw_profiles.shapes import BLOCK_BITS, Precision
from hw_profiles.staleness import installed_version
from nas.quality import Quality
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Part, Size, Subnet

Floats = NDArray[np.float64]
PART_WEIGHTS: dict[Part, float] = {"attention": 0.6, "mlp": 1.0}
#: KL of all weights at these bits.
ROUNDING = {32: 0.0, 16: 0.001, 8: 0.002, 4: 0.05}
#: KL of a head of fewer bits, and the milliseconds that it saves.
NARROW_HEAD_KL, NARROW_HEAD_MS = 0.01, 0.1


def tiny_space(
    layers: int = 6,
    bits: tuple[int, ...] = (8, 4),
    homogeneous: bool = False,
    mixed_bits: bool = False,
    query_heads: bool = False,
) -> SearchSpace:
    full = ModelShape(64, 16, 256, True, (BlockShape(4, 2, 128),) * layers)
    heads = (1,) if query_heads else ()
    return SearchSpace(full, (0, 1, 2), (0, 32, 64, 96, 128), bits, homogeneous, mixed_bits, heads)


def latency_ms(subnets: Sequence[Subnet]) -> Floats:
    """Additive: every kept part costs something for being there and something for its size; 4 bits run faster."""
    return np.array([_one_latency_ms(subnet) for subnet in subnets])


def _one_latency_ms(subnet: Subnet) -> float:
    return (
        0.5
        - NARROW_HEAD_MS * (subnet.head_bits > 0)
        + sum(
            (0.1 * (layer.num_key_value_heads > 0) + 0.1 * layer.query_heads(2)) * _pace(subnet, i, "attention")
            + (0.05 * (layer.intermediate_size > 0) + 0.005 * layer.intermediate_size) * _pace(subnet, i, "mlp")
            for i, layer in enumerate(subnet.layers)
        )
    )


def _pace(subnet: Subnet, layer: int, part: Part) -> float:
    return 0.7 if subnet.part_precision(layer, part) == "int4" else 1.0


def lost(layer: LayerChoice, part: str) -> float:
    """Share of one part that is gone, 0 to 1, in tiny_space."""
    if part == "mlp":
        return 1 - layer.intermediate_size / 128
    return 1 - (layer.num_key_value_heads + layer.query_heads(2)) / 6


class SyntheticEvaluator:
    """KL grows with what each layer loses, more in outer layers, and faster where neighbours both lose.

    `seconds` slows every evaluation down; `fails_after` evaluations it raises RuntimeError.
    """

    def __init__(self, space: SearchSpace, *, seconds: float = 0.0, fails_after: int | None = None) -> None:
        self.space = space
        self.seconds = seconds
        self.fails_after = fails_after
        self.evaluated: list[Subnet] = []
        self.scored: list[tuple[int, str, Size]] = []
        self.scored_heads = 0

    def evaluate(self, subnet: Subnet) -> Quality:
        if self.fails_after is not None and len(self.evaluated) + len(self.scored) >= self.fails_after:
            raise RuntimeError("stop here")
        time.sleep(self.seconds)
        self.evaluated.append(subnet)
        kl = self.kl(subnet)
        return Quality(kl, float(np.exp(2 + kl)), 512, 0.25)

    def block_kl(self, layer: int, part: str, choice: Size, precision: Precision) -> float:
        assert (precision, choice) == ("int4", 128 if part == "mlp" else 2) or precision == "fp32"
        if self.fails_after is not None and len(self.evaluated) + len(self.scored) >= self.fails_after:
            raise RuntimeError("stop here")
        self.scored.append((layer, part, choice))
        full = self.space.full(32).layers
        changed = LayerChoice.of_sizes(*((choice, 128) if part == "attention" else (2, choice)))
        rounding = ROUNDING[4] * (1 + layer) / 100 if precision == "int4" else 0.0
        return rounding + self.kl(Subnet((*full[:layer], changed, *full[layer + 1 :]), 32))

    def narrow_head_kl(self) -> float:
        self.scored_heads += 1
        return NARROW_HEAD_KL

    def reformation_error(self, layer: int, part: str, choice: Size) -> float:
        changed = LayerChoice.of_sizes(*((choice, 0) if part == "attention" else (0, choice)))
        return lost(changed, part) ** 2

    def kl(self, subnet: Subnet) -> float:
        depth = len(subnet.layers)
        losses = np.array(
            [
                sum(PART_WEIGHTS[part] * lost(layer, part) ** 2 for part in PART_WEIGHTS) * self._importance(i, depth)
                for i, layer in enumerate(subnet.layers)
            ]
        )
        bits = [BLOCK_BITS[subnet.part_precision(i, part)] for i in range(depth) for part in PART_WEIGHTS]
        of_parts = [ROUNDING[own] for own in bits]
        rounding = np.mean(of_parts) + NARROW_HEAD_KL * (subnet.head_bits > 0)
        return float(rounding + losses.sum() + 2 * (losses[1:] * losses[:-1]).sum())

    @staticmethod
    def _importance(layer: int, depth: int) -> float:
        return 0.05 + 0.25 * abs(layer - (depth - 1) / 2) / depth + 0.03 * (layer * 7 % 3)


VERSION = "2026.4"


def shape_ms(shape: ModelShape, precision: str, workload: Workload) -> float:
    """Milliseconds of a graph in a synthetic profile, linear in what predictors.features counts."""
    blocks = shape.blocks
    parts = sum(
        0.1 * (block.num_key_value_heads > 0)
        + 0.1 * block.num_attention_heads
        + 0.05 * (block.intermediate_size > 0)
        + 0.004 * block.intermediate_size
        for block in blocks
    )
    per_step = {"fp32": 2.0, "int8": 1.0, "int4": 0.7}[precision]
    return (0.5 + per_step * parts) * (1.0 if workload.phase == "decode" else workload.tokens * workload.batch_size / 2)


def measurement(
    target: Target,
    full: ModelShape,
    shape: ModelShape,
    workload: Workload,
    role: Role,
    ms: float,
    version: str = VERSION,
) -> Measurement:
    reference_ms = shape_ms(full, target.precision, workload)
    return Measurement(
        target, shape, workload, role, full.id, ms / reference_ms, 0.01, 9, {full.id: reference_ms}, version
    )


def fill_profile(
    store: Store,
    space: SearchSpace,
    device: Device,
    runtime: str,
    workloads: Sequence[Workload],
    precisions: Sequence[Precision] = ("int8", "int4"),
    factors: Mapping[Role, float] | None = None,
    scatter: float = 0.0,
    version: str | None = None,
) -> None:
    """What `nas profile` with one thread would store if shapes took `shape_ms`, times `factors` of their role.

    `version` is the runtime's: by default the one installed here, or VERSION on another device.

    `scatter` is the standard deviation of a further random factor.
    """
    rng = np.random.default_rng(0)
    store.add_device(device)
    version = version or installed_version(runtime, device.id) or VERSION
    for precision in precisions:
        target = Target(device.id, runtime, precision, 1)
        store.add_measurements(
            [
                measurement(
                    target,
                    space.base,
                    graph.shape,
                    work,
                    graph.role,
                    shape_ms(graph.shape, precision, work)
                    * (factors or {}).get(graph.role, 1.0)
                    * (1.0 if graph.role == "reference" else 1 + scatter * rng.standard_normal()),
                    version,
                )
                for graph in plan(space.base, space.block_choices(), anchors=10, heldout=6, repeats=3)
                for work in workloads
            ]
        )


BASELINE_BYTES = 60_000_000


def shape_peak_bytes(shape: ModelShape, precision: Precision, workload: Workload) -> int:
    """Peak of a process in a synthetic profile, linear in what predictors.memory counts."""
    cached = workload.tokens + (workload.phase == "decode")
    return BASELINE_BYTES + 1000 * (3 * shape.weight_bytes(precision) + 2 * shape.kv_cache_bytes(cached))


def fill_memory(
    store: Store,
    space: SearchSpace,
    device: Device,
    runtime: str,
    workloads: Sequence[Workload],
    precisions: Sequence[Precision] = ("int8", "int4"),
    factors: Mapping[Role, float] | None = None,
    version: str | None = None,
    graphs: int = 8,
) -> None:
    """What `nas profile` with one thread would store of `shape_peak_bytes`, times `factors` of their role."""
    store.add_device(device)
    version = version or installed_version(runtime, device.id) or VERSION
    planned = plan(space.base, space.block_choices(), anchors=10, heldout=6, repeats=3)
    for precision in precisions:
        target = Target(device.id, runtime, precision, 1)
        store.add_memory_measurements(
            [
                MemoryMeasurement(
                    target,
                    graph.shape,
                    work,
                    graph.role,
                    space.base.id,
                    round(shape_peak_bytes(graph.shape, precision, work) * (factors or {}).get(graph.role, 1.0)),
                    BASELINE_BYTES,
                    version,
                    0.5 if work.phase == "decode" else None,
                )
                for graph, works in memory_plan(planned, workloads, graphs)
                for work in works
            ]
        )
