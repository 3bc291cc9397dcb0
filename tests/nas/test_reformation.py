import pytest
import torch

from nas.importance import keep_order, normalise
from nas.reformation import reform


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, 24, generator=g, dtype=torch.float64) @ torch.randn(24, 24, generator=g, dtype=torch.float64)
    X = X * torch.logspace(-2, 1, 24, dtype=torch.float64)
    return torch.randn(7, 24, generator=g, dtype=torch.float64), X


@pytest.mark.parametrize("damping", [1e-9, 1e-2])
def test_equals_least_squares_on_the_activations_themselves(problem, damping):
    W, X = problem
    order = keep_order(W, X.T @ X)
    # damping is a ridge: one extra token per input, of that input alone
    ridge = (X.square().sum(0) * damping).sqrt().diag()
    seen = torch.cat([X, ridge])[:, order]
    wanted = seen @ W[:, order].T
    reformed = reform(W, X.T @ X, order, (1, 5, 16, 23), damping=damping)
    for k, made in reformed.items():
        expected = torch.linalg.lstsq(seen[:, :k], wanted).solution.T
        torch.testing.assert_close(made.weight.double(), expected, rtol=1e-4, atol=1e-5)
        lost = (seen[:, :k] @ expected.T - wanted).square().sum() / wanted.square().sum()
        assert made.error == pytest.approx(float(lost), rel=1e-6)


def test_error_never_rises_with_width_and_full_width_is_the_original(problem):
    W, X = problem
    order = keep_order(W, X.T @ X)
    reformed = reform(W, X.T @ X, order, range(1, 25))
    errors = [reformed[k].error for k in range(1, 25)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert torch.equal(reformed[24].weight, W[:, order].float())


def test_beats_inheriting_the_weights(problem):
    W, X = problem
    H = X.T @ X
    order = keep_order(W, H)
    inherited = W[:, order[12:]]
    C, scale = normalise(H)
    dropped = (C * scale * scale.unsqueeze(1))[order[12:]][:, order[12:]]
    full = (W @ (C * scale * scale.unsqueeze(1)) * W).sum()
    assert reform(W, H, order, (12,))[12].error < float((inherited @ dropped * inherited).sum() / full)


def test_a_redundant_input_costs_nothing():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(100, 6, generator=g, dtype=torch.float64)
    X[:, 5] = X[:, 0] - 2 * X[:, 3]
    W = torch.randn(3, 6, generator=g, dtype=torch.float64)
    made = reform(W, X.T @ X, torch.arange(6), (5,), damping=1e-10)[5]
    assert made.error < 1e-9
    torch.testing.assert_close(X[:, :5] @ made.weight.double().T, X @ W.T, rtol=1e-4, atol=1e-4)
