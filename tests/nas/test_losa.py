"""LoSA's allocations against linear programming, the definitions written out, and examples worked by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from nas.adapters.elastic import attach
from nas.extraction import extract
from nas.families import LoadedModel
from nas.space import SearchSpace
from nas.sparsity import layerwise, losa, rounds
from nas.sparsity.losa import (
    block_losses,
    layer_sparsities,
    model_redundancy,
    reconstruction_ranks,
    redundancy,
    schedule,
)
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet


@pytest.mark.parametrize("ranks", [[6, 12, 16], [16, 6, 12]])
def test_what_a_round_begins_with_is_the_pruned_model(tiny: Callable[..., LoadedModel], ranks: list[int]) -> None:
    """Whatever the rank was before, and though what the adapter has learned stays in it."""
    loaded = tiny()
    adapter = attach(loaded.model, loaded.family, (16,), alpha=16.0)
    generator = torch.Generator().manual_seed(0)
    for layer in adapter.layers.values():
        for matrix in layer.matrices():
            matrix.data.normal_(std=0.1, generator=generator)
    pruned, masks = {}, {}
    for path, layer in adapter.layers.items():
        masks[path] = torch.rand(layer.merged_weight().shape, generator=generator) < 0.5
        pruned[path] = layer.merged_weight() * masks[path]
    rounds._constrain(adapter, loaded.family, masks, ranks, pruned)
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(layer.merged_weight(), pruned[path])
        assert layer.active_rank == ranks[int(path.split(".")[2])]


def test_the_schedule_is_that_of_the_paper() -> None:
    assert schedule(0.7, 5) == pytest.approx([0.3416, 0.5488, 0.6552, 0.6944, 0.7])
    assert schedule(0.5, 1) == [0.5]
    assert schedule(0.6, 7)[-1] == 0.6


@pytest.mark.parametrize(("final", "rounds"), [(1.0, 5), (-0.1, 5), (0.5, 0), (math.nan, 5)])
def test_schedules_that_cannot_be_are_refused(final: float, rounds: int) -> None:
    with pytest.raises(ValueError, match="from 0 to below 1 and a round at least"):
        schedule(final, rounds)


# redundancy


def _cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """From the definition, HSIC(x, y) = tr(K J L J) with J the centring matrix (Kornblith et al., arXiv 1905.00414)."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    J = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)

    def hsic(K: torch.Tensor, L: torch.Tensor) -> float:
        return float(torch.trace(K @ J @ L @ J))

    K, L = x @ x.T, y @ y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def test_redundancy_is_centred_kernel_alignment() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(12, 5, 8, generator=generator)
    inputs = [shared + noise * torch.randn(12, 5, 8, generator=generator) + 3 for noise in (0.1, 1.0, 3.0)]
    got = redundancy(inputs)
    for i in range(3):
        for j in range(3):
            assert float(got[i, j]) == pytest.approx(_cka(inputs[i], inputs[j]), rel=1e-9)
    assert float(got[0, 2]) < float(got[0, 1]) < 0.9


def test_redundancy_sees_neither_rotation_nor_scale_nor_shift() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 20, generator=generator).double()
    Q = torch.linalg.qr(torch.randn(20, 20, generator=generator).double()).Q
    np.testing.assert_allclose(redundancy([x, 7 * x @ Q + 100]), np.ones((2, 2)), rtol=1e-9)


def test_one_loud_channel_that_never_changes_drowns_nothing() -> None:
    """As the first token's has in every decoder: what it adds to all Grams is 1e10 times what differs."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(8, 4, 6, generator=generator) for _ in range(2))
    loud = torch.zeros(8, 4, 6)
    loud[:, 0, 3] = 2.0**16
    quiet = [value * (loud == 0) for value in (x, y)]
    wanted = redundancy(quiet)
    np.testing.assert_allclose(redundancy([value + loud for value in quiet]), wanted, rtol=1e-4)


@pytest.mark.parametrize("tokens_at_once", [64, 7])
def test_a_models_redundancy_is_that_of_what_its_layers_read(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losa, "_TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(layerwise, "_TOKENS_AT_ONCE", 5 * 32)
    monkeypatch.setattr(layerwise, "fast_dtype", lambda: torch.float32)
    loaded = tiny()
    told: list[tuple[int, int, str]] = []
    got = model_redundancy(loaded.model, loaded.family, windows, progress=lambda *report: told.append(report))
    with torch.no_grad():
        states = loaded.model(windows, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(got, redundancy(states[:3]), rtol=1e-4)
    assert float(got[0, 2]) == pytest.approx(_cka(states[0], states[2]), rel=1e-4)
    assert float(got[0, 2]) < 0.99
    assert told == [(i, 3, f"comparing layer {i}") for i in range(3)]


def test_uneven_layers_are_compared(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> None:
    loaded = tiny()
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.5, 1)))
    supernet.prepare(windows)
    subnet = Subnet((LayerChoice(3, 0), LayerChoice(0, 0), LayerChoice(0, 64)), 32)
    alike = model_redundancy(extract(supernet, subnet), loaded.family, windows)
    assert float(alike[1, 2]) == pytest.approx(1, abs=1e-9)  # the layer between does nothing
    assert float(alike[0, 1]) < 0.999


def test_windows_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two windows to compare at least, got 1"):
        redundancy([torch.ones(1, 4)])
    with pytest.raises(ValueError, match="reads the same in all"):
        redundancy([torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4) / 3])


# sparsity of each layer


def _random_redundancy(layers: int, seed: int) -> torch.Tensor:
    half = torch.rand(layers, layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (half + half.T) / 2


def _programmed(
    alike: torch.Tensor, mean: float, delta: float, beta: float, floors: list[float]
) -> tuple[list[float], list[float]]:
    """The importances, largest 1, and the solution that scipy's solver finds."""
    n = len(alike)
    p = [sum(float(alike[i, j]) for j in range(n) if j != i) for i in range(n)]
    importance = [math.exp(-beta * (share - min(p)) / sum(p)) for share in p]
    bounds = [(max(mean - delta, floor, 0), max(min(mean + delta, 0.99), floor)) for floor in floors]
    solution = linprog(importance, A_eq=np.ones((1, n)), b_eq=[mean * n], bounds=bounds, method="highs")
    assert solution.success
    return importance, list(solution.x)


