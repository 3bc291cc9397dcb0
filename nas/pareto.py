"""Pareto fronts and their hypervolume; lower is better in every objective. N points, M objectives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pareto_front(points: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Indices of the points [N, M] that no other one equals or beats throughout, ascending in the first objective.

    Of equal points only the first is kept.
    """
    values = _points(points)
    order = np.lexsort(values.T[::-1])
    front: list[int] = []
    for index in order:  # in this order a point can only be beaten by one before it
        if not (values[front] <= values[index]).all(axis=1).any():
            front.append(int(index))
    return np.array(front, dtype=np.int64)


def hypervolume(points: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """The volume that the points [N, M] dominate below `reference` [M]; points beyond it add nothing."""
    from pymoo.indicators.hv import HV

    values, corner = _points(points), np.asarray(reference, dtype=np.float64)
    if len(values) and corner.shape != values.shape[1:]:
        raise ValueError(f"wanted a reference of {values.shape[1]} objectives, got shape {corner.shape}")
    inside = values[(values < corner).all(axis=1)] if len(values) else values
    return float(HV(ref_point=corner)(inside)) if len(inside) else 0.0


def _points(points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return values.reshape(0, values.shape[1] if values.ndim == 2 else 1)
    if values.ndim != 2 or np.isnan(values).any():
        raise ValueError(f"wanted points [N, M] without nan, got shape {values.shape}: {values}")
    return values
