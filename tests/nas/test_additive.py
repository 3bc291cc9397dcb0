from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hw_profiles import BlockShape
from nas.additive import AdditiveScores, fill_in, ladder, optimum, part_options, scored_choices
from nas.pareto import pareto_front
from nas.space import SearchSpace
from nas.subnet import PARTS, LayerChoice, Subnet
from tests.nas.synthetic import latency_ms, tiny_space


def random_scores(space: SearchSpace, seed: int) -> AdditiveScores:
    """Falling with size, otherwise random."""
    rng = np.random.default_rng(seed)
    falling = [
        -np.sort(-rng.exponential(size=(space.depth, len(c)))) for c in (space.group_choices, space.width_choices)
    ]
    for table in falling:
        table[:, -1] = 0.0
    narrow = rng.exponential(size=(space.depth, 2)) if space.mixed_bits else None
    bits = {8: 0.01, 4: 0.2 + 5.0 * space.mixed_bits}
    return AdditiveScores(space, falling[0], falling[1], bits, narrow, narrow_head=float(rng.exponential()))


def every_subnet(space: SearchSpace, bits: int) -> list[Subnet]:
    """Of those bits, or where bits are mixed and these are 4, of all."""
    options = product(*(part_options(space, part, bits) for part in PARTS))
    choices = [
        LayerChoice(groups, width, *own) for (groups, *attention), (width, *mlp) in options if (own := attention + mlp)
    ]
    heads = (0, 4) if space.mixed_bits and bits == 4 else (0,)
    return [Subnet.of_parts(layers, bits, head) for layers in product(choices, repeat=space.depth) for head in heads]


def test_predict_is_the_sum_of_the_parts() -> None:
    space = tiny_space(2)
    attention, mlp = np.array([[0.5, 0.2, 0.0], [0.7, 0.3, 0.0]]), np.array([[9.0, 4, 2, 1, 0], [8.0, 3, 2, 1, 0]])
    scores = AdditiveScores(space, attention, mlp, {8: 0.01, 4: 0.1})
    subnets = [
        Subnet((LayerChoice(2, 128), LayerChoice(2, 128)), 8),
        Subnet((LayerChoice(1, 64), LayerChoice(0, 32)), 4),
        Subnet((LayerChoice(0, 0), LayerChoice(2, 96)), 8),
    ]
    assert scores.predict(subnets) == pytest.approx([0.01, 0.1 + 0.2 + 2 + 0.7 + 3, 0.01 + 0.5 + 9 + 1])


def test_scored_choices_of_attention_are_all_and_of_mlp_near_the_shares() -> None:
    space = tiny_space(2)
    assert scored_choices(space, "attention") == [0, 1]
    blocks = (BlockShape(4, 2, 512),) * 2
    wide = SearchSpace(replace(space.base, blocks=blocks), (0, 1, 2), (0, 96, 128, 224, 512))
    assert scored_choices(wide, "mlp") == [0, 96, 224]  # 64 and 256 are no choices


CHOICES = (0, 32, 64, 128, 256, 512)
ERRORS = {0: 1.0, 32: 0.6, 64: 0.4, 128: 0.2, 256: 0.08}
SCORED = {0: 2.0, 64: 0.3, 256: 0.02}


def test_fill_in_keeps_what_was_scored_and_is_linear_in_logs_between() -> None:
    filled = dict(zip(CHOICES, fill_in(CHOICES, SCORED, ERRORS), strict=True))
    assert [filled[choice] for choice in SCORED] == pytest.approx(list(SCORED.values()))
    share = np.log(0.6 / 1.0) / np.log(0.4 / 1.0)
    assert filled[32] == pytest.approx(2.0 ** (1 - share) * 0.3**share)
    assert filled[512] == 0.0


def test_fill_in_falls_in_proportion_beyond_the_largest_scored() -> None:
    filled = fill_in(CHOICES, {0: 2.0, 64: 0.3}, ERRORS)
    assert filled[3:5] == pytest.approx([0.3 * 0.2 / 0.4, 0.3 * 0.08 / 0.4])


@pytest.mark.parametrize("seed", range(20))
def test_fill_in_is_monotone_for_monotone_inputs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors = dict(zip(CHOICES[:-1], [1.0, *sorted(rng.uniform(0, 1, 4), reverse=True)], strict=True))
    kls = sorted(rng.exponential(size=3), reverse=True)
    filled = fill_in(CHOICES, dict(zip((0, 32, 128), kls, strict=True)), errors)
    assert (np.diff(filled) <= 0).all()


def lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Andrew's monotone chain, lower half, of (ms, KL)."""
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0) > 1e-12:
                break
            hull.pop()
        hull.append(point)
    return hull


