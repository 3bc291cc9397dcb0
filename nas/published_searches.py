"""Searches of the literature, to compare `nas.search`'s own with: generators of batches that are sent the batch's KLs.

Each is a function of its seed and of what it is sent, so a search that is run again repeats itself. It ends where it
has nothing left to propose, which only small spaces see.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling

from nas.additive import Latency
from nas.evolution import keeps_attention
from nas.space import SearchSpace
from nas.subnet import PARTS, LayerChoice, Subnet

Floats = NDArray[np.float64]
Batches = Generator[list[Subnet], Sequence[float], None]
Proposes = Callable[[SearchSpace, Latency, int], Batches]

#: A fifth of the 250 evaluations with which LINAS is published.
_POPULATION = 50
#: NSGA-II on LINAS's predictors: 10,000 predictions a round.
_PREDICTED_GENERATIONS = 200
_RIDGE = {"alpha": [0.1, 0.3, 1.0, 3.0, 10.0]}
_SVR = {"C": [1.0, 3.0, 10.0, 30.0, 100.0], "epsilon": [0.0]}


def random_search(space: SearchSpace, latency: Latency, seed: int) -> Batches:
    """Subnets of all sizes, see `SearchSpace.sample`."""
    rng = np.random.default_rng(seed)
    while True:
        yield [_attending(space, space.sample(rng)) for _ in range(_POPULATION)]


def nsga2(space: SearchSpace, latency: Latency, seed: int) -> Batches:
    """NSGA-II (Deb et al. 2002) on true evaluations, from random choices."""
    algorithm = _algorithm(space, seed)
    while (population := algorithm.ask()) is not None:
        subnets = _decoded(space, population)
        kls = yield subnets
        population.set("F", np.column_stack([kls, latency(subnets)]))
        algorithm.tell(infills=population)


def linas(space: SearchSpace, latency: Latency, seed: int) -> Batches:
    """LINAS (Cummings et al. 2022, arXiv 2205.10358): a batch is the population that NSGA-II ends with on a predictor.

    That is the better of ridge and RBF regression by five-fold cross-validation, on one-hot choices of all before.
    """
    batch = _decoded(space, _algorithm(space, seed).ask())
    known: dict[Subnet, float] = {}
    round_ = 0
    while batch:
        kls = yield batch
        round_ += 1
        known |= dict(zip(batch, kls, strict=True))
        predict = _regression(_one_hot(space, list(known)), np.array(list(known.values())))
        algorithm = _algorithm(space, seed + round_)
        for _ in range(_PREDICTED_GENERATIONS):
            if (population := algorithm.ask()) is None:
                break
            subnets = _decoded(space, population)
            population.set("F", np.column_stack([predict(_one_hot(space, subnets)), latency(subnets)]))
            algorithm.tell(infills=population)
        batch = [subnet for subnet in _decoded(space, algorithm.pop) if subnet not in known]


#: By the name that `nas search --algorithm` takes.
PUBLISHED: dict[str, Proposes] = {"random": random_search, "nsga2": nsga2, "linas": linas}


def _algorithm(space: SearchSpace, seed: int) -> Any:
    problem = Problem(n_var=len(space.gene_sizes), n_obj=2, xl=0, xu=space.gene_sizes - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=_POPULATION,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, eta=15, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=0.02, eta=20, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=("n_gen", 10**6), seed=seed)
    return algorithm


def _decoded(space: SearchSpace, population: Any) -> list[Subnet]:
    return [_attending(space, space.decode(row)) for row in population.get("X").astype(np.int64)]


def _attending(space: SearchSpace, subnet: Subnet) -> Subnet:
    """Where no layer attends, the first one does, as little as it can: runtimes expect a KV cache."""
    if keeps_attention(subnet):
        return subnet
    attention, mlp = (space.sizes(part)[1] for part in PARTS)
    width = mlp if space.homogeneous else subnet.layers[0].intermediate_size
    first = LayerChoice.of_sizes(attention, width, mlp_bits=subnet.layers[0].mlp_bits)
    return replace(subnet, layers=(first, *subnet.layers[1:]))


def _one_hot(space: SearchSpace, subnets: Sequence[Subnet]) -> Floats:
    """[n, choices of all genes together]."""
    genes = np.array([space.encode(subnet) for subnet in subnets])
    return np.concatenate([np.eye(size)[genes[:, i]] for i, size in enumerate(space.gene_sizes)], axis=1)


def _regression(X: Floats, kl: Floats) -> Callable[[Floats], Floats]:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    searches = [
        GridSearchCV(model, grid, scoring="neg_mean_absolute_percentage_error", cv=5).fit(X, kl)
        for model, grid in ((Ridge(), _RIDGE), (SVR(), _SVR))
    ]
    best = max(searches, key=lambda search: search.best_score_)
    return lambda features: np.asarray(best.predict(features), dtype=np.float64)
