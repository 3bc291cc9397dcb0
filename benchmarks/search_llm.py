"""Search-LLM (Shen et al. 2024, arXiv 2409.17372): masks of inherited weights, evolved, and reformed at the end.

A candidate keeps channels of every MLP, or drops a layer. The paper also drops dimensions of every head; the released
configuration does not, and here that ruins the model (SmolLM2 at 70 % of the attention alone: perplexity 268).

Where it differs from the paper, it is kinder: of thousands of evaluations there are as many as ours has, so generations
are smaller; candidates outside the parameter budget are mended instead of drawn again; random masks that hardly ever
overlap enough are drawn as swaps; a new ratio starts from the best scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from structured_peers import Observed, Pruned, Weights, install, kept_parameters

from nas.importance import normalise
from nas.supernet import Supernet

#: The channels that each MLP keeps, [channels]; none where the layer is dropped.
Mask = NDArray[np.bool_]
Candidate = list[Mask]

#: By removed share, from the paper's space for LLaMA-7B: shares of layers and of each MLP that are kept at least.
SPACES = {0.1: (1.0, 0.6), 0.2: (1.0, 0.4), 0.3: (30 / 32, 0.2), 0.5: (28 / 32, 0.1)}
STEP = 0.05
#: Chances to change a layer's ratio, its mask, its presence: those of the first generation and of the later ones.
FIRST = (0.3, 0.6, 0.0)
LATER = (0.1, 0.3, 0.1)
#: Of a mask, the share that a mutation keeps.
OVERLAP = 0.8
#: Of a generation: parents, mutants, children of two; the others are mutants as in the first generation.
PARENTS, MUTANTS, CHILDREN = 0.1, 0.5, 0.3
GENERATIONS = 5
#: Below the budget, as a share of it, that a candidate may lie.
WINDOW = 0.01
RHO, ITERATIONS, DAMPING = 1.0, 30, 0.1


@dataclass(frozen=True)
class SearchLLM:
    """One search; `fitness` judges the model that is installed, the lower the better."""

    supernet: Supernet
    observed: Observed
    removed: float
    fitness: Callable[[], float]
    evaluations: int
    seed: int

    def run(self) -> Pruned:
        """The best candidate, its output maps reformed."""
        rng = np.random.default_rng(self.seed)
        size = max(4, self.evaluations // GENERATIONS)
        candidates = [self.mended(self.uniform(), rng)]
        candidates += [self.mutant(candidates[0], FIRST, rng) for _ in range(size - 1)]
        judged: list[tuple[float, Candidate]] = []
        left = self.evaluations
        while left:
            for candidate in candidates[:left]:
                install(self.supernet, self.pruned(candidate, reformed=False))
                judged.append((self.fitness(), candidate))
                left -= 1
            judged.sort(key=lambda pair: pair[0])
            parents = [candidate for _, candidate in judged[: max(2, round(PARENTS * size))]]

            def parent(among: Sequence[Candidate] = parents) -> Candidate:
                return among[rng.integers(len(among))]

            mutants, children = round(MUTANTS * size), round(CHILDREN * size)
            candidates = [self.mutant(parent(), LATER, rng) for _ in range(mutants)]
            candidates += [self.child(parent(), parent(), rng) for _ in range(children)]
            candidates += [self.mutant(parent(), FIRST, rng) for _ in range(size - len(candidates))]
        return self.pruned(judged[0][1], reformed=True)

    @property
    def depth(self) -> int:
        return self.supernet.space.depth

    @property
    def channels(self) -> int:
        return self.supernet.full_size("mlp")

    @cached_property
    def weights(self) -> list[Weights]:
        """The whole MLP of each layer."""
        return [self.supernet.part_weights(layer, "mlp", self.channels) for layer in range(self.depth)]

    @cached_property
    def output(self) -> str:
        return f"{self.supernet.output_name('mlp')}.weight"

    @cached_property
    def layer_parameters(self) -> tuple[float, float]:
        """Of an attention, and of one channel."""
        mlp = sum(weight.numel() for weight in self.weights[0].values() if weight.dim() == 2)
        return kept_parameters(self.supernet, [{}] * self.depth) / self.depth - mlp, mlp / self.channels

    def parameters(self, candidate: Candidate) -> float:
        attention, channel = self.layer_parameters
        return float(sum(attention * mask.any() + channel * mask.sum() for mask in candidate))

    @cached_property
    def budget(self) -> float:
        return (1 - self.removed) * self.parameters([np.ones(self.channels, dtype=np.bool_)] * self.depth)

    @cached_property
    def space(self) -> tuple[float, float]:
        return SPACES[min(SPACES, key=lambda removed: abs(removed - self.removed))]

    @cached_property
    def scores(self) -> list[NDArray[np.float64]]:
        """The surgeon's saliency W_ij^2 / [(2 X X^T)^-1]_jj, summed over a channel's rows and column, [channels]."""
        found = []
        for layer, weights in enumerate(self.weights):
            statistics = self.observed.statistics.layer(layer)
            total = torch.zeros(self.channels, dtype=torch.float64)
            for name, weight in weights.items():
                if weight.dim() == 2:
                    is_output = name == self.output
                    C, scale = normalise(statistics.mlp_output if is_output else statistics.mlp_input)
                    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C)).diagonal() / scale.square()
                    total += (weight.double().square() / (inverse / 2)).sum(0 if is_output else 1)
            found.append(total.numpy())
        return found

    def top(self, layer: int, ratio: float, kept_so_far: Mask | None = None) -> Mask:
        """The best scores; those `kept_so_far` before all others."""
        scores = self.scores[layer]
        if kept_so_far is not None:
            scores = scores + kept_so_far * (1 + scores.max())
        mask = np.zeros(self.channels, dtype=np.bool_)
        mask[np.argsort(-scores)[: max(1, round(ratio * self.channels))]] = True
        return mask

    def uniform(self) -> Candidate:
        attention, channel = self.layer_parameters
        ratio = (self.budget / self.depth - attention) / (channel * self.channels)
        return [self.top(layer, ratio) for layer in range(self.depth)]

    def mutant(self, of: Candidate, chances: tuple[float, float, float], rng: np.random.Generator) -> Candidate:
        of_ratio, of_mask, of_depth = chances
        candidate = []
        for layer, mask in enumerate(of):
            new = mask
            if mask.any() and rng.random() < of_ratio:
                new = self.top(layer, rng.choice(np.arange(self.space[1], 1 + 1e-9, STEP)))
            if mask.any() and rng.random() < of_mask:
                new = _swapped(new, rng)
            candidate.append(new)
        if rng.random() < of_depth:
            layer = int(rng.integers(self.depth))
            candidate[layer] = np.zeros_like(candidate[layer]) if candidate[layer].any() else self.top(layer, 1.0)
        return self.mended(candidate, rng)

    def child(self, one: Candidate, other: Candidate, rng: np.random.Generator) -> Candidate:
        return self.mended([a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True)], rng)

    def mended(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Into the window below the budget: layers come back, then MLPs at random change by a step."""
        candidate = list(candidate)
        least_layers, least_ratio = self.space
        while sum(mask.any() for mask in candidate) < round(least_layers * self.depth):
            layer = rng.choice([layer for layer, mask in enumerate(candidate) if not mask.any()])
            candidate[layer] = self.top(layer, 1.0)
        while not (1 - WINDOW) * self.budget <= (now := self.parameters(candidate)) <= self.budget:
            layer = int(rng.integers(self.depth))
            mask = candidate[layer]
            ratio = mask.mean() + (STEP if now < self.budget else -STEP)
            if mask.any() and least_ratio - 1e-9 <= ratio <= 1 + 1e-9:
                candidate[layer] = self.top(layer, ratio, kept_so_far=mask)
        return candidate

    def pruned(self, candidate: Candidate, reformed: bool) -> Pruned:
        """Inherited weights, or with output maps `reformed`."""
        made: Pruned = []
        for layer, mask in enumerate(candidate):
            if not mask.any():
                made.append({"attention": {}, "mlp": {}})
                continue
            kept, weights = torch.from_numpy(mask), dict(self.weights[layer])
            if reformed:
                weights[self.output] = admm(weights[self.output], self.observed.second_moments(layer, "mlp"), kept)
            made.append({"mlp": {name: t[:, kept] if name == self.output else t[kept] for name, t in weights.items()}})
        return made


def admm(W: torch.Tensor, H: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """W [out, in] with the columns not `kept` zero and the others reformed by the paper's iterations.

    On inputs of unit energy and with damping, as the released code has it: the paper's rho = 1 has no scale.
    """
    C, scale = normalise(H, DAMPING)
    start = (W.double() * scale).T
    factor = torch.linalg.cholesky(C + RHO * torch.eye(len(C), dtype=C.dtype))
    wanted = C @ start
    Z, U = start.clone(), torch.zeros_like(start)
    for _ in range(ITERATIONS):
        solved = torch.cholesky_solve(wanted + RHO * (Z - U), factor)
        Z = (solved + U) * kept.unsqueeze(1)
        U += solved - Z
    return (Z.T / scale).float()


def _swapped(mask: Mask, rng: np.random.Generator) -> Mask:
    """Up to 1 - OVERLAP of what it keeps, for others at random."""
    swapped = mask.copy()
    kept, gone = np.flatnonzero(mask), np.flatnonzero(~mask)
    count = min(int(rng.integers(int((1 - OVERLAP) * len(kept)) + 1)), len(gone))
    swapped[rng.permutation(kept)[:count]] = False
    swapped[rng.permutation(gone)[:count]] = True
    return swapped