@pytest.mark.parametrize(("layers", "bits", "mixed_bits"), [(2, 8, False), (3, 8, False), (2, 4, True)])
@pytest.mark.parametrize("seed", range(4))
def test_ladder_is_the_lower_convex_hull_of_all_subnets(layers: int, bits: int, mixed_bits: bool, seed: int) -> None:
    space = tiny_space(layers, mixed_bits=mixed_bits)
    scores = random_scores(space, seed)
    steps = ladder(scores, latency_ms, bits, count=1000)
    assert mixed_bits or not any(step.is_mixed for step in steps)
    everything = every_subnet(space, bits)
    hull = lower_hull(list(zip(latency_ms(everything).tolist(), scores.predict(everything).tolist(), strict=True)))
    hull_ms, hull_kl = np.array(hull).T
    own_ms, own_kl = latency_ms(steps), scores.predict(steps)
    for head_bits in {subnet.head_bits for subnet in everything}:  # on the hull of those with either head
        same = [subnet for subnet in everything if subnet.head_bits == head_bits]
        points = zip(latency_ms(same).tolist(), scores.predict(same).tolist(), strict=True)
        own = [step.head_bits == head_bits for step in steps]
        assert own_kl[own] == pytest.approx(np.interp(own_ms[own], *np.array(lower_hull(list(points))).T))
    assert len(set(steps)) == len(steps) == len(pareto_front(np.column_stack([own_kl, own_ms])))
    # a vertex is the optimum of all multipliers between the slopes beside it; narrow ranges may fall through
    slopes = -np.diff(hull_kl) / np.diff(hull_ms)
    wide = [i for i in range(1, len(hull) - 1) if slopes[i - 1] > 1.15 * slopes[i] and slopes[i] > 1e-5]
    found = {round(ms, 9) for ms in own_ms}
    fastest = own_ms.min()  # faster ones are without attention
    assert {round(hull_ms[i], 9) for i in wide if hull_ms[i] >= fastest} <= found
    assert fastest < latency_ms([space.full(bits)])[0]
    without = [subnet for subnet in everything if not any(layer.num_key_value_heads for layer in subnet.layers)]
    assert not set(steps) & {*without, space.full(8), space.full(4)}


def test_a_short_ladder_is_a_spread_choice_of_the_long_one() -> None:
    scores = random_scores(tiny_space(6), 0)
    everything, short = ladder(scores, latency_ms, 4, count=1000), ladder(scores, latency_ms, 4, count=4)
    assert set(short) <= set(everything)
    assert 2 <= len(short) <= 4
    assert {step.bits for step in short} == {4}
    ms, short_ms = latency_ms(everything), latency_ms(short)
    assert short_ms.max() == ms.max()
    assert short_ms.min() == ms.min()


@pytest.mark.parametrize("limit_ms", [1.6, 2.4, 3.3])
def test_the_optimum_of_a_budget_is_near_the_best_of_all_and_leaves_no_room(limit_ms):
    """Against every subnet of a small space."""
    space = tiny_space(layers=3, bits=(8,))
    scores = replace(random_scores(space, 0), bits={8: 0.0})
    everything = [space.decode(np.array(genes)) for genes in product(*map(range, space.gene_sizes))]
    within = [subnet for subnet, ms in zip(everything, latency_ms(everything), strict=True) if ms <= limit_ms]
    found = optimum(scores, latency_ms, 8, limit_ms)
    assert found in within
    best = scores.predict(within).min()
    assert best <= scores.predict([found])[0] < 1.15 * best
    larger = [s for s in within if all(a <= b for a, b in zip(space.encode(found), space.encode(s), strict=True))]
    assert larger == [found]


@pytest.mark.parametrize("seed", range(3))
def test_where_layers_are_alike_the_front_and_the_optima_are_exact(seed):
    """Against every subnet of a small space."""
    space = tiny_space(layers=4, bits=(8,), homogeneous=True)
    scores = random_scores(space, seed)
    full = space.full(8)
    everything = list({space.decode(np.array(genes)) for genes in product(*map(range, space.gene_sizes))})
    attending = [subnet for subnet in everything if any(layer.num_key_value_heads for layer in subnet.layers)]
    points = np.column_stack([scores.predict(attending), latency_ms(attending)])
    front = {tuple(points[i]) for i in pareto_front(points)}
    steps = ladder(scores, latency_ms, 8, count=1000)
    assert set(steps) <= set(attending) - {full}
    assert {*zip(scores.predict(steps), latency_ms(steps), strict=True)} == front - {
        tuple(points[attending.index(full)])
    }
    for limit_ms in (1.5, 2.5, 3.5):
        within = [subnet for subnet in attending if latency_ms([subnet])[0] <= limit_ms]
        found = optimum(scores, latency_ms, 8, limit_ms)
        assert found in within
        assert scores.predict([found])[0] == scores.predict(within).min()


def test_no_subnet_meets_a_budget_below_the_smallest():
    space = tiny_space(layers=2, bits=(8,))
    scores = AdditiveScores(space, np.array([[2.0, 1, 0]] * 2), np.array([[4.0, 3, 2, 1, 0]] * 2), {8: 0.0})
    assert optimum(scores, latency_ms, 8, 0.1) is None


def test_a_part_of_8_bits_saves_its_share_of_what_4_bits_cost() -> None:
    space = tiny_space(2, mixed_bits=True)
    zero = (np.zeros((2, 3)), np.zeros((2, 5)))
    scores = AdditiveScores(space, *zero, {8: 0.01, 4: 0.21}, np.array([[1.0, 3.0], [2.0, 4.0]]), 0.5)
    subnets = [
        space.full(8),
        space.full(4),
        Subnet((LayerChoice(2, 128, 8, 0), LayerChoice(2, 128)), 4),
        Subnet((LayerChoice(1, 64), LayerChoice(0, 32, 0, 8)), 4),  # what is skipped is not rounded
        replace(space.full(4), head_bits=4),
    ]
    assert scores.predict(subnets) == pytest.approx([0.01, 0.21, 0.21 - 0.02, 0.01 + 0.02 + 0.06, 0.21 + 0.5])
