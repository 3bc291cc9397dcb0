import math

import numpy as np
import pytest

from predictors.metrics import coverage, mape, spearman, within


def test_mape_and_within_by_hand() -> None:
    predicted, actual = [11.0, 19.0, 42.0], [10.0, 20.0, 40.0]  # off by 10 %, 5 %, 5 %
    assert mape(predicted, actual) == pytest.approx(0.2 / 3)
    assert within(predicted, actual, 0.051) == pytest.approx(2 / 3)
    assert within(predicted, actual, 0.04) == 0.0


def test_relative_errors_use_the_size_of_negative_values() -> None:
    assert mape([-9.0], [-10.0]) == pytest.approx(0.1)


def test_spearman_without_ties_is_the_rank_difference_formula() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.permutation(40), generator.permutation(40)
    closed_form = 1 - 6 * np.sum((left - right) ** 2) / (40 * (40**2 - 1))
    assert spearman(np.exp(left / 10), right) == pytest.approx(closed_form)


def test_spearman_with_ties_is_pearson_of_mean_ranks() -> None:
    ranks = np.corrcoef([1.0, 2.5, 2.5, 4.0], [2.0, 1.0, 3.0, 4.0])[0, 1]
    assert spearman([1, 5, 5, 9], [20, 10, 30, 40]) == pytest.approx(ranks)


def test_spearman_of_a_constant_is_nan_without_a_warning() -> None:
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_coverage_counts_the_ends() -> None:
    assert coverage([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0.5, 1.1]) == 0.75


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_vectors_of_one_length_are_wanted(pair: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="two vectors of one length"):
        spearman(*pair)


def test_a_latency_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="failed measurements"):
        mape([1.0], [0.0])
