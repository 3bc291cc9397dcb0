"""Wanda and SparseGPT against loops over single weights, on maps and on tiny models."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nas import calibration
from nas.adapters.elastic import attach
from nas.extraction import extract
from nas.families import FAMILIES, LoadedModel
from nas.space import SearchSpace
from nas.sparsity import layerwise
from nas.sparsity.layerwise import prune
from nas.sparsity.masks import Pattern, check_sparsity, parse_pattern, sparsegpt, sparsity_of, wanda
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet

PROJECTIONS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
#: The full layer, one without an MLP and one without attention.
UNEVEN = Subnet((LayerChoice(3, 128), LayerChoice(2, 0), LayerChoice(0, 64)), 32)


@pytest.fixture(autouse=True)
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calibration, layerwise):
        monkeypatch.setattr(module, "fast_dtype", lambda: torch.float32)


def _correlated(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A map W [out, in] and H of inputs that share a few directions and differ in loudness, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, max(2, inputs // 4), generator=generator)
    x = x @ torch.randn(x.shape[1], inputs, generator=generator) + 0.5 * torch.randn(512, inputs, generator=generator)
    x *= torch.rand(inputs, generator=generator) * 3 + 0.1
    return torch.randn(outputs, inputs, generator=generator), x.T @ x


def _output_error(W: torch.Tensor, pruned: torch.Tensor, H: torch.Tensor) -> float:
    difference = (W - pruned).double()
    return float(((difference @ H.double()) * difference).sum())


# maps


@pytest.mark.parametrize(
    ("text", "pattern"), [("2:4", (2, 4)), ("4:8", (4, 8)), ("1:16", (1, 16)), ("unstructured", None)]
)
def test_patterns_are_read(text: str, pattern: Pattern | None) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "4:4", "0:4", "2:4:8", "-2:4", "2 : 4", "two:four", "2:4\n"])
def test_odd_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a pattern N:M"):
        parse_pattern(text)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.3, None), (0.55, None), (0.5, (2, 4)), (0.25, (3, 4))])
def test_wanda_keeps_what_a_loop_over_single_weights_keeps(sparsity: float, pattern: Pattern | None) -> None:
    W, H = _correlated(9, 24)
    wanted = torch.ones(9, 24, dtype=torch.bool)
    size = 24 if pattern is None else pattern[1]
    dropped = round(sparsity * 24) if pattern is None else pattern[1] - pattern[0]
    for i in range(9):
        for start in range(0, 24, size):
            scores = [(abs(float(W[i, j])) * math.sqrt(float(H[j, j])), j) for j in range(start, start + size)]
            for _, j in sorted(scores)[:dropped]:
                wanted[i, j] = False
    got = wanda(W, H, sparsity, pattern)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, wanda(W, torch.eye(24), sparsity, pattern))


def _surgeon(
    W: torch.Tensor, H: torch.Tensor, sparsity: float, pattern: Pattern | None, block: int, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgeon from its definition in float64: before each column, H of those left is inverted anew."""
    W, mask = W.double().clone(), ~gone
    outputs, inputs = W.shape
    H = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(inputs)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(inputs)]
    for j in range(inputs):
        if pattern is None and j % block == 0:
            cells = [(i, k) for i in range(outputs) for k in range(j, min(j + block, inputs))]
            batches, dropped = [cells], round(sparsity * len(cells))
        elif pattern is not None and j % pattern[1] == 0:
            batches = [[(i, k) for k in range(j, j + pattern[1])] for i in range(outputs)]
            dropped = pattern[1] - pattern[0]
        else:
            batches, dropped = [], 0
        for cells in batches:
            cost = {(i, k): -1.0 if gone[i, k] else float(W[i, k] ** 2 / inverses[k][0, 0]) for i, k in cells}
            for i, k in sorted(cells, key=lambda cell: cost[cell])[:dropped]:
                mask[i, k] = False
        for i in range(outputs):
            if not mask[i, j]:
                W[i, j:] -= W[i, j] / inverses[j][0, 0] * inverses[j][:, 0]
                W[i, j] = 0
    return W, mask