@pytest.mark.parametrize("beta", [1.0, 100.0])
@pytest.mark.parametrize("layers", [3, 7, 12])
@pytest.mark.parametrize(("mean", "delta"), [(0.5, 0.01), (0.7, 0.03), (0.05, 0.1), (0.95, 0.2)])
def test_sparsities_solve_the_linear_program(layers: int, mean: float, delta: float, beta: float) -> None:
    alike = _random_redundancy(layers, layers)
    importance, wanted = _programmed(alike, mean, delta, beta, [0.0] * layers)
    got = layer_sparsities(alike, mean, delta, beta)
    assert np.dot(importance, got) == pytest.approx(np.dot(importance, wanted), rel=1e-7)
    assert np.mean(got) == pytest.approx(mean, abs=1e-12)
    assert all(max(mean - delta, 0) - 1e-12 <= s <= min(mean + delta, 0.99) + 1e-12 for s in got)
    if beta == 1:  # elsewhere importances differ by less than the solver's tolerance
        assert got == pytest.approx(wanted, abs=1e-7)
    assert len(set(got)) > 1


def test_the_most_redundant_half_is_pruned_more_and_the_middle_one_takes_the_rest() -> None:
    alike = torch.eye(5).double()
    for i, shared in enumerate((0.2, 0.9, 0.4, 0.8, 0.1)):
        alike[i] += shared
    assert layer_sparsities(alike, 0.6) == pytest.approx([0.58, 0.62, 0.6, 0.62, 0.58])


@pytest.mark.parametrize(
    ("mean", "delta"), [(0.3, 0.01), (0.5, 0.01), (0.55, 0.02), (0.6, 0.02), (0.65, 0.03), (0.7, 0.03), (0.9, 0.03)]
)
def test_the_range_grows_with_the_mean(mean: float, delta: float) -> None:
    got = layer_sparsities(_random_redundancy(4, 0), mean)
    assert sorted(got) == pytest.approx([mean - delta] * 2 + [mean + delta] * 2)


@pytest.mark.parametrize("mean", [0.0, 0.005, 0.985, 0.995])
def test_sparsities_stay_from_0_to_below_1(mean: float) -> None:
    got = layer_sparsities(_random_redundancy(6, 1), mean)
    assert all(0 <= s < 1 for s in got)
    assert np.mean(got) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("seed", range(1, 6))
def test_layers_never_go_back_and_the_mean_still_holds(seed: int) -> None:
    """Two rounds that overlap: .6552 + .03 is above .6944 - .03."""
    first = layer_sparsities(_random_redundancy(9, seed), 0.6552)
    alike = _random_redundancy(9, seed + 100)
    assert any(b < a for a, b in zip(first, layer_sparsities(alike, 0.6944), strict=True))
    second = layer_sparsities(alike, 0.6944, at_least=first)
    assert all(b >= a for a, b in zip(first, second, strict=True))
    assert np.mean(second) == pytest.approx(0.6944, abs=1e-12)
    assert second == pytest.approx(_programmed(alike, 0.6944, 0.03, 1.0, first)[1], abs=1e-7)


def test_a_layer_that_is_sparser_than_the_range_stays_and_the_others_make_room() -> None:
    alike, floors = _random_redundancy(10, 3), [0.6] * 4 + [0.9] + [0.6] * 5
    got = layer_sparsities(alike, 0.7, 0.03, at_least=floors)
    assert got == pytest.approx(_programmed(alike, 0.7, 0.03, 1.0, floors)[1], abs=1e-7)
    assert got[4] == 0.9


