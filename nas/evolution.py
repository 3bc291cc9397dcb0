"""pymoo on the predictors: thousands of cheap evaluations, a batch of candidates for the true one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.optimize import minimize

from nas.pareto import hypervolume, pareto_front
from nas.space import SearchSpace
from nas.subnet import Subnet

Genes = NDArray[np.int64]
Floats = NDArray[np.float64]
#: Predicted objectives [n, 2] of subnets: log KL and milliseconds, both to be minimised.
Objectives = Callable[[Sequence[Subnet]], Floats]


def evolve(
    space: SearchSpace, objectives: Objectives, start: Sequence[Subnet], *, population: int, generations: int, seed: int
) -> list[Subnet]:
    """NSGA-II from `start`, filled up with random subnets; returns the last population, best fronts first."""
    rng = np.random.default_rng(seed)
    genes = [space.encode(subnet) for subnet in start][:population]
    genes += [space.encode(space.sample(rng)) for _ in range(population - len(genes))]
    sizes = space.gene_sizes
    algorithm = NSGA2(
        pop_size=population,
        sampling=np.array(genes),
        crossover=UniformCrossover(prob=0.9),
        mutation=ChangeShared(sizes) if space.homogeneous else ShiftCapacity(sizes, space.genes_per_layer),
        eliminate_duplicates=True,
    )
    result = minimize(_Surrogate(space, objectives), algorithm, ("n_gen", generations), seed=seed)
    found = [space.decode(row) for row in result.pop.get("X").astype(np.int64)]
    return [subnet for subnet in found if keeps_attention(subnet)]


def keeps_attention(subnet: Subnet) -> bool:
    """Whether it is a candidate at all: runtimes expect a KV cache."""
    return any(layer.num_key_value_heads for layer in subnet.layers)


def choose_batch(predicted: Floats, known: Floats, reference: Floats, count: int) -> list[int]:
    """Indices of `count` candidates, each adding the most hypervolume to what is known and chosen before it.

    `predicted` [n, 2], `known` [m, 2] and `reference` [2] are on the same scale. Candidates that add none come last,
    the most distant from what is chosen first.
    """
    if not len(predicted):
        return []
    front = known[pareto_front(known)] if len(known) else known.reshape(0, 2)
    scale = np.maximum(np.ptp(predicted, axis=0), 1e-9)
    chosen: list[int] = []
    while len(chosen) < min(count, len(predicted)):
        rest = [i for i in range(len(predicted)) if i not in chosen]
        base = hypervolume(front, reference)
        gains = [hypervolume(np.vstack([front, predicted[i]]), reference) - base for i in rest]
        if max(gains) > 0:
            best = rest[int(np.argmax(gains))]
        else:
            others = np.vstack([front, predicted[chosen]])
            distances = [np.abs((others - predicted[i]) / scale).sum(axis=1).min(initial=np.inf) for i in rest]
            best = rest[int(np.argmax(distances))]
        chosen.append(best)
        front = np.vstack([front, predicted[best]])
        front = front[pareto_front(front)]
    return chosen


class ShiftCapacity(Mutation):  # type: ignore[misc]
    """Moves a step of size, or bits, from one layer to another, which keeps the cost, or changes one gene by a step."""

    def __init__(
        self,
        gene_sizes: Genes,
        genes_per_layer: int = 2,
        shift_probability: float = 0.7,
        bits_probability: float = 0.02,
    ) -> None:
        super().__init__(prob=1.0)
        self.gene_sizes = gene_sizes
        self.genes_per_layer = genes_per_layer
        self.shift_probability = shift_probability
        self.bits_probability = bits_probability

    def _do(self, problem: Problem, X: Genes, *args: Any, random_state: np.random.Generator, **kwargs: Any) -> Genes:
        changed = X.astype(np.int64).copy()
        layers = (X.shape[1] - 1) // self.genes_per_layer
        for row in changed:
            for _ in range(1 + int(random_state.integers(3))):
                kind = int(random_state.integers(self.genes_per_layer))
                first, second = self.genes_per_layer * random_state.permutation(layers)[:2] + kind
                step = 1 if random_state.random() < 0.5 else -1
                self._move(row, first, step)
                if random_state.random() < self.shift_probability:
                    self._move(row, second, -step)
            if random_state.random() < self.bits_probability:
                row[-1] = random_state.integers(self.gene_sizes[-1])
        return changed

    def _move(self, row: Genes, gene: int, step: int) -> None:
        row[gene] = np.clip(row[gene] + step, 0, self.gene_sizes[gene] - 1)


class ChangeShared(Mutation):  # type: ignore[misc]
    """Where layers are alike: a step of the size that they share, a layer skipped or kept again, or one for another."""

    def __init__(self, gene_sizes: Genes, bits_probability: float = 0.02) -> None:
        super().__init__(prob=1.0)
        self.gene_sizes = gene_sizes
        self.bits_probability = bits_probability

    def _do(self, problem: Problem, X: Genes, *args: Any, random_state: np.random.Generator, **kwargs: Any) -> Genes:
        changed = X.astype(np.int64)
        for row in changed:
            layers = row[:-1].reshape(-1, 2)
            kept = layers.all(axis=1)
            size = np.rint(layers[kept].mean(axis=0)).astype(np.int64) if kept.any() else np.ones(2, np.int64)
            if random_state.random() < 0.5:
                part = int(random_state.integers(2))
                step = 1 if random_state.random() < 0.5 else -1
                size[part] = np.clip(size[part] + step, 1, self.gene_sizes[part] - 1)
            for group in (np.flatnonzero(kept), np.flatnonzero(~kept)):
                if len(group) and random_state.random() < 0.5:
                    kept[random_state.choice(group)] ^= True
            layers[:] = np.outer(kept, size)
            if random_state.random() < self.bits_probability:
                row[-1] = random_state.integers(self.gene_sizes[-1])
        return changed


class _Surrogate(Problem):  # type: ignore[misc]
    def __init__(self, space: SearchSpace, objectives: Objectives) -> None:
        super().__init__(n_var=len(space.gene_sizes), n_obj=2, n_ieq_constr=1, xl=0, xu=space.gene_sizes - 1, vtype=int)
        self.space = space
        self.objectives = objectives

    def _evaluate(self, x: Genes, out: dict[str, Floats], *args: Any, **kwargs: Any) -> None:
        genes = x.astype(np.int64)
        subnets = [self.space.decode(row) for row in genes]
        out["F"] = self.objectives(subnets)
        out["G"] = np.array([[0.0 if keeps_attention(subnet) else 1.0] for subnet in subnets])
