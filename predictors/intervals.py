"""Conformal intervals: how wide a prediction must be, read off errors on samples that the fit had not seen.

With n held-out scores exchangeable with the next one, the ceil((n + 1) c)-th smallest covers the next score with
probability at least c (Lei et al. 2018, https://arxiv.org/abs/1604.04173). Scores here come from K folds, so that all
samples serve both purposes; cross-conformal intervals are proven for 2c - 1 only and cover close to c in practice
(Barber et al. 2021, https://arxiv.org/abs/1905.02928), which the tests measure.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from predictors.metrics import FloatArray


def conformal_quantile(scores: npt.ArrayLike, coverage: float, independent: int | None = None) -> float:
    """The ceil((n + 1) coverage)-th smallest score; infinite while n is too small to promise that (9 serve 90 %).

    Where scores come in groups that err alike, `independent` is how many groups there are: the score returned then has
    as large a share of all scores below it as it would have were there one of each.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, got {coverage=}")
    ordered = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    count = ordered.size if independent is None else min(independent, ordered.size)
    rank = math.ceil((count + 1) * coverage - 1e-9)  # 10 * 0.7 is 7.000000000000001 in places
    if rank > count:
        return math.inf
    return float(ordered[-(-rank * ordered.size // count) - 1])


def log_interval(
    value: FloatArray, log_errors: FloatArray, coverage: float, independent: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """(low, high) = value * exp(-+ q), q the conformal quantile of |log actual - log predicted|."""
    quantile = conformal_quantile(np.abs(log_errors), coverage, independent)
    return value * math.exp(-quantile), value * math.exp(quantile)


def assign_folds(X: FloatArray, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold for each row of X [n, f]: random, of equal size, with equal rows in one fold.

    A shape measured twice would otherwise be its own held-out sample. Fewer distinct rows than folds give fewer folds.
    """
    distinct, row_group = np.unique(X, axis=0, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(distinct))
    return np.asarray(shuffled[row_group.ravel()] % min(folds, len(distinct)), dtype=np.int64)
