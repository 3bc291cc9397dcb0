import math

import numpy as np
import pytest

from predictors.intervals import assign_folds, conformal_quantile, log_interval


@pytest.mark.parametrize(
    ("samples", "coverage", "rank"),
    [(9, 0.9, 9), (19, 0.9, 18), (20, 0.9, 19), (100, 0.9, 91), (9, 0.5, 5), (9, 0.7, 7)],
)
def test_quantile_is_the_corrected_order_statistic(samples: int, coverage: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, samples + 1))
    assert conformal_quantile(scores, coverage) == rank


def test_too_few_scores_promise_nothing() -> None:
    assert conformal_quantile([1.0] * 8, 0.9) == math.inf
    assert conformal_quantile([], 0.5) == math.inf


@pytest.mark.parametrize("coverage", [0.0, 1.0, 90.0])
def test_coverage_is_a_fraction(coverage: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_quantile([1.0], coverage)


@pytest.mark.parametrize("samples", [9, 20, 50])
def test_coverage_over_many_draws_is_the_closed_form(samples: int) -> None:
    """Exchangeable continuous scores are covered with probability rank / (n + 1), here with heavy tails."""
    draws = 20_000
    scores = np.random.default_rng(samples).standard_cauchy((draws, samples + 1))
    covered = np.mean([score[-1] <= conformal_quantile(score[:-1], 0.9) for score in scores])
    expected = math.ceil((samples + 1) * 0.9) / (samples + 1)
    assert covered == pytest.approx(expected, abs=4 * math.sqrt(0.09 / draws))


@pytest.mark.parametrize("groups", [9, 20])
def test_scores_that_come_in_groups_count_once(groups: int) -> None:
    """Four of each group, all alike: as many promises as there are groups."""
    distinct = np.random.default_rng(groups).standard_cauchy(groups)
    scores = np.repeat(distinct, 4)
    assert conformal_quantile(scores, 0.9, independent=groups) == conformal_quantile(distinct, 0.9)
    assert conformal_quantile(scores[:32], 0.9, independent=8) == math.inf


def test_interval_is_symmetric_in_log_space_and_blind_to_signs() -> None:
    value = np.array([1.0, 10.0])
    low, high = log_interval(value, np.array([-0.1] * 9 + [0.01] * 10), 0.9)
    np.testing.assert_allclose([value / low, high / value], np.exp(0.1))


def test_interval_without_errors_is_unbounded() -> None:
    low, high = log_interval(np.array([3.0]), np.empty(0), 0.9)
    assert (low[0], high[0]) == (0.0, math.inf)


def test_folds_are_balanced_seeded_and_keep_repeats_together() -> None:
    X = np.repeat(np.random.default_rng(0).standard_normal((23, 2)), 2, axis=0)
    fold = assign_folds(X, 5, seed=3)
    np.testing.assert_array_equal(fold[::2], fold[1::2])
    assert sorted(np.bincount(fold)) == [8, 8, 10, 10, 10]
    np.testing.assert_array_equal(fold, assign_folds(X, 5, seed=3))
    assert (fold != assign_folds(X, 5, seed=4)).any()
    assert set(assign_folds(X[:6], 5, seed=0)) == {0, 1, 2}
