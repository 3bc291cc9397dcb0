import pytest
import torch

from nas.importance import keep_order, normalise


def _problem(inputs, outputs=5, tokens=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) * 0.6 + torch.eye(inputs, dtype=torch.float64)
    X = torch.randn(tokens, inputs, generator=g, dtype=torch.float64) @ mix
    X = X * torch.logspace(-2, 2, inputs, dtype=torch.float64)  # energies eight decades apart
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), X.T @ X


def _loss(W, H, kept):
    """Least-squares error of W x from the inputs `kept`, by normal equations."""
    HW = H @ W.T
    W_k = torch.linalg.solve(H[kept][:, kept], HW[kept])
    return float((W.T * HW).sum() - (W_k * HW[kept]).sum())


@pytest.mark.parametrize("group", [1, 3])
def test_elimination_drops_what_costs_the_least_squares_fit_least(group):
    W, H = _problem(12)
    C, scale = normalise(H, 1e-6)
    damped = C * scale * scale.unsqueeze(1)
    left, dropped = list(range(12 // group)), []
    while left:
        costs = {}
        for g in left:
            kept = [i for other in left if other != g for i in range(other * group, (other + 1) * group)]
            costs[g] = _loss(W, damped, torch.tensor(kept, dtype=torch.int64))
        dropped.append(min(costs, key=costs.__getitem__))
        left.remove(dropped[-1])
    assert keep_order(W, H, group=group, damping=1e-6).tolist() == dropped[::-1]


def test_order_does_not_depend_on_input_scales():
    W, H = _problem(16)
    factors = torch.logspace(0.5, -0.5, 16, dtype=torch.float64)
    rescaled = keep_order(W / factors, H * factors * factors.unsqueeze(1))
    assert keep_order(W, H).tolist() == rescaled.tolist()


def test_inputs_that_never_fire_go_first():
    W, H = _problem(8)
    H[[2, 5]] = 0
    H[:, [2, 5]] = 0
    assert set(keep_order(W, H)[-2:].tolist()) == {2, 5}


def test_chunks_give_a_permutation():
    W, H = _problem(20)
    assert sorted(keep_order(W, H, chunk=6).tolist()) == list(range(20))
