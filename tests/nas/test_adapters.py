from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from export.quantize import QuantizedWeight, dequantize, quantize
from nas.adapters.elastic import Ranks, SuperAdapter, attach, rank_groups
from nas.adapters.linear import GridLinear
from nas.adapters.rank_search import evolve, hill_climb
from nas.families import LoadedModel

CHOICES = (8, 4, 2)


def _attached(loaded: LoadedModel, **options: Any) -> SuperAdapter:
    """With B no longer 0, so that the adapter does something."""
    adapter = attach(loaded.model, loaded.family, CHOICES, alpha=12.0, **options)
    generator = torch.Generator().manual_seed(5)
    for layer in adapter.layers.values():
        for matrix in layer.matrices():
            matrix.data.normal_(std=0.1, generator=generator)
    return adapter


@torch.no_grad()
def _logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=windows).logits
    return logits


def test_a_new_adapter_changes_nothing(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> None:
    loaded = tiny()
    wanted = _logits(loaded.model, windows)
    adapter = attach(loaded.model, loaded.family, CHOICES, alpha=12.0)
    assert torch.equal(_logits(adapter.model, windows), wanted)
    trained = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 3


@pytest.mark.parametrize("bias", [False, True])
def test_stock_peft_loads_any_sub_adapter_with_the_same_logits(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, tmp_path: Path, bias: bool
) -> None:
    adapter = _attached(loaded := tiny(bias=bias))
    ranks = adapter.sample(np.random.default_rng(3))
    assert len(set(ranks)) > 1
    adapter.activate(ranks)
    ours = _logits(adapter.model, windows)
    adapter.save(ranks, tmp_path)
    stock = PeftModel.from_pretrained(tiny(bias=bias).model, str(tmp_path))
    found = _logits(stock, windows)
    assert (found - ours).abs().max() < 1e-5
    assert (found - _logits(tiny(bias=bias).model, windows)).abs().max() > 1e-2
    held = sum(p.numel() for name, p in stock.named_parameters() if "lora_" in name)
    assert held == adapter.parameters(ranks)
    assert loaded.model is adapter.model.get_base_model()


def test_ranks_are_shared_by_maps_that_read_the_same(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny()
    assert len(rank_groups(loaded.model, loaded.family)) == 3 * 4
    adapter = attach(loaded.model, loaded.family, CHOICES, alpha=12.0)
    assert (adapter.maximal[0], adapter.heuristic[0], adapter.minimal[0]) == (8, 4, 2)
    by_path = adapter.ranks_by_path((2, *adapter.maximal[1:]))
    assert [by_path[f"model.layers.0.self_attn.{n}_proj"] for n in "qkvo"] == [2, 2, 2, 8]


def test_two_choices_have_the_larger_as_their_middle(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny()
    assert attach(loaded.model, loaded.family, (32, 28), alpha=64.0).heuristic[0] == 32


def test_sparse_bases_stay_sparse(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> None:
    masks = _sparsify(loaded := tiny())
    adapter = _attached(loaded, masks=masks)
    merged = {path: layer.merged_weight() for path, layer in adapter.layers.items()}
    ours = _logits(adapter.model, windows)
    plain = tiny()
    for path, weight in merged.items():
        assert int((weight == 0).sum()) == int((~masks[path]).sum())
        plain.model.get_submodule(path).weight.data = weight
    torch.testing.assert_close(ours, _logits(plain.model, windows), atol=1e-4, rtol=1e-4)


def test_what_is_trained_on_a_grid_is_what_is_merged_onto_it(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor
) -> None:
    masks = _sparsify(loaded := tiny())
    grids = _onto_grid(loaded)
    adapter = _attached(loaded, masks=masks, grids=grids)
    ours = _logits(adapter.model, windows)
    plain = tiny()
    moved = 0
    for path, layer in adapter.layers.items():
        merged = _nearest(layer.merged_weight(), grids[path])
        assert bool((merged[~masks[path]] == 0).all())
        moved += int((merged != dequantize(grids[path])).sum())
        plain.model.get_submodule(path).weight.data = merged
    assert moved > 1000
    torch.testing.assert_close(ours, _logits(plain.model, windows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("masked", "gridded"), [(True, False), (False, True), (True, True)])
def test_gradients_are_those_of_the_dense_product(
    tiny: Callable[..., LoadedModel], masked: bool, gridded: bool
) -> None:
    loaded = tiny()
    masks = _sparsify(loaded) if masked else None
    grids = _onto_grid(loaded) if gridded else None
    adapter = _attached(loaded, masks=masks, grids=grids)
    path = "model.layers.1.mlp.up_proj"
    layer = adapter.layers[path]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weighing = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    (layer(x) * weighing).sum().backward()
    A, B = (matrix.detach().clone().requires_grad_() for matrix in layer.matrices())
    merged = layer.merged_weight() if grids is None else _nearest(layer.merged_weight(), grids[path])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weighing @ merged, atol=1e-4, rtol=1e-4)
    dense = B @ A * (12.0 / 8)
    dense = dense if masks is None else dense * masks[path]
    # straight through the rounding: the gradient of the unrounded product
    ((x.detach() @ dense.T) * weighing).sum().backward()
    for ours, wanted in zip(layer.matrices(), (A, B), strict=True):
        assert ours.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-4, rtol=1e-4)


def test_a_linear_map_on_a_grid_learns(tiny: Callable[..., LoadedModel]) -> None:
    linear = tiny().model.get_submodule("model.layers.0.mlp.up_proj")
    grid = quantize(linear.weight, 4)
    rounded = GridLinear(linear, grid)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rounded(x), x @ _nearest(linear.weight, grid).T)
    rounded.weight.requires_grad_(True)
    rounded(x).sum().backward()
    assert rounded.weight.grad is not None
    torch.testing.assert_close(rounded.weight.grad, x.sum(0).expand(128, 96))


def test_hill_climbing_stops_at_the_best_neighbour(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny()
    adapter = attach(loaded.model, loaded.family, CHOICES, alpha=12.0)
    target = adapter.sample(np.random.default_rng(7))
    asked: list[Ranks] = []

    def distance(ranks: Ranks) -> float:
        asked.append(ranks)
        return float(sum(abs(CHOICES.index(a) - CHOICES.index(b)) for a, b in zip(ranks, target, strict=True)))

    assert hill_climb(adapter, distance, 1000) == (target, 0.0)
    assert asked[0] == adapter.heuristic
    asked.clear()
    found, loss = hill_climb(adapter, distance, 10)
    assert len(asked) == 10
    assert loss == min(map(distance, asked[:10])) == distance(found)


def test_evolution_finds_the_best_ranks_of_no_more_parameters(tiny: Callable[..., LoadedModel]) -> None:
    """Where each group's rank is worth something of its own, dynamic programming over all ranks knows the optimum."""
    loaded = tiny()
    adapter = attach(loaded.model, loaded.family, CHOICES, alpha=12.0)
    rng = np.random.default_rng(11)
    worth = rng.lognormal(size=len(adapter.groups)) * adapter.parameters_per_rank / adapter.parameters_per_rank.max()
    asked: list[Ranks] = []

    def loss(ranks: Ranks) -> float:
        asked.append(ranks)
        return float(10 - np.dot(ranks, worth) / 8)

    most = adapter.parameters(adapter.heuristic)
    reachable = {0: 0.0}  # parameters -> least loss
    for cost, value in zip(adapter.parameters_per_rank, worth, strict=True):
        step: dict[int, float] = {}
        for spent, least in reachable.items():
            for rank in CHOICES:
                at = spent + rank * int(cost)
                if at <= most:
                    step[at] = min(step.get(at, np.inf), least - rank * value / 8)
        reachable = step
    optimum, start = 10 + min(reachable.values()), loss(adapter.heuristic)
    asked.clear()
    found, found_loss = evolve(adapter, loss, 60)
    assert adapter.parameters(found) <= most
    assert len(asked) == len(set(asked)) <= 60
    assert found_loss == loss(found)
    assert (start - found_loss) / (start - optimum) > 0.8
    assert evolve(adapter, loss, 60)[0] == found
    asked.clear()
    assert evolve(adapter, loss, 1) == (adapter.heuristic, start)
    assert len(asked) == 1


@pytest.mark.parametrize("choices", [(), (4, 8), (4, 4), (4, 0)])
def test_odd_ranks_are_refused(tiny: Callable[..., LoadedModel], choices: tuple[int, ...]) -> None:
    loaded = tiny()
    with pytest.raises(ValueError, match="largest first"):
        attach(loaded.model, loaded.family, choices, alpha=12.0)


def _sparsify(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Half of the weights of every projection to 0; their masks."""
    generator = torch.Generator().manual_seed(4)
    masks = {}
    for path in _projections(loaded):
        linear = loaded.model.get_submodule(path)
        masks[path] = torch.rand(linear.weight.shape, generator=generator) > 0.5
        linear.weight.data *= masks[path]
    return masks


def _onto_grid(loaded: LoadedModel) -> dict[str, QuantizedWeight]:
    grids = {path: quantize(loaded.model.get_submodule(path).weight, 4) for path in _projections(loaded)}
    for path, grid in grids.items():
        loaded.model.get_submodule(path).weight = nn.Parameter(dequantize(grid), requires_grad=False)
    return grids


def _projections(loaded: LoadedModel) -> list[str]:
    return [path for group in rank_groups(loaded.model, loaded.family) for path in group]


def _nearest(weight: torch.Tensor, grid: QuantizedWeight) -> torch.Tensor:
    """`weight` at the nearest of -8..7 times the scale of its block."""
    scales = grid.scales.float().repeat_interleave(32, 1)
    return (weight / scales).round().clamp(-8, 7) * scales
