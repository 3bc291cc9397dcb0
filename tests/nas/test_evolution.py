from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.evolution import ChangeShared, ShiftCapacity, choose_batch, evolve
from nas.pareto import hypervolume
from nas.space import SearchSpace
from nas.subnet import SKIPPED, LayerChoice, Subnet
from tests.nas.synthetic import latency_ms, lost, tiny_space

Floats = NDArray[np.float64]
REFERENCE = (5.0, 12.0)


def separable(subnets: Sequence[Subnet]) -> Floats:
    """A KL that is a plain sum over parts, the first layers dearer, beside the additive latency."""
    kl = [
        sum((1 + i) * lost(layer, "attention") ** 2 + 0.8 * lost(layer, "mlp") ** 2 for i, layer in enumerate(s.layers))
        + (0.3 if s.bits == 4 else 0.0)
        for s in subnets
    ]
    return np.column_stack([kl, latency_ms(subnets)])


def mutated(sizes: list[int], start: list[int], **options: float) -> tuple[Floats, Floats]:
    X = np.tile(start, (400, 1))
    mutation = ShiftCapacity(np.array(sizes), **options)
    return X, mutation._do(None, X.copy(), random_state=np.random.default_rng(0))


def test_shifting_keeps_the_steps_of_each_kind_of_part() -> None:
    sizes, start = [21, 31] * 5 + [2], [10, 15] * 5 + [1]
    X, changed = mutated(sizes, start, shift_probability=1.0, bits_probability=0.0)
    for part in (0, 1):
        assert (changed[:, part:-1:2].sum(axis=1) == X[:, part:-1:2].sum(axis=1)).all()
    assert (changed[:, -1] == 1).all()
    assert (changed != X).any(axis=1).mean() > 0.8  # up to three shifts, which may undo each other
    assert np.abs(changed - X).max() <= 3


def test_without_shifting_the_steps_change() -> None:
    X, changed = mutated([21, 31] * 5 + [2], [10, 15] * 5 + [1], shift_probability=0.0, bits_probability=0.0)
    assert (changed.sum(axis=1) != X.sum(axis=1)).mean() > 0.5


@pytest.mark.parametrize("start", [[0, 0] * 4 + [0], [2, 4] * 4 + [1], [1, 2] * 4 + [0]])
def test_mutation_stays_in_range_and_changes_something(start: list[int]) -> None:
    sizes = np.array([3, 5] * 4 + [2])
    X, changed = mutated(sizes.tolist(), start, bits_probability=0.5)
    assert (changed >= 0).all()
    assert (changed < sizes).all()
    assert (changed != X).any(axis=1).mean() > 0.6
    assert set(changed[:, -1]) == {0, 1}


def test_shared_sizes_layers_and_bits_all_change_and_layers_stay_alike() -> None:
    space = tiny_space(5, homogeneous=True)
    size = LayerChoice(1, 64)
    start = Subnet((size, SKIPPED, size, size, SKIPPED), 8)
    X = np.tile(space.encode(start), (400, 1))
    changed = ChangeShared(space.gene_sizes, 0.5)._do(None, X.copy(), random_state=np.random.default_rng(0))
    found = [space.decode(row) for row in changed]
    assert all((space.encode(subnet) == row).all() for subnet, row in zip(found, changed, strict=True))
    kept = [sum(layer != SKIPPED for layer in subnet.layers) for subnet in (start, *found)]
    assert {count - kept[0] for count in kept[1:]} == {-1, 0, 1}
    assert len({tuple(layer != SKIPPED for layer in s.layers) for s in found}) > 5
    assert len({layer for s in found for layer in s.layers}) >= 4
    assert {s.bits for s in found} == {8, 4}
    assert (changed != X).any(axis=1).mean() > 0.7


def every_subnet(space: SearchSpace) -> list[Subnet]:
    choices = [LayerChoice(*sizes) for sizes in product(space.group_choices, space.width_choices)]
    return [Subnet(layers, bits) for bits in space.bits_choices for layers in product(choices, repeat=space.depth)]


