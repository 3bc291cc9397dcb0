import numpy as np
import pytest

from nas.pareto import hypervolume, pareto_front


@pytest.mark.parametrize("objectives", [2, 3])
def test_pareto_front_is_the_brute_force_one(objectives: int) -> None:
    points = np.random.default_rng(2).integers(0, 12, (200, objectives))  # coarse, so that points tie and repeat
    expected = {tuple(p) for p in points if not any((q <= p).all() and (q < p).any() for q in points)}
    front = pareto_front(points)
    assert len(front) == len(expected)
    assert {tuple(points[i]) for i in front} == expected
    assert (np.diff(points[front, 0]) >= 0).all()
    assert all((points[:i] != points[i]).any(axis=1).all() for i in front)  # the first of equal points


def test_pareto_front_of_nothing_and_of_nan() -> None:
    assert pareto_front([]).tolist() == []
    with pytest.raises(ValueError, match="without nan"):
        pareto_front([(1.0, float("nan"))])


def test_hypervolume_is_the_area_of_the_staircase() -> None:
    steps = [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    area = (2 - 1) * (6 - 5) + (4 - 2) * (6 - 3) + (7 - 4) * (6 - 1)
    assert hypervolume(steps, (7, 6)) == pytest.approx(area)
    assert hypervolume([*steps, (4.0, 4.0), (2.0, 3.0), (0.0, 6.5), (8.0, 0.0)], (7, 6)) == pytest.approx(area)
    assert hypervolume([(1.0, 2.0, 3.0)], (4, 4, 4)) == pytest.approx(3 * 2 * 1)
    assert hypervolume([], (7, 6)) == 0.0
    with pytest.raises(ValueError, match="reference of 2 objectives"):
        hypervolume(steps, (7, 6, 5))
