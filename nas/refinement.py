"""Exchange sizes between the parts of a fitted subnet, by what each is worth where it stands.

Additive scores are of parts replaced alone in the full model. In a subnet whose weights were fitted in sequence other
parts have become thin, or make up for this one, and sizes are worth more or less than alone. So every part gets the
sizes next to its own in turn, the subnet's other weights in place, and what that changes in KL is exchanged at no more
latency: the additive knapsack once more, a step around the subnet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hw_profiles.profile import Progress
from nas.additive import MULTIPLIERS, Latency, Option, layer_of, part_costs, part_options
from nas.arithmetic import fast_dtype_name
from nas.evaluate import Evaluator
from nas.evolution import keeps_attention
from nas.quality import Quality
from nas.space import SearchSpace
from nas.study import Study
from nas.subnet import PARTS, Part, Subnet

#: A part of a layer.
Place = tuple[int, Part]
#: For each place what its options cost, in nats or in milliseconds.
Costs = Mapping[Place, Mapping[Option, float]]

#: Exchanges whose subnet turns out too slow are solved again, for so much less, so often.
_TRIES = 8
_LEAST_MS = 1e-9


@dataclass(frozen=True)
class Refinement:
    """`before` and `after` with weights fitted in sequence; the subnet is the one that came where none was better."""

    subnet: Subnet
    before: Quality
    after: Quality
    rounds: int


def refine(
    evaluator: Evaluator,
    subnet: Subnet,
    latency: Latency,
    fit: Callable[[Subnet], None],
    *,
    rounds: int = 1,
    stored: Mapping[str, float] | None = None,
    store: Callable[[str, float], None] = lambda name, kl: None,
    progress: Progress = lambda done, total, what: None,
) -> Refinement:
    """Exchange, `fit` and evaluate, `rounds` times or until the KL falls no more, at most at the subnet's `latency`.

    `fit` gives a subnet its own weights in the evaluator's supernet. KLs go to `store` by names that `stored` has them
    by when the same is asked again. Raises ValueError where all layers of the space are alike.
    """
    space = evaluator.supernet.space
    if space.homogeneous:
        raise ValueError(
            "wanted a space whose layers may differ, to exchange sizes between them, got a homogeneous one"
        )
    if rounds < 1:
        raise ValueError(f"wanted rounds of at least 1, got {rounds}")
    limit_ms = float(latency([subnet])[0])
    fit(subnet)
    before = after = evaluator.evaluate(subnet)
    done = 0
    while done < rounds:
        changes = score_neighbours(evaluator, subnet, stored or {}, store, progress)
        other = exchanged(space, subnet, changes, latency, limit_ms)
        if other == subnet:
            break
        done += 1
        fit(other)
        found = evaluator.evaluate(other)
        if found.kl >= after.kl:
            break
        subnet, after = other, found
    return Refinement(subnet, before, after, done)


def check_refinable(study: Study) -> None:
    """ValueError where what is found would not be a trial like the study's others."""
    name, arithmetic = repr(study.name), fast_dtype_name()
    if study.protocol.get("tasks"):
        raise ValueError(f"wanted a study that goes by KL, as exchanges do, got {name}, which goes by tasks")
    if not study.protocol["reform"]:
        raise ValueError(f"wanted a study with fitted weights, got {name}, which was searched with --no-reform")
    if study.protocol["dtype"] != arithmetic:
        raise ValueError(
            f"wanted a study computed in {arithmetic}, as this machine does, got {name} in {study.protocol['dtype']}; "
            "refine where it was searched"
        )


def score_neighbours(
    evaluator: Evaluator,
    subnet: Subnet,
    stored: Mapping[str, float],
    store: Callable[[str, float], None],
    progress: Progress,
) -> dict[Place, dict[Option, float]]:
    """By how much KL rises where one part of `subnet`, which was fitted, has the next size below or above its own.

    All sizes of the part have the weights that subnets share, its own size as well: those that were fitted to the
    subnet are of that size alone.
    """
    supernet, space = evaluator.supernet, evaluator.supernet.space
    entering = evaluator.entering(subnet)
    changes: dict[Place, dict[Option, float]] = {}
    places: list[Place] = [(layer, part) for layer in range(space.depth) for part in PARTS]
    for done, (layer, part) in enumerate(places):
        choices = space.sizes(part)
        size, own_bits = subnet.layers[layer].size(part), subnet.layers[layer].own_bits(part)
        at = choices.index(size)
        kl = {}
        for choice in choices[max(0, at - 1) : at + 2]:
            name = f"{subnet.id}.{layer}.{part}.{choice}"
            if name not in stored:
                supernet.activate_part(layer, part, choice, subnet.part_precision(layer, part))
                kl[choice] = evaluator.kl_from(layer, entering[layer])
                store(name, kl[choice])
            else:
                kl[choice] = stored[name]
        supernet.activate(subnet)
        changes[layer, part] = {(c, own_bits if c else 0): kl[c] - kl[size] for c in kl}
        progress(done + 1, len(places), f"sizes around layer {layer} {part}")
    return changes


def exchanged(space: SearchSpace, subnet: Subnet, changes: Costs, latency: Latency, limit_ms: float) -> Subnet:
    """The subnet of least KL by those changes, within `limit_ms` by `latency` and by the sum of its parts' costs."""
    of_parts = {
        part: dict(zip(part_options(space, part, subnet.bits), costs_ms, strict=True))
        for part, costs_ms in zip(PARTS, part_costs(space, latency, subnet.bits), strict=True)
    }
    costs_ms = {(layer, part): {o: float(of_parts[part][o]) for o in changes[layer, part]} for layer, part in changes}
    allowed_ms = sum(costs_ms[place][_option(subnet, place)] for place in changes)
    for _ in range(_TRIES):
        options = knapsack(changes, costs_ms, allowed_ms)
        if options is None or sum(changes[place][option] for place, option in options.items()) >= 0:
            break
        layers = [layer_of(options[i, "attention"], options[i, "mlp"]) for i in range(space.depth)]
        other = Subnet.of_parts(layers, subnet.bits, subnet.head_bits)
        over_ms = float(latency([other])[0]) - limit_ms
        if over_ms <= 0 and keeps_attention(other):
            return other
        allowed_ms -= max(over_ms, _LEAST_MS)
    return subnet


def _option(subnet: Subnet, place: Place) -> Option:
    layer, part = place
    return subnet.layers[layer].size(part), subnet.layers[layer].own_bits(part)


def knapsack(kl: Costs, ms: Costs, limit_ms: float) -> dict[Place, Option] | None:
    """An option for each place: the least KL + multiplier x ms of the first multiplier that keeps to the limit.

    What is left then goes, step by step, where it gains most KL a millisecond. None where nothing keeps to it.
    """
    for multiplier in MULTIPLIERS:
        chosen = {place: min(kl[place], key=lambda o: kl[place][o] + multiplier * ms[place][o]) for place in kl}
        left_ms = limit_ms - sum(ms[place][option] for place, option in chosen.items())
        if left_ms >= -_LEAST_MS:
            break
    else:
        return None
    while True:
        rates = {
            (place, option): (kl[place][now] - kl[place][option]) / max(ms[place][option] - ms[place][now], _LEAST_MS)
            for place, now in chosen.items()
            for option in kl[place]
            if kl[place][option] < kl[place][now] and ms[place][option] - ms[place][now] <= left_ms
        }
        if not rates:
            return chosen
        place, option = max(rates, key=lambda step: rates[step])
        left_ms -= ms[place][option] - ms[place][chosen[place]]
        chosen[place] = option