@pytest.mark.parametrize("already", [0.0, 0.25])
@pytest.mark.parametrize(
    ("sparsity", "pattern", "block"),
    [(0.5, None, 128), (0.6, None, 8), (0.5, None, 1), (0.5, (2, 4), 128), (0.25, (3, 4), 8), (0.75, (2, 8), 8)],
)
def test_sparsegpt_is_the_surgeon_with_columns_in_order(
    sparsity: float, pattern: Pattern | None, block: int, already: float
) -> None:
    W, H = _correlated(6, 24)
    gone = torch.rand(6, 24, generator=torch.Generator().manual_seed(3)) < already
    wanted, mask = _surgeon(W, H, sparsity, pattern, block, gone)
    got, kept = sparsegpt(W, H, sparsity, pattern, block=block, mask=~gone)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got == 0, ~kept)


def test_one_weight_gone_leaves_the_least_squares_solution() -> None:
    """Against lstsq on inputs: what comes before a pruned column cannot make up for it, all that comes after does."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    W = torch.randn(1, 10, generator=generator)
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, 0] = False
    got, _ = sparsegpt(W, x.T @ x, 0.0, damping=0.0, mask=mask)
    wanted = torch.linalg.lstsq(x[:, 1:].double(), (x @ W.T).double()).solution
    torch.testing.assert_close(got[0, 1:].double(), wanted[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("outputs", [1, 5])
def test_arguments_are_left_alone(outputs: int) -> None:
    W, H = _correlated(outputs, 16)
    mask = wanda(W, H, 0.25)
    before = [tensor.clone() for tensor in (W, H, mask)]
    for method in (wanda, sparsegpt):
        method(W, H, 0.5, mask=mask)
        assert all(torch.equal(a, b) for a, b in zip((W, H, mask), before, strict=True))


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.5, (2, 4))])
def test_sparsegpt_loses_less_than_wanda(sparsity: float, pattern: Pattern | None) -> None:
    W, H = _correlated(40, 160)
    weights, _ = sparsegpt(W, H, sparsity, pattern)
    assert _output_error(W, weights, H) < 0.6 * _output_error(W, W * wanda(W, H, sparsity, pattern), H)


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
def test_zeros_are_counted_exactly(sparsity: float) -> None:
    W, H = _correlated(10, 200)
    assert set((~wanda(W, H, sparsity)).sum(1).tolist()) == {round(sparsity * 200)}
    weights, mask = sparsegpt(W, H, sparsity)
    assert int((~mask[:, :128]).sum()) == round(sparsity * 1280)
    assert int((~mask[:, 128:]).sum()) == round(sparsity * 720)
    assert int((weights == 0).sum()) == int((~mask).sum())
    if not sparsity:
        assert torch.equal(weights, W)


def test_ties_do_not_change_the_count() -> None:
    W, H = torch.ones(4, 16), torch.eye(16)
    assert (~wanda(W, H, 0.5)).sum(1).tolist() == [8] * 4
    assert (~wanda(W, H, 0.5, (2, 4))).reshape(-1, 4).sum(1).tolist() == [2] * 16
    assert int((~sparsegpt(W, H, 0.5)[1]).sum()) == 32


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_every_group_follows_the_pattern(pattern: Pattern) -> None:
    W, H = _correlated(12, 160)
    for mask in (wanda(W, H, 0.5, pattern), sparsegpt(W, H, 0.5, pattern)[1]):
        assert set(mask.reshape(-1, pattern[1]).sum(1).tolist()) == {pattern[0]}


def test_masks_only_grow() -> None:
    """To less than before and to more, of other weights than those that were pruned."""
    W, H = _correlated(12, 64)
    before = wanda(W, H, 0.4)
    W = W + 5 * before
    for sparsity, count in ((0.2, round(0.4 * 64)), (0.6, round(0.6 * 64))):
        mask = wanda(W, H, sparsity, mask=before)
        assert not (mask & ~before).any()
        assert set((~mask).sum(1).tolist()) == {count}
        weights, mask = sparsegpt(W, H, sparsity, mask=before)
        assert not (mask & ~before).any()
        assert int((~mask).sum()) == max(int((~before).sum()), round(sparsity * W.numel()))
        assert torch.equal(weights == 0, ~mask)


def test_a_pattern_takes_what_is_gone_into_account() -> None:
    W, H = _correlated(1, 8)
    before = torch.tensor([[False, True, True, True, False, False, False, True]])
    for mask in (wanda(W, H, 0.5, (2, 4), before), sparsegpt(W, H, 0.5, (2, 4), mask=before)[1]):
        assert int(mask[0, :4].sum()) == 2
        assert mask[0, 4:].tolist() == [False, False, False, True]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_go_first_and_leave_the_rest_as_it_is(damping: float) -> None:
    W, H = _correlated(8, 30)
    dead = [0, 7, 29]
    live = [j for j in range(30) if j not in dead]
    H[dead] = 0
    H[:, dead] = 0
    W[:, dead] *= 100
    assert not wanda(W, H, 0.2)[:, dead].any()
    # the ridge is relative to the mean over all inputs
    weights, mask = sparsegpt(W, H, 0.1, damping=damping * 30 / 27)
    assert not mask[:, dead].any()
    alone, mask_alone = sparsegpt(W[:, live], H[live][:, live], 0.0, damping=damping)
    assert mask_alone.all()
    torch.testing.assert_close(weights[:, live], alone)
    assert weights.isfinite().all()


def test_inputs_that_are_all_dead_break_nothing() -> None:
    W, H = torch.ones(3, 8), torch.zeros(8, 8)
    weights, mask = sparsegpt(W, H, 0.5)
    assert torch.equal(weights, mask.float())
    assert int(mask.sum()) == 12
    assert int(wanda(W, H, 0.5).sum()) == 12


def test_singular_moments_need_damping() -> None:
    W, H = torch.ones(2, 4), torch.ones(4, 4)
    assert sparsegpt(W, H, 0.5)[0].isfinite().all()
    with pytest.raises(ValueError, match="raise the damping"):
        sparsegpt(W, H - 1e-3 * torch.eye(4), 0.5, damping=0.0)


def test_weights_keep_their_dtype() -> None:
    W, H = _correlated(4, 16)
    assert sparsegpt(W.bfloat16(), H, 0.5)[0].dtype == torch.bfloat16


def test_the_share_of_zeros_is_exact() -> None:
    assert sparsity_of([torch.tensor([0.0, 1.0, -0.0, 1e-30]), torch.ones(1, 4)]) == 0.25
    assert sparsity_of([torch.tensor([True, False])]) == 0.5
    with pytest.raises(ValueError, match="got none"):
        sparsity_of([])


@pytest.mark.parametrize(
    ("sparsity", "pattern", "inputs", "message"),
    [
        (-0.1, None, 8, "at least 0 and below 1, got -0.1"),
        (1.0, None, 8, "at least 0 and below 1, got 1.0"),
        (math.nan, None, 8, "at least 0 and below 1, got nan"),
        (0.5, (4, 4), 8, r"0 < N < M, got \(4, 4\)"),
        (0.6, (2, 4), 8, "wanted sparsity 0.5 with the pattern 2:4, got 0.6"),
        (0.5, (2, 4), 10, "inputs in multiples of 4 for 2:4, got 10"),
    ],
)
def test_sparsities_that_cannot_be_are_refused(
    sparsity: float, pattern: Pattern | None, inputs: int, message: str
) -> None:
    W, H = torch.ones(2, inputs), torch.eye(inputs)
    for call in (
        lambda: check_sparsity(sparsity, pattern, inputs),
        lambda: wanda(W, H, sparsity, pattern),
        lambda: sparsegpt(W, H, sparsity, pattern),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W": torch.ones(8)}, r"got \(8,\) and \(8, 8\)"),
        ({"H": torch.eye(9)}, r"got \(2, 8\) and \(9, 9\)"),
        ({"H": torch.eye(8) * math.inf}, "wanted finite"),
        ({"W": torch.full((2, 8), math.nan)}, "wanted finite"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, r"bool mask \(2, 8\), got torch.bool \(2, 9\)"),
        ({"mask": torch.ones(2, 8)}, r"bool mask \(2, 8\), got torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], message: str) -> None:
    arguments: dict[str, Any] = {"W": torch.ones(2, 8), "H": torch.eye(8), "sparsity": 0.5} | changed
    for method in (wanda, sparsegpt):
        with pytest.raises(ValueError, match=message):
            method(**arguments)


def test_blocks_and_damping_that_cannot_be_are_refused() -> None:
    W, H = torch.ones(2, 8), torch.eye(8)
    with pytest.raises(ValueError, match="whole groups of 4, got 6"):
        sparsegpt(W, H, 0.5, (2, 4), block=6)
    with pytest.raises(ValueError, match="got 0"):
        sparsegpt(W, H, 0.5, block=0)
    with pytest.raises(ValueError, match="damping of at least 0, got -1"):
        sparsegpt(W, H, 0.5, damping=-1)


# whole models


@torch.no_grad()
def _read(model: Any, windows: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """What each projection of one layer reads, [tokens, in], in a forward pass of the whole model."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: found.__setitem__(name, x[0].flatten(0, 1)))
        for name, module in model.model.layers[layer].named_modules()
        if name in PROJECTIONS
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def _prune_by_hand(model: Any, windows: torch.Tensor, sparsities: list[float]) -> dict[str, torch.Tensor]:
    """Wanda, the whole model run anew for every layer."""
    masks = {}
    for index, sparsity in enumerate(sparsities):
        for name, x in _read(model, windows, index).items():
            weight = model.model.layers[index].get_submodule(name).weight
            score = weight.abs() * x.norm(dim=0)
            last = score.sort(dim=1).values[:, round(sparsity * weight.shape[1]) - 1]
            masks[f"model.layers.{index}.{name}"] = score > last.unsqueeze(1)
        for name in PROJECTIONS:
            if (mask := masks.get(f"model.layers.{index}.{name}")) is not None:
                model.model.layers[index].get_submodule(name).weight.mul_(mask)
    return masks


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pruned_model_is_that_of_a_loop_over_whole_passes(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_TOKENS_AT_ONCE", 5 * 32)
    sparsities = [0.6, 0.25, 0.5]
    loaded, by_hand = tiny(model_type), tiny(model_type)
    told: list[tuple[int, int, str]] = []
    masks = prune(loaded.model, loaded.family, windows, sparsities, progress=lambda *report: told.append(report))
    wanted = _prune_by_hand(by_hand.model, windows, sparsities)
    assert masks.keys() == wanted.keys()
    assert all(torch.equal(masks[path], wanted[path]) for path in wanted)
    for (name, got), expected in zip(
        loaded.model.state_dict().items(), by_hand.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), name
    assert told == [(i, 3, f"pruning layer {i}") for i in range(3)]


def test_layers_read_what_the_pruned_ones_before_give(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> None:
    """Which matters: with the dense model's statistics the last layer's masks are others."""
    loaded, dense = tiny(), tiny()
    masks = prune(loaded.model, loaded.family, windows, 0.6)
    read, path = _read(dense.model, windows, 2), "model.layers.2.mlp.down_proj"
    x = read["mlp.down_proj"]
    weight = dense.model.get_submodule(path).weight
    assert not torch.equal(masks[path], wanda(weight, x.T @ x, 0.6))


def test_sparsegpt_brings_a_model_closer_to_the_dense_one(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor
) -> None:
    with torch.no_grad():
        wanted = tiny().model(windows).logits
        errors = {}
        for method in ("wanda", "sparsegpt"):
            loaded = tiny()
            prune(loaded.model, loaded.family, windows, 0.3, method=method)
            errors[method] = float((loaded.model(windows).logits - wanted).square().mean())
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]


def test_sparsegpt_prunes_the_first_layer_as_it_does_single_maps(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor
) -> None:
    loaded, dense = tiny(), tiny()
    masks = prune(loaded.model, loaded.family, windows, 0.5, method="sparsegpt")
    for name, x in _read(dense.model, windows, 0).items():
        weights, mask = sparsegpt(dense.layers[0].get_submodule(name).weight, x.T @ x, 0.5)
        assert torch.equal(masks[f"model.layers.0.{name}"], mask)
        torch.testing.assert_close(loaded.layers[0].get_submodule(name).weight.data, weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", layerwise.get_args(layerwise.PruningMethod))
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.5, (2, 4)), (0.75, (2, 8))])
def test_all_projections_and_nothing_else_become_exactly_sparse(
    tiny: Callable[..., LoadedModel],
    windows: torch.Tensor,
    method: layerwise.PruningMethod,
    sparsity: float,
    pattern: Pattern | None,
) -> None:
    loaded, dense = tiny(bias=True), tiny(bias=True)
    masks = prune(loaded.model, loaded.family, windows, sparsity, method=method, pattern=pattern)
    assert masks.keys() == {f"model.layers.{i}.{name}" for i in range(3) for name in PROJECTIONS}
    assert sparsity_of(masks.values()) == sparsity
    before = dense.model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        if (mask := masks.get(name.removesuffix(".weight"))) is None:
            assert torch.equal(weight, before[name])
            continue
        assert torch.equal(weight != 0, mask)
        if pattern is not None:
            assert set(mask.reshape(-1, pattern[1]).sum(1).tolist()) == {pattern[0]}


