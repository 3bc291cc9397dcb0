"""Which ranks of a trained super-adapter to keep: the least loss that a few evaluations find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize

from nas.adapters.elastic import Ranks, SuperAdapter
from nas.evolution import choose_batch

Floats = NDArray[np.float64]
Loss = Callable[[Ranks], float]

#: hill-climb: of any size, as LoNAS and Shears search. evolution: of no more parameters than the heuristic ranks have.
RankSearch = Literal["hill-climb", "evolution"]

_BATCH = 4
_POPULATION, _GENERATIONS = 48, 40
#: Variance of a loss that ranks do not explain, over that which one rank does.
_RIDGE = 0.1
#: Of the additive estimate, scaled to 1 at the smallest ranks, in units of one rank's share of the largest.
_ESTIMATE_WEIGHT = 100.0


def hill_climb(adapter: SuperAdapter, loss: Loss, evaluations: int, seed: int = 0) -> tuple[Ranks, float]:
    """The best ranks found by single changes to a neighbouring choice, from the heuristic ones.

    At most `evaluations` calls of `loss`, the start's among them; neighbours are tried in random order and the first
    that is better is moved to. Stops early where none is.
    """
    rng = np.random.default_rng(seed)
    best, best_loss = adapter.heuristic, loss(adapter.heuristic)
    left = evaluations - 1
    while left > 0:
        for neighbour in _neighbours(adapter, best, rng)[:left]:
            left -= 1
            found = loss(neighbour)
            if found < best_loss:
                best, best_loss = neighbour, found
                break
        else:
            break
    return best, best_loss


def evolve(adapter: SuperAdapter, loss: Loss, evaluations: int, seed: int = 0) -> tuple[Ranks, float]:
    """The best ranks found, of no more parameters than the heuristic ones have, from which it begins.

    As `nas.search` goes about it. An additive estimate, the energy that lower ranks cut off, gives a first answer; a
    quarter of the `evaluations` calls of `loss` goes to random ranks of the same size; then each batch is what promises
    the most of the front of loss and parameters to NSGA-II on a regression of the losses so far on that estimate and
    the ranks. Ends early where nothing new is proposed.
    """
    rng, energy = np.random.default_rng(seed), _energy_cut_off(adapter)
    losses: dict[Ranks, float] = {}

    def evaluate(candidates: Sequence[Ranks]) -> None:
        for ranks in candidates:
            if ranks not in losses and len(losses) < evaluations:
                losses[ranks] = loss(ranks)

    evaluate([adapter.heuristic, _least_energy_cut_off(adapter, energy)])
    evaluate([_of_heuristic_size(adapter, rng) for _ in range(evaluations // 4)])
    while len(losses) < evaluations:
        proposed = _proposed(adapter, energy, losses, int(rng.integers(2**31)))
        if not proposed:
            break
        evaluate(proposed)
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


def _energy_cut_off(adapter: SuperAdapter) -> Floats:
    """Of each group at each choice, [groups, choices]: what the product B A loses, as squared Frobenius norm."""
    found = np.zeros((len(adapter.groups), len(adapter.choices)))
    for group, paths in enumerate(adapter.groups):
        for path in paths:
            A, B = (matrix.detach().double().cpu() for matrix in adapter.layers[path].matrices())
            products = (A @ A.T) * (B.T @ B)
            found[group] += [float(products[rank:, rank:].sum()) for rank in adapter.choices]
    return found


def _least_energy_cut_off(adapter: SuperAdapter, energy: Floats) -> Ranks:
    """The additive estimate's ranks of the heuristic's size, by a Lagrange multiplier on parameters."""
    parameters = np.outer(adapter.parameters_per_rank, adapter.choices)
    most, low, high = adapter.parameters(adapter.heuristic), 0.0, float(energy.max()) + 1e-12
    best = adapter.minimal
    for _ in range(60):
        price = (low + high) / 2
        chosen = (energy + price * parameters).argmin(axis=1)
        ranks = tuple(adapter.choices[choice] for choice in chosen)
        if adapter.parameters(ranks) > most:
            low = price
        else:
            high, best = price, ranks
    return best


def _neighbours(adapter: SuperAdapter, ranks: Ranks, rng: np.random.Generator) -> list[Ranks]:
    found = []
    for group, rank in enumerate(ranks):
        at = adapter.choices.index(rank)
        for near in (at - 1, at + 1):
            if 0 <= near < len(adapter.choices):
                found.append((*ranks[:group], adapter.choices[near], *ranks[group + 1 :]))
    return [found[i] for i in rng.permutation(len(found))]


def _of_heuristic_size(adapter: SuperAdapter, rng: np.random.Generator) -> Ranks:
    """Random ranks, made smaller at random until they fit, and then larger where they still do."""
    most = adapter.parameters(adapter.heuristic)
    genes = rng.integers(len(adapter.choices), size=len(adapter.groups))

    def ranks() -> Ranks:
        return tuple(adapter.choices[gene] for gene in genes)

    while adapter.parameters(ranks()) > most:
        genes[rng.choice(np.flatnonzero(genes + 1 < len(adapter.choices)))] += 1
    for group in rng.permutation(len(genes)):
        while genes[group] > 0:
            genes[group] -= 1
            if adapter.parameters(ranks()) > most:
                genes[group] += 1
                break
    return ranks()


def _proposed(adapter: SuperAdapter, energy: Floats, losses: dict[Ranks, float], seed: int) -> list[Ranks]:
    """A batch of ranks that have no loss yet."""
    problem = _Surrogate(adapter, energy, losses)
    algorithm = NSGA2(
        pop_size=_POPULATION,
        sampling=problem.genes(sorted(losses, key=losses.__getitem__)),
        crossover=UniformCrossover(prob=0.9),
        mutation=PM(prob=1.0, prob_var=2 / problem.n_var, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    result = minimize(problem, algorithm, ("n_gen", _GENERATIONS), seed=seed)
    found = [tuple(adapter.choices[gene] for gene in row) for row in result.pop.get("X").astype(np.int64)]
    most = adapter.parameters(adapter.heuristic)
    new = [ranks for ranks in dict.fromkeys(found) if ranks not in losses and adapter.parameters(ranks) <= most]
    if not new:
        return []
    known = problem.objectives(problem.genes(losses))
    chosen = choose_batch(problem.objectives(problem.genes(new)), known, known.max(axis=0) * 1.01, _BATCH)
    return [new[i] for i in chosen]


class _Surrogate(Problem):  # type: ignore[misc]
    """Predicted loss, and parameters no more than the heuristic's; one gene a group, the index of its rank."""

    def __init__(self, adapter: SuperAdapter, energy: Floats, losses: dict[Ranks, float]) -> None:
        most = len(adapter.choices) - 1
        super().__init__(n_var=len(adapter.groups), n_obj=2, n_ieq_constr=1, xl=0, xu=most, vtype=int)
        self.adapter = adapter
        self.energy = energy / (energy.sum(axis=0).max() or 1.0)
        values, features = np.array(list(losses.values())), self._features(self.genes(losses))
        self.mean, self.origin = values.mean(), features.mean(axis=0)
        features = features - self.origin
        gram = features @ features.T + _RIDGE * np.eye(len(features))
        self.slopes = features.T @ np.linalg.solve(gram, values - self.mean)

    def genes(self, ranks: Iterable[Ranks]) -> NDArray[np.int64]:
        """[n, groups]"""
        return np.array([[self.adapter.choices.index(rank) for rank in row] for row in ranks], dtype=np.int64)

    def objectives(self, genes: NDArray[np.int64]) -> Floats:
        """[n, 2]"""
        predicted = self.mean + (self._features(genes) - self.origin) @ self.slopes
        return np.column_stack([predicted, np.array(self.adapter.choices)[genes] @ self.adapter.parameters_per_rank])

    def _features(self, genes: NDArray[np.int64]) -> Floats:
        """The estimate, which explains more than any one rank, and the ranks in shares of the largest."""
        estimate = self.energy[np.arange(len(self.energy)), genes].sum(axis=1)
        choices = np.array(self.adapter.choices, dtype=np.float64)
        return np.column_stack([_ESTIMATE_WEIGHT * estimate, choices[genes] / choices[0]])

    def _evaluate(self, x: Any, out: dict[str, Floats], *args: Any, **kwargs: Any) -> None:
        out["F"] = self.objectives(np.rint(x).astype(np.int64))
        out["G"] = out["F"][:, 1:] - self.adapter.parameters(self.adapter.heuristic)
