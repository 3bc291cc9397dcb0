"""Non-negative least squares for relative errors: costs add up, none is below 0, and budgets are missed in per cent."""

from __future__ import annotations

import numpy as np

from predictors.metrics import FloatArray

#: Penalty on coefficients of columns scaled to unit mean square: it only splits what the samples cannot tell apart.
LEAST_RIDGE = 1e-6


def fit_relative(
    columns: FloatArray,
    y: FloatArray,
    weights: FloatArray,
    towards: FloatArray | None = None,
    ridge: float | FloatArray = LEAST_RIDGE,
) -> FloatArray:
    """b >= 0 minimising mean(w ((x . b - y) / y)^2) + ridge |b - towards|^2, in units that give x / y mean square 1.

    A non-negative least-squares problem on rows x / y. `towards` is 0 by default; `ridge` may be one each.
    """
    from scipy.optimize import nnls

    rows = columns / y[:, None]
    scale = np.sqrt((rows**2).mean(axis=0))
    scale[scale == 0] = 1.0  # a column that is 0 in every sample: the ridge alone decides
    root, penalty = np.sqrt(weights), np.sqrt(np.broadcast_to(ridge, scale.shape) * len(y))
    aim = np.zeros(columns.shape[1]) if towards is None else penalty * towards * scale
    A = np.vstack([rows / scale * root[:, None], np.diag(penalty)])
    solution, _ = nnls(A, np.concatenate([root, aim]))
    return np.asarray(solution / scale, dtype=np.float64)