@pytest.mark.parametrize("seed", [0, 1])
def test_evolution_finds_the_front_better_than_as_many_random_subnets(seed: int) -> None:
    space = tiny_space(3)
    evaluated: list[Subnet] = []

    def objectives(subnets: Sequence[Subnet]) -> Floats:
        evaluated.extend(subnets)
        return separable(subnets)

    found = evolve(space, objectives, [space.full(8)], population=40, generations=25, seed=seed)
    rng = np.random.default_rng(seed)
    random = [space.sample(rng) for _ in evaluated]
    with_attention = [s for s in every_subnet(space) if any(layer.num_key_value_heads for layer in s.layers)]
    best = hypervolume(separable(with_attention), REFERENCE)
    assert hypervolume(separable(found), REFERENCE) > hypervolume(separable(random), REFERENCE)
    assert hypervolume(separable(found), REFERENCE) > 0.98 * best
    assert len(set(found)) == len(found)


def test_evolution_starts_from_what_it_is_given_and_repeats_itself() -> None:
    space = tiny_space(6)
    evaluated: list[Subnet] = []

    def objectives(subnets: Sequence[Subnet]) -> Floats:
        evaluated.extend(subnets)
        return separable(subnets)

    start = [space.sample(np.random.default_rng(i)) for i in range(30)]
    first = evolve(space, objectives, start, population=16, generations=3, seed=5)
    assert set(start[:16]) <= set(evaluated)
    assert not set(start[16:]) & set(evaluated[:16])
    assert evolve(space, separable, start, population=16, generations=3, seed=5) == first
    assert evolve(space, separable, start, population=16, generations=3, seed=6) != first


@pytest.mark.parametrize("layers", [2, 4])
def test_no_population_holds_a_model_without_attention(layers: int) -> None:
    """Even where latency is all that counts and the start is without; with 2 layers few others are left."""
    space = tiny_space(layers)
    start = [Subnet((LayerChoice(0, width),) * layers, bits) for width in space.width_choices for bits in (8, 4)]

    def fastest(subnets: Sequence[Subnet]) -> Floats:
        return np.column_stack([latency_ms(subnets), latency_ms(subnets)])

    for generations in (1, 2, 20):
        found = evolve(space, fastest, start, population=24, generations=generations, seed=0)
        assert found
        assert all(any(layer.num_key_value_heads for layer in subnet.layers) for subnet in found)


def area(points: Floats, reference: Floats) -> float:
    """Dominated area, cell by cell between all coordinates."""
    inside = points[(points < reference).all(axis=1)]
    xs, ys = (np.unique([*inside[:, k], reference[k]]) for k in (0, 1))
    return sum(
        (xs[i + 1] - xs[i]) * (ys[j + 1] - ys[j])
        for i in range(len(xs) - 1)
        for j in range(len(ys) - 1)
        if ((inside[:, 0] <= xs[i]) & (inside[:, 1] <= ys[j])).any()
    )


@pytest.mark.parametrize("seed", range(4))
def test_batch_is_the_greedy_one_by_hypervolume(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = np.array([1.0, 1.0])
    first, known = rng.uniform(0, 1.1, 12), rng.uniform(0.6, 1.1, (5, 2))
    predicted = np.column_stack([first, 1 - first + rng.uniform(-0.2, 0.2, 12)])
    expected: list[int] = []
    while len(expected) < 4:
        rest = [i for i in range(12) if i not in expected]
        areas = [area(np.vstack([known, predicted[[*expected, i]]]), reference) for i in rest]
        if max(areas) <= area(np.vstack([known, predicted[expected]]), reference) + 1e-12:
            break
        expected.append(rest[int(np.argmax(areas))])
    assert len(expected) == 4
    assert choose_batch(predicted, known, reference, 4)[: len(expected)] == expected


def test_batch_without_gains_takes_what_is_far_from_the_rest() -> None:
    predicted = np.array([[2.0, 2.1], [3.0, 4.0], [2.0, 2.0]])
    known = np.array([[1.0, 1.0]])
    assert choose_batch(predicted, known, np.array([5.0, 1.0]), 2) == [1, 0]
    assert len(choose_batch(predicted, known, np.array([5.0, 1.0]), 7)) == 3


def test_batch_of_nothing_and_knowing_nothing() -> None:
    nothing, reference = np.empty((0, 2)), np.array([1.0, 1.0])
    assert choose_batch(nothing, np.array([[0.5, 0.5]]), reference, 3) == []
    assert choose_batch(np.array([[0.9, 0.9], [0.1, 0.1]]), nothing, reference, 1) == [1]
