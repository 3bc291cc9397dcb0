import numpy as np
import pytest

from predictors.accuracy import KL_FLOOR, QualityPredictor, cross_validated
from predictors.metrics import coverage, mape, spearman

PARTS = 60


def trials(count: int, seed: int, interaction: float = 0.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choices of 60 parts, their summed scores, and a KL in which pairs of parts cut together cost extra."""
    fixed, generator = np.random.default_rng(7), np.random.default_rng(seed)
    worst_kl, share = np.exp(fixed.normal(-4, 1, PARTS)), np.array([0, 0.02, 0.1, 0.3, 1.0])
    pairs = fixed.choice(PARTS, (6, 2))
    X = np.stack([generator.choice(5, PARTS, p=generator.dirichlet([8, 2, 2, 2, 1])) for _ in range(count)])
    additive = (worst_kl * share[X]).sum(axis=1)
    cut = X >= 3
    together = (cut[:, pairs[:, 0]] & cut[:, pairs[:, 1]]).sum(axis=1) + 2 * cut.mean(axis=1) + cut[:, 3]
    return X, additive, additive * np.exp(interaction * together + 0.05 * generator.standard_normal(count))


@pytest.mark.parametrize("interaction", [0.0, 0.4])
@pytest.mark.parametrize("count", [3, 8, 15, 40])
def test_few_trials_rank_about_as_well_as_additive(count, interaction) -> None:
    X, additive, kl = trials(300, 1000, interaction)
    for seed in range(3):
        predicted = QualityPredictor.fit(*trials(count, seed, interaction), seed).predict(X, additive)
        assert spearman(predicted.value, kl) >= spearman(additive, kl) - 0.02


def test_a_hundred_trials_beat_additive() -> None:
    X, additive, kl = trials(300, 1000)
    for seed in range(2):
        predicted = QualityPredictor.fit(*trials(100, seed), seed).predict(X, additive)
        assert spearman(predicted.value, kl) > spearman(additive, kl) + 0.01
        assert mape(predicted.value, kl) < 0.8 * mape(additive, kl)


def test_without_trials_the_additive_estimate_stands_with_no_promise() -> None:
    X, additive, _ = trials(5, 0)
    predicted = QualityPredictor.fit(X[:0], additive[:0], [], seed=0).predict(X, additive)
    np.testing.assert_allclose(predicted.value, additive)
    assert (predicted.low == 0).all()
    assert np.isinf(predicted.high).all()


def test_one_trial_repeated_calibrates_nothing() -> None:
    X, additive, kl = trials(1, 0)
    fitted = QualityPredictor.fit(np.repeat(X, 12, 0), np.repeat(additive, 12), np.repeat(kl, 12), seed=0)
    assert (fitted.intercept, fitted.slope, fitted.boost.shrinkage) == (0.0, 1.0, 0.0)


def test_calibration_is_robust() -> None:
    """kl = 2 additive^1.2, but for two trials of twelve that are off a hundredfold."""
    additive = np.geomspace(0.01, 1, 12)
    kl = 2 * additive**1.2
    kl[[3, 10]] *= [100, 0.01]
    fitted = QualityPredictor.fit(np.arange(12)[:, None], additive, kl, seed=0)
    assert (np.exp(fitted.intercept), fitted.slope) == (pytest.approx(2, rel=0.1), pytest.approx(1.2, rel=0.1))


def test_equal_additive_estimates_calibrate_the_level_alone() -> None:
    fitted = QualityPredictor.fit(np.arange(12)[:, None], np.full(12, 0.1), np.full(12, 0.3), seed=0)
    assert (fitted.intercept, fitted.slope) == (pytest.approx(np.log(3)), 1.0)


def test_intervals_hold_what_they_promise() -> None:
    X, additive, kl = trials(300, 1000)
    found = []
    for seed in range(10):
        predicted = QualityPredictor.fit(*trials(30, seed), seed).predict(X, additive)
        found.append(coverage(predicted.low, predicted.high, kl))
    assert 0.83 < np.mean(found) < 0.97


def test_cross_validation_tells_learned_from_additive() -> None:
    X, additive, kl = trials(100, 0)
    report = cross_validated(X, additive, kl, seed=0)
    assert report.additive_spearman == spearman(additive, kl)
    assert 1 > report.spearman > report.additive_spearman
    shuffled = cross_validated(X, additive, np.random.default_rng(0).permutation(kl), seed=0)
    assert abs(shuffled.spearman) < 0.4  # no trial is predicted by a fit that saw it


def test_the_same_seed_gives_the_same_predictor() -> None:
    X, additive, _ = trials(20, 5)
    one, other = (QualityPredictor.fit(*trials(100, 0), seed=3) for _ in range(2))
    assert one.boost.shrinkage > 0
    np.testing.assert_array_equal(one.predict(X, additive).value, other.predict(X, additive).value)


def test_the_full_model_has_a_kl_of_zero() -> None:
    X, additive, kl = trials(30, 0)
    additive[0] = kl[0] = 0.0
    predicted = QualityPredictor.fit(X, additive, kl, seed=0).predict(X[:1], [0.0])
    assert predicted.value[0] < 100 * KL_FLOOR


def test_bad_trials_are_refused() -> None:
    X, additive, kl = trials(10, 0)
    with pytest.raises(ValueError, match="kl must be a vector of finite numbers"):
        QualityPredictor.fit(X, additive, np.where(kl > kl.min(), kl, np.nan), seed=0)
    with pytest.raises(ValueError, match="one kl a trial"):
        QualityPredictor.fit(X, additive, kl[:-1], seed=0)
    with pytest.raises(ValueError, match="n additive estimates"):
        QualityPredictor.fit(X, additive[:-1], kl, seed=0)
    with pytest.raises(ValueError, match="at least 10 trials, got 9"):
        cross_validated(X[:9], additive[:9], kl[:9], seed=0)
