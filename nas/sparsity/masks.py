"""Which weights of a linear map to set to zero: Wanda and SparseGPT, anywhere or in N:M patterns.

Shapes: W [out, in] the map, H [in, in] the sum of x x^T over calibration tokens, fp32. Masks are bool [out, in], True
where a weight is kept. Pruning what has been pruned before takes its mask: no weight comes back, and those already gone
count towards the sparsity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

#: (N, M): of every M consecutive inputs of an output N are kept.
Pattern = tuple[int, int]


def parse_pattern(text: str) -> Pattern | None:
    """ "2:4" -> (2, 4), "unstructured" -> None; ValueError for anything else."""
    if text == "unstructured":
        return None
    match = re.fullmatch("([0-9]+):([0-9]+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"wanted a pattern N:M with 0 < N < M, such as 2:4, or 'unstructured', got {text!r}")
    return int(match[1]), int(match[2])


def check_sparsity(sparsity: float, pattern: Pattern | None, inputs: int) -> None:
    """ValueError where maps of so many inputs cannot be pruned so: a pattern has one sparsity only, 1 - N / M."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"wanted a sparsity of at least 0 and below 1, got {sparsity}; 0.5 sets half to zero")
    if pattern is None:
        return
    kept, group = pattern
    if not 0 < kept < group:
        raise ValueError(f"wanted a pattern (N, M) with 0 < N < M, got {pattern}; (2, 4) keeps two of four")
    if abs(sparsity - (1 - kept / group)) > 1e-6:
        raise ValueError(
            f"wanted sparsity {1 - kept / group:g} with the pattern {kept}:{group}, got {sparsity:g}; give that"
        )
    if inputs % group:
        raise ValueError(f"wanted inputs in multiples of {group} for {kept}:{group}, got {inputs}; give no pattern")


def wanda(
    W: torch.Tensor, H: torch.Tensor, sparsity: float, pattern: Pattern | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The mask without the least |W_ij| |X_j|, |X_j| = sqrt(H_jj) (Sun et al., arXiv 2306.11695).

    round(sparsity * in) weights go from every output, or all but N of every M. ValueError where the arguments do not
    fit each other.
    """
    _check(W, H, sparsity, pattern, mask)
    score = W.float().abs() * H.diagonal().clamp_min(0).sqrt()
    if mask is not None:
        score = score.masked_fill(~mask, -1)
    return _without_lowest(score, round(sparsity * W.shape[1]), pattern)


def sparsegpt(
    W: torch.Tensor,
    H: torch.Tensor,
    sparsity: float,
    pattern: Pattern | None = None,
    damping: float = 0.01,
    block: int = 128,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, mask): pruned column by column, later ones making up for it (Frantar and Alistarh, arXiv 2301.00774).

    H^-1 = U^T U, U upper triangular: U_jj^2 is [(H_j:,j:)^-1]_jj, so pruning W_ij costs W_ij^2 / U_jj^2 and what it
    leaves is made up for by w_k -= (W_ij / U_jj) U_jk. Of each `block` of columns the cheapest round(sparsity * out *
    block) go, whatever their output; with a pattern, of each output all but N of a group of M. Both are chosen when
    they are reached, by the weights as updated until then.
    `damping` is the ridge on H, relative to its mean diagonal. ValueError where the arguments do not fit each other.
    """
    _check(W, H, sparsity, pattern, mask)
    if block < 1 or (pattern is not None and block % pattern[1]):
        raise ValueError(f"wanted blocks of whole groups of {pattern[1] if pattern else 1}, got {block}; choose 128")
    U, dead = _inverse_factor(H, damping)
    # [in, out]: a column of W is one run of memory
    left = W.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    kept = torch.ones_like(left, dtype=torch.bool) if mask is None else mask.T.clone()
    inputs = len(left)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            if pattern is None and j == start:
                score = _costs(left, kept, U, dead, slice(start, stop))
                chosen = _without_lowest(score.reshape(1, -1), round(sparsity * score.numel()), None)
                kept[start:stop] = chosen.view_as(score).T
            elif pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                kept[group] = _without_lowest(_costs(left, kept, U, dead, group), 0, pattern).T
            errors[j - start] = left[j].masked_fill(kept[j], 0) / U[j, j]
            left[j + 1 : stop].addr_(U[j, j + 1 : stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return (left * kept).T.contiguous().to(W.dtype), kept.T.contiguous()


def sparsity_of(weights: Iterable[torch.Tensor]) -> float:
    """The share of exact zeros in all of `weights` together; of masks, the share pruned. ValueError for none at all."""
    zeros = total = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        total += weight.numel()
    if not total:
        raise ValueError("wanted weights to count zeros in, got none; name some")
    return zeros / total


def _costs(left: torch.Tensor, kept: torch.Tensor, U: torch.Tensor, dead: torch.Tensor, columns: slice) -> torch.Tensor:
    """W_ij^2 / U_jj^2 [out, columns]: 0 where an input never fires, -1 where a weight is already gone."""
    cost = (left[columns] / U.diagonal()[columns, None]).square()
    return cost.masked_fill(dead[columns, None], 0).masked_fill(~kept[columns], -1).T


def _without_lowest(score: torch.Tensor, dropped: int, pattern: Pattern | None) -> torch.Tensor:
    """False at the `dropped` lowest scores of each row, or at all but N of every M, and wherever a score is negative.

    Sorted rather than compared with a threshold: ties must not change the count.
    """
    rows = score
    if pattern is not None:
        rows, dropped = score.reshape(-1, pattern[1]), pattern[1] - pattern[0]
    lowest = rows.argsort(dim=1, stable=True)[:, :dropped]
    return (rows >= 0).scatter(1, lowest, False).view(score.shape)


def _inverse_factor(H: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """U fp32 [in, in] with U^T U the inverse of damped H, and which inputs never fired, bool [in]."""
    if damping < 0:
        raise ValueError(f"wanted damping of at least 0, got {damping}; 0.01 is usual")
    damped = H.double()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    # dead inputs meet no other one, so any positive number on their diagonal leaves the rest as it is
    damped = damped + (diagonal.mean() * damping + dead.double()).diag()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True).float(), dead
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not list it as public
        raise ValueError(f"wanted positive definite H, got {error}; raise the damping from {damping:g}") from error


def _check(
    W: torch.Tensor, H: torch.Tensor, sparsity: float, pattern: Pattern | None, mask: torch.Tensor | None
) -> None:
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"wanted W [out, in] and H [in, in], got {tuple(W.shape)} and {tuple(H.shape)}; match them")
    check_sparsity(sparsity, pattern, W.shape[1])
    if mask is not None and (mask.shape != W.shape or mask.dtype != torch.bool):
        raise ValueError(f"wanted a bool mask {tuple(W.shape)}, got {mask.dtype} {tuple(mask.shape)}; True is kept")
    if not (W.isfinite().all() and H.isfinite().all()):
        raise ValueError("wanted finite weights and moments, got some that are not; gather the moments in fp32")