def test_a_single_layer_has_the_mean() -> None:
    assert layer_sparsities(torch.ones(1, 1), 0.5) == [0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"redundancy": torch.ones(2, 3)}, r"finite redundancies \[n, n\], got \(2, 3\)"),
        ({"redundancy": torch.full((2, 2), math.nan)}, "finite redundancies"),
        ({"redundancy": torch.ones(0, 0)}, r"got \(0, 0\)"),
        ({"mean": 1.0}, "mean=1.0"),
        ({"mean": -0.1}, "mean=-0.1"),
        ({"delta": -0.1}, "delta=-0.1"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"at_least": [0.1]}, "each of 2 layers was given before, got 1"),
        ({"at_least": [0.6, 0.5]}, "leave room for a mean of 0.5, got 0.55"),
    ],
)
def test_allocations_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"redundancy": torch.ones(2, 2), "mean": 0.5} | changed
    with pytest.raises(ValueError, match=message):
        layer_sparsities(**arguments)


# ranks


def test_losses_are_sums_over_single_numbers() -> None:
    generator = torch.Generator().manual_seed(4)
    dense = [torch.randn(7, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1]) for _ in range(2)]
    sparse = [D + 0.1 * torch.randn(7, 3, generator=generator) for D in dense]
    wanted = []
    for D, S in zip(dense, sparse, strict=True):
        total = 0.0
        for c in range(3):
            length = math.sqrt(sum(float(D[t, c]) ** 2 for t in range(7)))
            total += sum(((float(D[t, c]) - float(S[t, c])) / length) ** 2 for t in range(7))
        wanted.append(total / 3)
    assert block_losses(dense, sparse) == pytest.approx(wanted, rel=1e-5)
    assert block_losses((D for D in dense), (D for D in dense)) == [0.0, 0.0]


def test_a_silent_channel_counts_nothing() -> None:
    D = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert block_losses([D], [torch.zeros(2, 2)]) == [0.5]
    assert block_losses([D], [torch.ones(2, 2)]) == [0.0]


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\)"):
        block_losses([torch.ones(2, 3)], [torch.ones(3, 2)])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(2,\)"):
        block_losses([torch.ones(2)], [torch.ones(2)])
    with pytest.raises(ValueError, match="shorter"):
        block_losses([torch.ones(2, 3)] * 2, [torch.ones(2, 3)])


@pytest.mark.parametrize(
    ("losses", "mean_rank", "most", "ranks"),
    [
        ([1, 1, 1, 1], 6, 16, [6, 6, 6, 6]),
        ([1, 2, 3, 2], 8, 16, [4, 8, 12, 8]),  # in proportion
        ([0.9, 0.05, 0.05], 8, 16, [16, 4, 4]),  # 21.6, 1.2, 1.2: six are left over, after the first has all it can
        ([100, 1, 1, 1], 4, 20, [13, 1, 1, 1]),  # 15.5 -> 16, and 0.2 -> 1: three too many, only the first can give
        ([1, 1, 1], 7.4, 16, [8, 7, 7]),  # the sum 22.2 is 22; the first of equals gains
        ([0, 0, 0], 5, 16, [5, 5, 5]),
        ([5, 1], 10, 8, None),
        ([1.4, 1.4, 1.4, 1.8], 2.25, 16, [2, 2, 2, 3]),  # 2.1, 2.1, 2.1, 2.7
        ([1.6, 1.6, 1.6, 1.2], 1.25, 16, [2, 1, 1, 1]),
        ([3, 5, 4], 1, 16, [1, 1, 1]),
        ([3, 5, 4], 16, 16, [16, 16, 16]),
    ],
)
def test_ranks_follow_the_losses(losses: list[float], mean_rank: float, most: int, ranks: list[int] | None) -> None:
    if ranks is None:
        with pytest.raises(ValueError, match="a mean rank from 1 to 8, got 10"):
            reconstruction_ranks(losses, mean_rank, most=most)
    else:
        assert reconstruction_ranks(losses, mean_rank, most=most) == ranks


@pytest.mark.parametrize("seed", range(20))
def test_ranks_keep_the_budget_the_limits_and_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = list(rng.lognormal(0, 2, 24))
    mean_rank = float(rng.uniform(6, 10))
    ranks = reconstruction_ranks(losses, mean_rank)
    assert sum(ranks) == round(mean_rank * 24)
    assert all(1 <= rank <= 16 for rank in ranks)
    in_order = [ranks[i] for i in np.argsort(losses)]
    assert in_order == sorted(in_order)
    assert max(ranks) > 8  # the published adapters stop there


@pytest.mark.parametrize("losses", [[], [1.0, -1.0], [1.0, math.nan], [math.inf]])
def test_losses_that_are_none_are_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="losses of at least 0"):
        reconstruction_ranks(losses, 6)


@pytest.mark.parametrize("mean_rank", [0.5, 17, math.nan])
def test_mean_ranks_out_of_reach_are_refused(mean_rank: float) -> None:
    with pytest.raises(ValueError, match="mean rank from 1 to 16"):
        reconstruction_ranks([1.0, 2.0], mean_rank)
