"""Search-LLM (Shen et al. 2024, arXiv 2409.17372): masks of inherited weights, evolved, and reformed at the end.

A candidate keeps channels of every MLP and, of every head, dimensions: those that share a rotary pair go together, and
the heads of a KV group alike, so that the model could be cut to dense matrices. Here the dropped rows and columns of
the attention are zeroed instead, which computes the same with the frequencies and the scale that the model has.

Where it differs from the paper, it is kinder: of thousands of evaluations there are as many as ours has, so generations
are smaller; candidates outside the parameter budget are mended instead of drawn again; random masks that hardly ever
overlap enough are drawn as swaps; a new ratio starts from the best scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from structured_peers import Observed, Pruned, Weights, install

from nas.importance import normalise
from nas.space import PARTS, Part
from nas.supernet import Supernet

Mask = NDArray[np.bool_]
#: Of one layer: pairs of head dimensions kept of each KV group [groups, pairs], channels kept of the MLP [channels].
Masks = dict[Part, Mask]

#: By removed share, from the paper's space for LLaMA-7B: shares of layers, of attention and of MLP kept at least.
SPACES = {0.1: (1.0, 0.9, 0.6), 0.2: (1.0, 0.8, 0.4), 0.3: (30 / 32, 0.3, 0.2), 0.5: (28 / 32, 0.6, 0.1)}
STEPS: dict[Part, float] = {"attention": 0.01, "mlp": 0.05}
#: Chances to change a layer's ratios, its masks, its presence: those of the first generation and of the later ones.
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
        judged: list[tuple[float, list[Masks]]] = []
        left = self.evaluations
        while left:
            for candidate in candidates[:left]:
                install(self.supernet, self.pruned(candidate, reformed=False))
                judged.append((self.fitness(), candidate))
                left -= 1
            judged.sort(key=lambda pair: pair[0])
            parents = [candidate for _, candidate in judged[: max(2, round(PARENTS * size))]]

            def parent(among: list[list[Masks]] = parents) -> list[Masks]:
                return among[rng.integers(len(among))]

            mutants, children = round(MUTANTS * size), round(CHILDREN * size)
            candidates = [self.mutant(parent(), LATER, rng) for _ in range(mutants)]
            candidates += [self.child(parent(), parent(), rng) for _ in range(children)]
            candidates += [self.mutant(parent(), FIRST, rng) for _ in range(size - len(candidates))]
        return self.pruned(judged[0][1], reformed=True)

    @cached_property
    def sizes(self) -> dict[Part, tuple[int, ...]]:
        """Shapes of the masks."""
        groups = self.supernet.full_size("attention")
        return {
            "attention": (groups, self.supernet.loaded.shape.head_dim // 2),
            "mlp": (self.supernet.full_size("mlp"),),
        }

    @cached_property
    def unit_parameters(self) -> dict[Part, float]:
        return {
            part: sum(
                t.numel()
                for t in self.supernet.part_weights(0, part, self.supernet.full_size(part)).values()
                if t.dim() == 2
            )
            / np.prod(self.sizes[part])
            for part in PARTS
        }

    @cached_property
    def budget(self) -> float:
        whole = sum(self.unit_parameters[part] * np.prod(self.sizes[part]) for part in PARTS)
        return float((1 - self.removed) * whole * self.supernet.space.depth)

    def parameters(self, candidate: list[Masks]) -> float:
        return float(sum(masks[part].sum() * self.unit_parameters[part] for masks in candidate for part in PARTS))

    @cached_property
    def scores(self) -> list[dict[Part, NDArray[np.float64]]]:
        """The surgeon's saliency W_ij^2 / [(2 X X^T)^-1]_jj, summed over all that a unit's rows and columns hold."""
        found = []
        for layer in range(self.supernet.space.depth):
            statistics = self.observed.statistics.layer(layer)
            inputs = {"attention": statistics.attention_input, "mlp": statistics.mlp_input}
            outputs = {"attention": statistics.attention_output, "mlp": statistics.mlp_output}
            of_layer: dict[Part, NDArray[np.float64]] = {}
            for part in PARTS:
                total = torch.zeros(self.sizes[part], dtype=torch.float64)
                weights = self.supernet.part_weights(layer, part, self.supernet.full_size(part))
                for name, weight in weights.items():
                    if weight.dim() != 2:
                        continue
                    is_output = name == self.output(part)
                    C, scale = normalise((outputs if is_output else inputs)[part])
                    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C)).diagonal() / scale.square()
                    saliency = weight.double().square() / (inverse / 2)
                    of_units = saliency.sum(0) if is_output else saliency.sum(1)
                    total += self.by_unit(part, of_units)
                of_layer[part] = total.numpy()
            found.append(of_layer)
        return found

    def output(self, part: Part) -> str:
        return f"{self.supernet.output_name(part)}.weight"

    def by_unit(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Sums over the rows or columns of a matrix, one entry each in `values`, that belong to each unit."""
        if part == "mlp":
            return values
        groups, pairs = self.sizes[part]
        return values.view(groups, -1, 2, pairs).sum((1, 2))  # a pair is dimension p and p + half

    def rows(self, part: Part, mask: Mask, count: int) -> torch.Tensor:
        """Which of `count` rows or columns a mask keeps, [count]."""
        kept = torch.from_numpy(mask)
        if part == "mlp":
            return kept
        groups, pairs = self.sizes[part]
        return kept.view(groups, 1, 1, pairs).expand(groups, count // (groups * 2 * pairs), 2, pairs).reshape(count)

    def top(self, layer: int, part: Part, ratio: float) -> Mask:
        """The best scores, of every KV group as many."""
        scores = self.scores[layer][part]
        kept = max(1, round(ratio * scores.shape[-1]))
        best = np.argsort(-scores, axis=-1)[..., :kept]
        mask = np.zeros(scores.shape, dtype=np.bool_)
        np.put_along_axis(mask, best, True, axis=-1)
        return mask

    @cached_property
    def space(self) -> tuple[float, float, float]:
        return SPACES[min(SPACES, key=lambda removed: abs(removed - self.removed))]

    def least(self, part: Part) -> float:
        _, attention, mlp = self.space
        return attention if part == "attention" else mlp

    def uniform(self) -> list[Masks]:
        return [
            {part: self.top(layer, part, max(1 - self.removed, self.least(part))) for part in PARTS}
            for layer in range(self.supernet.space.depth)
        ]

    def mutant(self, of: list[Masks], chances: tuple[float, float, float], rng: np.random.Generator) -> list[Masks]:
        of_ratio, of_mask, of_depth = chances
        candidate = []
        for layer, masks in enumerate(of):
            new = dict(masks)
            for part in PARTS:
                if not masks[part].any():
                    continue
                if rng.random() < of_ratio:
                    steps = np.arange(self.least(part), 1 + 1e-9, STEPS[part])
                    new[part] = self.top(layer, part, rng.choice(steps))
                if rng.random() < of_mask:
                    new[part] = _swapped(new[part], rng)
            candidate.append(new)
        if rng.random() < of_depth:
            layer = int(rng.integers(len(candidate)))
            if candidate[layer]["mlp"].any():
                candidate[layer] = {part: np.zeros(self.sizes[part], dtype=np.bool_) for part in PARTS}
            else:
                candidate[layer] = {part: self.top(layer, part, 1.0) for part in PARTS}
        return self.mended(candidate, rng)

    def child(self, one: list[Masks], other: list[Masks], rng: np.random.Generator) -> list[Masks]:
        return self.mended([dict(a if rng.random() < 0.5 else b) for a, b in zip(one, other, strict=True)], rng)

    def mended(self, candidate: list[Masks], rng: np.random.Generator) -> list[Masks]:
        """Into the window below the budget: layers come back, then MLPs and where they are at their end attentions
        change by a step."""
        least_layers = round(self.space[0] * len(candidate))
        while (dropped := [i for i, masks in enumerate(candidate) if not masks["mlp"].any()]) and len(candidate) - len(
            dropped
        ) < least_layers:
            layer = dropped[rng.integers(len(dropped))]
            candidate[layer] = {part: self.top(layer, part, 1.0) for part in PARTS}
        while not (1 - WINDOW) * self.budget <= (now := self.parameters(candidate)) <= self.budget:
            direction = 1 if now < self.budget else -1
            layer, part = int(rng.integers(len(candidate))), PARTS[int(rng.random() < 0.8)]
            mask = candidate[layer][part]
            ratio = mask.mean() + direction * min(STEPS[part], 1 / 32)
            if mask.any() and self.least(part) - 1e-9 <= ratio <= 1 + 1e-9:
                candidate[layer][part] = self.resized(layer, part, mask, ratio)
        return candidate

    def resized(self, layer: int, part: Part, mask: Mask, ratio: float) -> Mask:
        """The units kept so far first, by score; then the best of the others."""
        scores = self.scores[layer][part] + mask * (1 + self.scores[layer][part].max())
        kept = max(1, round(ratio * scores.shape[-1]))
        resized = np.zeros(mask.shape, dtype=np.bool_)
        np.put_along_axis(resized, np.argsort(-scores, axis=-1)[..., :kept], True, axis=-1)
        return resized

    def pruned(self, candidate: list[Masks], reformed: bool) -> Pruned:
        """Inherited weights, or with output maps `reformed`."""
        made: Pruned = []
        for layer, masks in enumerate(candidate):
            statistics = self.observed.statistics.layer(layer) if reformed else None
            parts: dict[Part, Weights] = {}
            for part in PARTS:
                if not masks[part].any():
                    parts[part] = {}
                    continue
                weights = self.supernet.part_weights(layer, part, self.supernet.full_size(part))
                parts[part] = {}
                for name, weight in weights.items():
                    is_output = name == self.output(part)
                    kept = self.rows(part, masks[part], weight.shape[1] if is_output else weight.shape[0])
                    if is_output and statistics is not None:
                        H = statistics.attention_output if part == "attention" else statistics.mlp_output
                        weight = admm(weight, H, kept)
                    if part == "mlp":
                        parts[part][name] = weight[:, kept] if is_output else weight[kept]
                    else:
                        parts[part][name] = weight * (kept if is_output else kept.unsqueeze(1))
            made.append(parts)
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
    """Up to 1 - OVERLAP of what every row keeps, for others at random."""
    swapped = mask.copy()
    for row in swapped.reshape(-1, swapped.shape[-1]):  # views
        kept, gone = np.flatnonzero(row), np.flatnonzero(~row)
        count = min(int(rng.integers(int((1 - OVERLAP) * len(kept)) + 1)), len(gone))
        row[rng.permutation(kept)[:count]] = False
        row[rng.permutation(gone)[:count]] = True
    return swapped
