"""How good a prediction is. Errors and fractions are plain ratios: 0.03 is 3 %."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def mape(predicted: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Mean absolute relative error, mean(|predicted - actual| / |actual|)."""
    return float(np.mean(_relative_errors(predicted, actual)))


def within(predicted: npt.ArrayLike, actual: npt.ArrayLike, tolerance: float) -> float:
    """Fraction of predictions off by at most `tolerance` of the actual value; 0.1 gives the field's "+-10 %"."""
    return float(np.mean(_relative_errors(predicted, actual) <= tolerance))


def spearman(predicted: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Rank correlation with ties at their mean rank; nan where either side is constant and has no ranking."""
    from scipy import stats

    left, right = _pair(predicted, actual)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(stats.spearmanr(left, right).statistic)


def coverage(low: npt.ArrayLike, high: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Fraction of actual values inside their interval, ends included."""
    lower, middle = _pair(low, actual)
    upper, _ = _pair(high, actual)
    return float(np.mean((lower <= middle) & (middle <= upper)))


def _relative_errors(predicted: npt.ArrayLike, actual: npt.ArrayLike) -> FloatArray:
    left, right = _pair(predicted, actual)
    if not right.all():
        raise ValueError("a relative error needs actual values other than 0: drop the failed measurements first")
    return np.abs(left - right) / np.abs(right)


def _pair(left: npt.ArrayLike, right: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    one, other = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or one.size == 0:
        raise ValueError(f"wanted two vectors of one length of at least 1, got shapes {one.shape} and {other.shape}")
    return one, other
