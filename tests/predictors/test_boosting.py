import numpy as np

from predictors.boosting import fit_residual_boost


def test_noise_leaves_the_base_alone_and_structure_does_not() -> None:
    generator = np.random.default_rng(0)
    X = generator.uniform(size=(60, 4))
    noise = 0.02 * generator.standard_normal(60)
    step = 0.3 * (X[:, 1] > 0.5)

    def flat(train: np.ndarray) -> np.ndarray:
        return np.zeros(len(train))

    without = fit_residual_boost(X, noise, flat, seed=0)
    assert without.shrinkage == 0
    assert without.booster is None
    np.testing.assert_array_equal(without.held_out_log_errors, noise)
    np.testing.assert_array_equal(without.log_correction(X), 0)

    learned = fit_residual_boost(X, step + noise, flat, seed=0)
    assert learned.shrinkage == 1
    assert np.abs(learned.held_out_log_errors).mean() < 0.3 * np.abs(learned.base_held_out_log_errors).mean()
    fresh = generator.uniform(size=(200, 4))
    assert np.abs(learned.log_correction(fresh) - 0.3 * (fresh[:, 1] > 0.5)).mean() < 0.05


def test_held_out_errors_come_from_fits_that_saw_no_such_row() -> None:
    """A base that memorises its rows has no error on them: what is left shows that it was asked about others."""
    X, target = np.arange(20.0)[:, None], np.ones(20)

    def memory(train: np.ndarray) -> np.ndarray:
        return np.where(train, 1.0, 0.0)

    assert (fit_residual_boost(X, target, memory, seed=0).base_held_out_log_errors == 1).all()
