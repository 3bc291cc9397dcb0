"""LoSA (Huang et al., arXiv 2502.14816): how sparse each layer becomes and what rank its adapter has, round by round.

Shapes: N windows, T tokens each, C channels of the residual stream, n layers. Where the published code and the paper
differ, this does what the paper means, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hw_profiles.profile import Progress
from nas.families import Family, LoadedModel
from nas.sparsity.layerwise import embedded, run

#: How far a layer's sparsity may be from the mean, by the largest mean that it is for. The paper stops at 0.7; beyond,
#: the last row stands, as in the published code.
_DELTAS = ((0.5, 0.01), (0.6, 0.02), (1.0, 0.03))
#: A layer with nothing left passes nothing on.
_MOST_SPARSE = 0.99
#: Of all windows at a time as float64: 64 windows of 64 tokens of 4,096 channels are 134 MB.
_TOKENS_AT_ONCE = 64


def schedule(final: float, rounds: int) -> list[float]:
    """Sparsity after each round t = 1 ... T: final - final (1 - t / T)^3, so that most goes while there is most."""
    if not 0 <= final < 1 or rounds < 1:
        raise ValueError(f"wanted a sparsity from 0 to below 1 and a round at least, got {final} and {rounds}")
    return [final - final * (1 - t / rounds) ** 3 for t in range(1, rounds + 1)]


def redundancy(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """How alike the layers' inputs are, one [N, ...] for each: float64 [n, n], 1 for layers that read the same.

    Linear CKA: <K_i, K_j> / (|K_i| |K_j|) of the Grams K = F F^T, F [N, T C] being centred over the windows. The Grams
    are added up in float64, as centring takes off most of them where few channels dwarf the others. ValueError for
    fewer than two windows, or where a layer reads the same in all of them.
    """
    return _alignment([_gram([x]) for x in inputs])


@torch.no_grad()
def model_redundancy(
    model: Any,
    family: Family,
    windows: torch.Tensor,
    progress: Progress = lambda done, total, what: None,
) -> torch.Tensor:
    """`redundancy` of what `model`'s layers read on token windows [N, T]; one layer's inputs are in memory at a time.

    `model` is a decoder of `family` or what `Supernet.extract` makes of one.
    """
    decoder = LoadedModel(model, None, "", "", family)
    depth = len(decoder.layers)
    batches = embedded(decoder, windows)
    grams: list[torch.Tensor] = []
    for index in range(depth):
        progress(index, depth, f"comparing layer {index}")
        grams.append(_gram(batches))
        if index + 1 < depth:
            batches = run(decoder, index, batches)
    return _alignment(grams)


def _gram(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """K [N, N] of batches [n, T, ...], which are read a few tokens at a time."""
    K = torch.zeros(())
    for start in range(0, batches[0].shape[1], _TOKENS_AT_ONCE):
        F = torch.cat([batch[:, start : start + _TOKENS_AT_ONCE].flatten(1) for batch in batches]).double()
        K = K + F @ F.T
    return K


def _alignment(grams: Sequence[torch.Tensor]) -> torch.Tensor:
    K = torch.stack(list(grams))
    if K.shape[-1] < 2:
        raise ValueError(f"wanted two windows to compare at least, got {K.shape[-1]}; give more text")
    centred = K - K.mean(1, keepdim=True) - K.mean(2, keepdim=True) + K.mean((1, 2), keepdim=True)
    lengths = centred.flatten(1).norm(dim=1)
    if (lengths <= 1e-12 * K.flatten(1).norm(dim=1)).any():
        raise ValueError("wanted windows that differ, got a layer that reads the same in all; give other text")
    unit = centred.flatten(1) / lengths.unsqueeze(1)
    alike: torch.Tensor = unit @ unit.T
    return alike


def layer_sparsities(
    redundancy: torch.Tensor,
    mean: float,
    delta: float | None = None,
    beta: float = 1.0,
    *,
    at_least: Sequence[float] | None = None,
) -> list[float]:
    """Sparsities s_i with mean `mean` that take least of what is important, |s_i - mean| <= delta.

    I_i = exp(-beta p_i / sum(p)), p_i what `redundancy` [n, n] says layer i shares with the others; sum(I_i s_i) is
    least where the layers of the least I have mean + delta and the others mean - delta. The published code solves this
    linear program with SLSQP; sorting does it exactly, and shows that any beta > 0 gives the same. Layers count alike,
    however large they are.

    `at_least` is what each was given in the round before: as masks only grow, a layer that was to be sparser then
    cannot go back, and without this the mean would come out too high. ValueError where it leaves no room, or for sizes
    and ranges that do not fit.
    """
    n = len(redundancy)
    if redundancy.shape != (n, n) or not n or not redundancy.isfinite().all():
        raise ValueError(f"wanted finite redundancies [n, n], got {tuple(redundancy.shape)}; see `redundancy`")
    if not 0 <= mean < 1 or (delta is not None and delta < 0) or beta < 0:
        raise ValueError(f"wanted 0 <= mean < 1, delta and beta of at least 0, got {mean=}, {delta=}, {beta=}")
    floors = [0.0] * n if at_least is None else list(at_least)
    if len(floors) != n:
        raise ValueError(f"wanted what each of {n} layers was given before, got {len(floors)}; give one for each")
    if delta is None:
        delta = next(delta for largest, delta in _DELTAS if mean <= largest)
    sparsities = [max(mean - delta, floor, 0.0) for floor in floors]
    most = min(mean + delta, max(mean, _MOST_SPARSE))
    left = mean * n - sum(sparsities)
    if left < -1e-9:
        raise ValueError(f"wanted layers that leave room for a mean of {mean:g}, got {sum(floors) / n:g}; raise delta")
    shared = redundancy.double().sum(1) - redundancy.diagonal()
    importance = (-beta * shared / shared.sum().clamp_min(1e-30)).exp()
    for i in importance.argsort(stable=True).tolist():
        step = min(max(most - sparsities[i], 0.0), max(left, 0.0))
        sparsities[i] += step
        left -= step
    return sparsities


def block_losses(dense: Iterable[torch.Tensor], sparse: Iterable[torch.Tensor]) -> list[float]:
    """What pruning does to each layer's output: L = 1/C sum over tokens, c of ((D - S) / |D_:c|)^2.

    D and S [tokens, C] are the outputs in the dense and in the pruned model; one pair is read at a time, so generators
    will do. A channel that is always 0 in D has no scale and counts nothing. ValueError where shapes differ.
    """
    losses = []
    for D, S in zip(dense, sparse, strict=True):
        if D.shape != S.shape or D.dim() != 2:
            raise ValueError(f"wanted two outputs [tokens, C], got {tuple(D.shape)} and {tuple(S.shape)}; flatten both")
        energy = D.double().square().sum(0)
        error = (D.double() - S.double()).square().sum(0)
        losses.append(float(torch.where(energy > 0, error / energy, 0).mean()))
    return losses


def reconstruction_ranks(losses: Sequence[float], mean_rank: float, *, most: int = 16) -> list[int]:
    """Ranks from 1 to `most` in proportion to the layers' losses, with sum round(mean_rank n).

    What rounding and the limits leave over is handed out one by one, to the largest losses first, or taken back from
    the smallest; the published code goes round once only and may miss the sum. Its adapters are also made with rank 8,
    so that larger ranks do nothing: adapters for these must be made with rank `most`. ValueError where no ranks have
    that mean, or a loss is negative or no number.
    """
    n = len(losses)
    if not n or not all(math.isfinite(loss) and loss >= 0 for loss in losses):
        raise ValueError(f"wanted losses of at least 0, one for each layer, got {list(losses)}; see `block_losses`")
    if not 1 <= mean_rank <= most:
        raise ValueError(f"wanted a mean rank from 1 to {most}, got {mean_rank}; raise most")
    budget, total = round(mean_rank * n), math.fsum(losses)
    shares = [loss / total if total > 0 else 1 / n for loss in losses]
    ranks = [min(max(round(share * mean_rank * n), 1), most) for share in shares]
    step = 1 if sum(ranks) < budget else -1
    by_loss = sorted(range(n), key=lambda i: -step * losses[i])
    while sum(ranks) != budget:
        for i in by_loss:
            if sum(ranks) != budget and 1 <= ranks[i] + step <= most:
                ranks[i] += step
    return ranks
