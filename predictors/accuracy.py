"""Quality of a subnet, as KL to the full model, learned from trials on top of an additive estimate.

    log KL  =  a + b log(additive)  +  shrinkage * trees(features, log additive)

`additive` is the sum of single-block KLs, a strong estimate by itself (rank correlation 0.96 to 0.99 on SmolLM2), so a
and b are robust, and the trees join only as far as held-out trials show that they help. Any other loss that grows with
the KL may stand in its place, such as that of a task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.boosting import ResidualBoost, fit_residual_boost
from predictors.intervals import assign_folds, log_interval
from predictors.metrics import FloatArray, spearman

#: Fewer trials than this calibrate nothing: the additive estimate stands as it is.
MINIMUM_TRIALS = 8
#: In nats. A smaller KL is rounding, and the full model's own is 0, which has no logarithm.
KL_FLOOR = 1e-4

_OUTER_FOLDS = 5
#: So many that what is left where a fold is held out is calibrated: of folds on different scales no ranking could tell.
MINIMUM_JUDGED_TRIALS = 10


@dataclass(frozen=True)
class QualityPrediction:
    """One entry a subnet: the expected KL to the full model, in nats a token, and its interval."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True)
class QualityReport:
    """Rank correlation with the true KL over trials that the fit had not seen, and the additive estimate's own."""

    spearman: float
    additive_spearman: float


@dataclass(frozen=True, eq=False)
class QualityPredictor:
    """Made by `fit`; `intercept` and `slope` are a and b."""

    intercept: float
    slope: float
    boost: ResidualBoost

    @classmethod
    def fit(
        cls, features: npt.ArrayLike, additive_kl: npt.ArrayLike, kl: npt.ArrayLike, seed: int, *, is_kl: bool = True
    ) -> QualityPredictor:
        """features [n, f], say the choice index of each part; additive_kl and kl [n]. No trials at all will do.

        With `is_kl` off, `kl` is another loss, which may grow much less than the KL does.
        """
        X, log_additive = _inputs(features, additive_kl)
        log_kl = _log_kl(kl, "kl")
        if log_kl.shape != log_additive.shape:
            raise ValueError(f"wanted one kl a trial, got {len(log_additive)} trials and {len(log_kl)} values")
        if len(np.unique(X, axis=0)) < MINIMUM_TRIALS:
            errors = log_kl - log_additive
            return cls(0.0, 1.0, ResidualBoost(0.0, None, errors, errors))

        least_slope = 0.5 if is_kl else 0.0  # a KL's slope is near 1 or the data is odd

        def fit_base(train: npt.NDArray[np.bool_]) -> FloatArray:
            intercept, slope = _calibrate(log_additive[train], log_kl[train], least_slope)
            return intercept + slope * log_additive

        return cls(*_calibrate(log_additive, log_kl, least_slope), fit_residual_boost(X, log_kl, fit_base, seed))

    def predict(self, features: npt.ArrayLike, additive_kl: npt.ArrayLike, coverage: float = 0.9) -> QualityPrediction:
        """KL [n] with intervals, symmetric in log space; up to infinity while trials are too few for `coverage`."""
        X, log_additive = _inputs(features, additive_kl)
        value = np.exp(self.intercept + self.slope * log_additive + self.boost.log_correction(X))
        return QualityPrediction(value, *log_interval(value, self.boost.held_out_log_errors, coverage))


def cross_validated(
    features: npt.ArrayLike, additive_kl: npt.ArrayLike, kl: npt.ArrayLike, seed: int, *, is_kl: bool = True
) -> QualityReport:
    """Each fold predicted by a fit, choice of shrinkage included, on the others; from `MINIMUM_JUDGED_TRIALS` on."""
    X, additive, actual = (np.asarray(a, dtype=np.float64) for a in (features, additive_kl, kl))
    if len(actual) < MINIMUM_JUDGED_TRIALS:
        raise ValueError(
            f"cross-validation needs at least {MINIMUM_JUDGED_TRIALS} trials, got {len(actual)}: evaluate more"
        )
    fold = assign_folds(X, _OUTER_FOLDS, seed)
    predicted = np.empty(len(actual))
    for k in range(int(fold.max()) + 1):
        train, held_out = fold != k, fold == k
        fitted = QualityPredictor.fit(X[train], additive[train], actual[train], seed, is_kl=is_kl)
        predicted[held_out] = fitted.predict(X[held_out], additive[held_out]).value
    return QualityReport(spearman(predicted, actual), spearman(additive, actual))


def _calibrate(log_additive: FloatArray, log_kl: FloatArray, least_slope: float) -> tuple[float, float]:
    """(a, b): the Theil-Sen line, b the median slope over all pairs, so that a few odd trials do not turn it."""
    from scipy import stats

    if np.ptp(log_additive) == 0:
        return float(np.median(log_kl - log_additive)), 1.0
    slope = float(np.clip(stats.theilslopes(log_kl, log_additive).slope, least_slope, 2.0))
    return float(np.median(log_kl - slope * log_additive)), slope


def _inputs(features: npt.ArrayLike, additive_kl: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """(columns for the trees [n, f + 1], log additive [n])."""
    X, log_additive = np.asarray(features, dtype=np.float64), _log_kl(additive_kl, "additive_kl")
    if X.ndim != 2 or len(X) != len(log_additive):
        raise ValueError(f"wanted features [n, f] and n additive estimates, got {X.shape} and {log_additive.shape}")
    return np.column_stack([X, log_additive]), log_additive


def _log_kl(kl: npt.ArrayLike, name: str) -> FloatArray:
    values = np.asarray(kl, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a vector of finite numbers: leave failed trials out")
    return np.asarray(np.log(np.maximum(values, KL_FLOOR)), dtype=np.float64)
