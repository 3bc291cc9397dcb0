"""XGBoost on what a base estimate leaves over, in log space, used as far as cross-validation shows it helps.

    log y  ~  log base(x) + shrinkage * trees(x),    shrinkage in {0, 0.25, 0.5, 1}

The trees fit log y - log base with a start of 0, which for squared error is XGBoost with `base_margin = log base`.
A shrinkage of 0 leaves the base alone: on HAT's public data trees on linear residuals did not help at 100 samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from predictors.intervals import assign_folds
from predictors.metrics import FloatArray

if TYPE_CHECKING:
    import xgboost

SHRINKAGES = (0.25, 0.5, 1.0)
FOLDS = 10

#: Shallow trees with few splits: samples are tens, each bought with a measurement. One thread: the same trees anywhere.
_TREES = {
    "objective": "reg:squarederror",
    "base_score": 0.0,
    "tree_method": "hist",
    "max_depth": 2,
    "learning_rate": 0.1,
    "reg_lambda": 1.0,
    "min_child_weight": 2,
    "subsample": 0.8,
    "colsample_bytree": 0.5,
    "nthread": 1,
}
_ROUNDS = 100

#: Training rows -> log of the base estimate for every row, fitted on those rows alone.
BaseFit = Callable[[npt.NDArray[np.bool_]], FloatArray]


@dataclass(frozen=True, eq=False)
class ResidualBoost:
    """Trees with the weight they earned, and the signed errors log y - log prediction on held-out folds."""

    shrinkage: float
    booster: xgboost.Booster | None
    held_out_log_errors: FloatArray
    base_held_out_log_errors: FloatArray

    def log_correction(self, X: FloatArray) -> FloatArray:
        """What to add to the log of the base estimate, [n]."""
        if self.booster is None:
            return np.zeros(len(X))
        return self.shrinkage * _predict(self.booster, X)


def fit_residual_boost(
    X: FloatArray,
    log_target: FloatArray,
    fit_base: BaseFit,
    seed: int,
    weights: FloatArray | None = None,
    together: FloatArray | None = None,
) -> ResidualBoost:
    """Choose the shrinkage by K-fold error, then fit the trees on all rows.

    Rows that are equal in `together` [n, any], by default in X, are held out together.
    Trees are taken on only if the mean gain in |log error| over the base exceeds its own standard error. The errors
    reported are those of the chosen shrinkage, one of four, so they flatter the trees by the little such a choice can.
    """
    fold = assign_folds(X if together is None else together, FOLDS, seed)
    base, trees = np.empty(len(X)), np.empty(len(X))
    for held_out in (fold == k for k in range(int(fold.max()) + 1)):
        train = ~held_out
        log_base = fit_base(train)
        booster = _fit_trees(
            X[train], (log_target - log_base)[train], seed, None if weights is None else weights[train]
        )
        base[held_out], trees[held_out] = log_base[held_out], _predict(booster, X[held_out])

    base_errors = log_target - base
    errors = {shrinkage: base_errors - shrinkage * trees for shrinkage in SHRINKAGES}
    best = min(errors, key=lambda shrinkage: float(np.abs(errors[shrinkage]).mean()))
    gain = np.abs(base_errors) - np.abs(errors[best])
    if gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain)):
        return ResidualBoost(0.0, None, base_errors, base_errors)
    all_rows = np.ones(len(X), dtype=np.bool_)
    booster = _fit_trees(X, log_target - fit_base(all_rows), seed, weights)
    return ResidualBoost(best, booster, errors[best], base_errors)


def _fit_trees(X: FloatArray, residual: FloatArray, seed: int, weights: FloatArray | None) -> xgboost.Booster:
    import xgboost

    rows = xgboost.DMatrix(X, label=residual, weight=weights, nthread=1)
    return xgboost.train({**_TREES, "seed": seed}, rows, num_boost_round=_ROUNDS)


def write_trees(booster: xgboost.Booster) -> str:
    """XGBoost's own JSON."""
    return str(booster.save_raw("json").decode())


def read_trees(text: str) -> xgboost.Booster:
    """What `write_trees` wrote; nothing in it is executed."""
    import xgboost

    return xgboost.Booster({"nthread": 1}, model_file=bytearray(text.encode()))


def _predict(booster: xgboost.Booster, X: FloatArray) -> FloatArray:
    import xgboost

    return np.asarray(booster.predict(xgboost.DMatrix(X, nthread=1)), dtype=np.float64)