@pytest.mark.parametrize("method", layerwise.get_args(layerwise.PruningMethod))
def test_what_was_pruned_before_stays_pruned(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, method: layerwise.PruningMethod
) -> None:
    loaded = tiny()
    first = prune(loaded.model, loaded.family, windows, 0.3, method=method)
    with torch.no_grad():  # as a merged adapter that forgot the mask would
        for path in first:
            loaded.model.get_submodule(path).weight.add_(10.0 * ~first[path])
    second = prune(loaded.model, loaded.family, windows, 0.5, method=method, masks=first)
    assert sparsity_of(second.values()) == 0.5
    for path, mask in second.items():
        assert not (mask & ~first[path]).any()
        assert not loaded.model.get_submodule(path).weight[~mask].any()


@pytest.mark.parametrize("method", layerwise.get_args(layerwise.PruningMethod))
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_extracted_model_with_uneven_layers_is_pruned(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, model_type: str, method: layerwise.PruningMethod
) -> None:
    loaded = tiny(model_type)
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.5, 1)))
    supernet.prepare(windows)
    model, by_hand = extract(supernet, UNEVEN), extract(supernet, UNEVEN)
    assert model.config.model_type == "heterogeneous_llama"
    full = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    masks = prune(model, loaded.family, windows, 0.5, method=method)
    parts = [PROJECTIONS, PROJECTIONS[:4], PROJECTIONS[4:]]
    assert list(masks) == [f"model.layers.{i}.{name}" for i, names in enumerate(parts) for name in names]
    assert sparsity_of(model.get_submodule(path).weight for path in masks) == 0.5
    assert all(torch.equal(loaded.model.state_dict()[name], weight) for name, weight in full.items())
    if method == "wanda":
        wanted = _prune_by_hand(by_hand, windows, [0.5] * 3)
        assert all(torch.equal(masks[path], wanted[path]) for path in wanted)


