"""The additive estimate of quality, and the solver that is exact for it: seeds of the search, the baseline to beat.

KL(subnet) is estimated as the cost of its bits plus, for each layer's attention and MLP, the KL that replacing this
part alone costs (Puzzle, arXiv 2411.19146). Latency being near additive too, choosing a size for each part under a
budget is a multiple-choice knapsack; its Lagrangian splits into one small minimum per part. Where bits are mixed, a
part's choices are its sizes at 4 bits and at 8, and each part has its share of what 4 bits cost in place of 8; a head
of 4 bits costs what it costs alone, and either head is tried with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hw_profiles.shapes import NARROW_HEAD_BITS, WIDE_BITS
from nas.pareto import pareto_front
from nas.space import SearchSpace
from nas.subnet import NARROW_BITS, PARTS, SKIPPED, FewerHeads, LayerChoice, Part, Size, Subnet

Floats = NDArray[np.float64]
#: Milliseconds of each subnet.
Latency = Callable[[Sequence[Subnet]], Floats]
#: A size of a part, and the bits that it has of its own, or 0.
Option = tuple[Size, int]

#: Widths, as shares of the full one, whose replacement is evaluated; the reformation error fills in those between.
SCORED_WIDTHS = (0.0, 1 / 8, 1 / 2)
_KL_FLOOR = 1e-6
MULTIPLIERS = np.logspace(-5, 2, 160)
#: A size that is predicted to cost nothing, or less, is taken for next to nothing.
_LEAST_MS = 1e-6


@dataclass(frozen=True)
class AdditiveScores:
    """`attention` and `mlp` [layers, sizes of the part] in nats; `bits` the KL of rounding alone.

    With mixed bits `narrow` [layers, 2] is the KL of each layer's attention and MLP alone at 4 bits, and `narrow_head`
    that of the head alone.
    """

    space: SearchSpace
    attention: Floats
    mlp: Floats
    bits: dict[int, float]
    narrow: Floats | None = None
    narrow_head: float = 0.0

    def predict(self, subnets: Sequence[Subnet]) -> Floats:
        """Estimated KL of each subnet."""
        genes = np.array([self.space.encode(subnet)[:-1].reshape(self.space.depth, -1) for subnet in subnets])
        layers = np.arange(self.space.depth)
        parts = self.attention[layers, genes[..., 0]] + self.mlp[layers, genes[..., 1]]
        rounding = np.array([self.bits[subnet.bits] for subnet in subnets])
        if self.space.mixed_bits:  # of a thousand subnets at once: evolution asks for them by the generation
            skippable = [not self.space.sizes(part)[0] for part in PARTS]
            at_narrow = (genes[..., 2:] == 0) & ((genes[..., :2] > 0) | ~np.array(skippable))
            added = (at_narrow * self._narrowing()).sum(axis=(1, 2))
            narrow = np.array([subnet.bits == NARROW_BITS for subnet in subnets])
            rounding = np.where(narrow, self.bits[WIDE_BITS] + added, rounding)
            rounding += self.narrow_head * np.array([subnet.head_bits > 0 for subnet in subnets])
        estimate: Floats = parts.sum(axis=1) + rounding
        return estimate

    def _narrowing(self) -> Floats:
        """What each part adds at 4 bits in place of 8 [layers, 2]: together what the whole model adds."""
        assert self.narrow is not None
        added = max(self.bits[NARROW_BITS] - self.bits[WIDE_BITS], 0.0)
        return np.asarray(added * self.narrow / self.narrow.sum(), dtype=np.float64)

    def of_options(self, part: Part, options: Sequence[Option], bits: int) -> Floats:
        """Of a part of every layer at each of its options in subnets of `bits`, [layers, options]."""
        sizes = self.space.sizes(part)
        of_sizes = self.attention if part == "attention" else self.mlp
        costs: Floats = of_sizes[:, [sizes.index(size) for size, _ in options]]
        if self.narrow is None or bits != NARROW_BITS:
            return costs
        at_narrow = np.array([bool(size) and not own for size, own in options])
        return np.asarray(costs + self._narrowing()[:, [PARTS.index(part)]] * at_narrow, dtype=np.float64)


def part_options(space: SearchSpace, part: Part, bits: int) -> list[Option]:
    """Sizes in ascending order, and at 4 bits, where these are mixed, each with its own 8 bits as well."""
    mixed = space.mixed_bits and bits == NARROW_BITS
    return [(size, own) for size in space.sizes(part) for own in ((0, WIDE_BITS) if mixed and size else (0,))]


def scored_choices(space: SearchSpace, part: Part) -> list[Size]:
    """Sizes short of full whose single replacement is evaluated, for every layer; fewer heads, of all groups alone."""
    if part == "attention":
        fewer = [FewerHeads(space.group_choices[-1], heads) for heads in space.head_choices]
        return [*space.group_choices[:-1], *(size for size in fewer if size in space.sizes(part))]
    full = space.width_choices[-1]
    return [min(space.width_choices[:-1], key=lambda width: abs(width - share * full)) for share in SCORED_WIDTHS]


def fill_in(choices: Sequence[Size], scored: dict[Size, float], errors: dict[Size, float]) -> Floats:
    """KL of every choice [len(choices)] from the scored ones: log KL is linear in log reformation error between them.

    Below the least error scored KL falls in proportion to the error; the full size, the last, costs nothing.
    """
    log_kl = {choice: np.log(max(kl, _KL_FLOOR)) for choice, kl in scored.items()}
    log_error = {choice: np.log(max(errors.get(choice, 1.0), 1e-12)) for choice in choices[:-1]}
    known = sorted(scored, key=lambda choice: log_error[choice])
    abscissae, ordinates = [log_error[c] for c in known], [log_kl[c] for c in known]
    filled = []
    for choice in choices[:-1]:
        if choice in log_kl:
            value = log_kl[choice]
        elif log_error[choice] < log_error[known[0]]:
            value = log_kl[known[0]] + log_error[choice] - log_error[known[0]]
        else:
            value = float(np.interp(log_error[choice], abscissae, ordinates))
        filled.append(float(np.exp(value)))
    return np.array([*filled, 0.0])


def ladder(scores: AdditiveScores, latency: Latency, bits: int, count: int, worst_kl: float = math.inf) -> list[Subnet]:
    """Up to `count` additive optima of falling latency: minima of KL + multiplier x ms, evenly spread in between.

    None whose estimated KL exceeds `worst_kl`.
    """
    space = scores.space
    full = {space.full(bits) for bits in space.bits_choices}
    distinct = [subnet for subnet in _optima(scores, latency, bits) if subnet not in full]
    if distinct:
        distinct = [s for s, kl in zip(distinct, scores.predict(distinct), strict=True) if kl <= worst_kl]
    if len(distinct) <= count:
        return distinct
    latencies = latency(distinct)
    steps = np.linspace(latencies.max(), latencies.min(), count)
    nearest = sorted({int(np.abs(latencies - step).argmin()) for step in steps})
    return [distinct[i] for i in nearest]


def _optima(scores: AdditiveScores, latency: Latency, bits: int) -> list[Subnet]:
    """Of falling latency: those of rising multipliers, or where layers are alike or heads differ, the best of all."""
    space = scores.space
    if space.homogeneous:
        return _plain_optima(scores, latency, bits)
    layers = _optimal_layers(scores, latency, bits)
    optima = list(dict.fromkeys(Subnet.of_parts(kept, bits) for kept in layers))
    if (bits, NARROW_HEAD_BITS) not in space.bits_options:
        return optima
    with_narrow_head = [Subnet.of_parts(kept, bits, NARROW_HEAD_BITS) for kept in [space.full().layers, *layers]]
    return _best(scores, latency, [*optima, *dict.fromkeys(with_narrow_head)])


def _optimal_layers(scores: AdditiveScores, latency: Latency, bits: int) -> list[list[LayerChoice]]:
    """Of minima for rising multipliers."""
    space = scores.space
    options = {part: part_options(space, part, bits) for part in PARTS}
    kl = {part: scores.of_options(part, options[part], bits) for part in PARTS}
    costs_ms = dict(zip(PARTS, part_costs(space, latency, bits), strict=True))
    solutions = []
    for multiplier in MULTIPLIERS:
        best = {part: (kl[part] + multiplier * costs_ms[part]).argmin(axis=1) for part in PARTS}
        layers = [
            layer_of(options["attention"][a], options["mlp"][m])
            for a, m in zip(best["attention"], best["mlp"], strict=True)
        ]
        if not any(layer.num_key_value_heads for layer in layers):
            break  # a decoder without any attention is no candidate
        solutions.append(layers)
    return solutions


def layer_of(attention: Option, mlp: Option) -> LayerChoice:
    return LayerChoice.of_sizes(attention[0], mlp[0], attention[1], mlp[1])


def _plain_optima(scores: AdditiveScores, latency: Latency, bits: int) -> list[Subnet]:
    """Pareto-best of every shared size and number of layers, with the layers that matter most."""
    space = scores.space
    subnets = []
    attention_sizes, mlp_sizes = map(space.sizes, PARTS)
    for a, m in product(range(1, len(attention_sizes)), range(1, len(mlp_sizes))):
        size = LayerChoice.of_sizes(attention_sizes[a], mlp_sizes[m])
        lost = scores.attention[:, 0] + scores.mlp[:, 0] - scores.attention[:, a] - scores.mlp[:, m]
        most_lost = lost.argsort(kind="stable")[::-1].tolist()
        for count in range(1, space.depth + 1):
            kept = set(most_lost[:count])
            subnets.append(Subnet(tuple(size if i in kept else SKIPPED for i in range(space.depth)), bits))
    return _best(scores, latency, subnets)


def _best(scores: AdditiveScores, latency: Latency, subnets: Sequence[Subnet]) -> list[Subnet]:
    """Those that no other is better than in both, of falling latency."""
    return [subnets[i] for i in pareto_front(np.column_stack([scores.predict(subnets), latency(subnets)]))]


def optimum(scores: AdditiveScores, latency: Latency, bits: int, limit_ms: float) -> Subnet | None:
    """The best of those minima within `limit_ms`, and then, step by step, what gains most KL a millisecond.

    Where layers are alike, the first is exact already.

    None where the smallest is too slow.
    """
    space = scores.space
    known = [space.full(bits), *_optima(scores, latency, bits)]
    values_ms, kl = latency(known), scores.predict(known)
    within = np.flatnonzero(values_ms <= limit_ms)
    if not len(within):
        return None
    best = int(within[kl[within].argmin()])
    value_ms, subnet = values_ms[best], known[best]
    while not space.homogeneous and (larger := _one_size_up(space, subnet)):
        values_ms = latency(larger)
        gained = scores.predict([subnet])[0] - scores.predict(larger)
        rates = np.where(values_ms <= limit_ms, gained / np.maximum(values_ms - value_ms, _LEAST_MS), 0.0)
        best = int(rates.argmax())
        if rates[best] <= 0:
            break
        value_ms, subnet = values_ms[best], larger[best]
    return subnet


def _one_size_up(space: SearchSpace, subnet: Subnet) -> list[Subnet]:
    """With the next larger choice in one place; none of the full model."""
    genes = space.encode(subnet)
    places = np.flatnonzero(genes[:-1] + 1 < space.gene_sizes[:-1])
    return [space.decode(genes + np.eye(len(genes), dtype=np.int64)[place]) for place in places]


def part_costs(space: SearchSpace, latency: Latency, bits: int) -> tuple[Floats, Floats]:
    """Milliseconds of one layer's attention and MLP at each of their `part_options`, relative to the first."""
    full_attention, full_mlp = ((space.sizes(part)[-1], 0) for part in PARTS)

    def uniform(attention: Option, mlp: Option) -> Subnet:
        # half of the layers, so that the model stays within what was profiled
        changed, kept = layer_of(attention, mlp), layer_of(full_attention, full_mlp)
        return Subnet(tuple(changed if i % 2 else kept for i in range(space.depth)), bits)

    changed_layers = space.depth // 2
    of_attention, of_mlp = (part_options(space, part, bits) for part in PARTS)
    attention = latency([uniform(option, full_mlp) for option in of_attention]) / changed_layers
    mlp = latency([uniform(full_attention, option) for option in of_mlp]) / changed_layers
    return attention - attention[0], mlp - mlp[0]