def test_the_active_subnet_of_a_supernet_without_some_parts_is_pruned(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor
) -> None:
    """The parts that it skips are there, but have no projections."""
    loaded = tiny()
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.5, 1)))
    supernet.prepare(windows)
    extracted = prune(extract(supernet, UNEVEN), loaded.family, windows, 0.5)
    supernet.activate(UNEVEN)
    active = prune(loaded.model, loaded.family, windows, 0.5)
    assert active.keys() == extracted.keys()
    assert all(torch.equal(active[path], mask) for path, mask in extracted.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": [0.5, 0.5]}, "a sparsity for each of 3 layers, got 2"),
        ({"sparsity": [0.5, 0.5, -0.5]}, "at least 0 and below 1, got -0.5"),
        ({"method": "magnitude"}, "wanda, sparsegpt, got 'magnitude'"),
        ({"pattern": (2, 4), "sparsity": 0.6}, "0.5 with the pattern 2:4"),
        ({"pattern": (5, 10)}, "multiples of 10 for 5:10, got 96"),
        ({"windows": torch.zeros(0, 32, dtype=torch.long)}, r"windows \[N, T\], got \(0, 32\)"),
        ({"windows": torch.zeros(32, dtype=torch.long)}, r"windows \[N, T\], got \(32,\)"),
        ({"masks": {"model.layers.3.mlp.up_proj": torch.ones(1)}}, "got one for model.layers.3.mlp.up_proj"),
        (
            {"masks": {"model.layers.2.mlp.up_proj": torch.ones(1, 1) > 0}},
            r"bool mask \(128, 96\) for .*got torch.bool",
        ),
        ({"masks": {"model.layers.2.mlp.up_proj": torch.ones(128, 96)}}, r"bool mask \(128, 96\) for .*torch.float32"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(
    tiny: Callable[..., LoadedModel], windows: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    loaded, untouched = tiny(), tiny()
    arguments: dict[str, Any] = {"windows": windows, "sparsity": 0.5} | options
    with pytest.raises(ValueError, match=message):
        prune(loaded.model, loaded.family, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), untouched.model.parameters(), strict=True))


def test_a_base_under_adapters_is_refused(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> None:
    loaded = tiny()
    attach(loaded.model, loaded.family, (4,), alpha=8.0)
    with pytest.raises(ValueError, match=r"plain linear map at model.layers.0.self_attn.q_proj, got ElasticLinear"):
        prune(loaded.model, loaded.family, windows, 0.5)
