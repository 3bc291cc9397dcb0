import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nas.adapters.elastic import attach
from nas.adapters.shared import SharedAdapter, deltas
from nas.evaluate import Evaluator
from nas.families import LoadedModel
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from nas.supernet_tuning import SHIFT_FILE, TunedSupernet, shift_by, tune_supernet
from nas.training import TrainingSettings
from nas.tuned import TuneSettings
from tests.nas.supernets import active_logits

SUBNETS = (
    Subnet((LayerChoice(2, 64), LayerChoice(0, 96), LayerChoice(3, 0)), 8),
    Subnet((LayerChoice(3, 128), LayerChoice(1, 32), LayerChoice(2, 96)), 4),
)
TRAINING = TrainingSettings(steps=12, batch=4, learning_rate=1e-2)
SETTINGS = {
    "lora": TuneSettings("lora", (4,), 8.0, training=TRAINING),
    "nls": TuneSettings("nls", (8, 4, 2), 16.0, training=replace(TRAINING, sampling="random")),
}


@pytest.fixture
def make(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> Callable[..., Supernet]:
    def made(**options: object) -> Supernet:
        loaded = tiny(**options)
        supernet = Supernet(loaded, SearchSpace.from_config(loaded.config))
        supernet.prepare(windows)
        return supernet

    return made


def _random_deltas(supernet: Supernet) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in supernet.full_maps(index).items()}
        for index in range(3)
    ]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"model_type": "qwen3"}, {"model_type": "gpt_neox"}])
def test_the_full_subnet_is_the_shifted_model(
    make: Callable[..., Supernet], windows: torch.Tensor, options: dict[str, object]
) -> None:
    supernet = make(**options)
    full = supernet.space.full(32)
    before = active_logits(supernet, windows, full)
    shift = _random_deltas(supernet)
    plain = copy.deepcopy(supernet.model)
    for index, layer in enumerate(shift):
        for name, delta in layer.items():
            plain.get_submodule(f"model.layers.{index}.{name.removesuffix('.weight')}").weight.data += delta
    with torch.no_grad():
        wanted = plain(input_ids=windows).logits
    with supernet.shifted(shift, "a test"):
        assert torch.equal(active_logits(supernet, windows, full), wanted)
        supernet.activate_full_model()
        with torch.no_grad():
            assert torch.equal(supernet.model(input_ids=windows).logits, before)
        assert supernet.prepared_from.endswith("shifted by a test")
    assert torch.equal(active_logits(supernet, windows, full), before)
    assert "shifted" not in supernet.prepared_from


def test_what_a_subnet_drops_does_not_shift_it(make: Callable[..., Supernet], windows: torch.Tensor) -> None:
    supernet = make()
    before = [active_logits(supernet, windows, subnet) for subnet in SUBNETS]
    order = supernet.plan(0, "mlp").order
    for kept, moves in ((order[:64], True), (order[64:], False)):
        shift = [{name: torch.zeros_like(t) for name, t in supernet.full_maps(index).items()} for index in range(3)]
        shift[0]["mlp.gate_proj.weight"][kept] = 0.1
        shift[0]["mlp.down_proj.weight"][:, kept] = 0.1
        with supernet.shifted(shift, "a test"):
            narrow, wide = (active_logits(supernet, windows, subnet) for subnet in SUBNETS)
        assert torch.equal(narrow, before[0]) != moves
        assert not torch.equal(wide, before[1])  # it keeps all of that MLP


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"model_type": "qwen3"}, {"model_type": "gpt_neox"}])
def test_what_is_trained_is_what_shifts(
    make: Callable[..., Supernet], windows: torch.Tensor, options: dict[str, object]
) -> None:
    supernet = make(**options)
    supernet.activate_full_model()
    other = supernet.over(copy.deepcopy(supernet.model))
    adapter = attach(other.model, supernet.loaded.family, (8, 4, 2), alpha=16.0)
    generator = torch.Generator().manual_seed(5)
    for layer in adapter.layers.values():
        for matrix in layer.matrices():
            matrix.data.normal_(std=0.1, generator=generator)
    subnets = [replace(subnet, bits=32) for subnet in SUBNETS]
    shared = SharedAdapter(other, adapter, subnets)
    ranks = adapter.sample(np.random.default_rng(1))
    trained = []
    for subnet in (*subnets, supernet.space.full(32)):
        shared.activate(subnet, ranks)
        with torch.no_grad():
            trained.append(other.model(input_ids=windows).logits)
    with supernet.shifted(deltas(shared.factors(ranks)), "a test"):
        for subnet, wanted in zip((*subnets, supernet.space.full(32)), trained, strict=True):
            torch.testing.assert_close(active_logits(supernet, windows, subnet), wanted, atol=2e-4, rtol=1e-4)
    assert len(shared.passes(np.random.default_rng(0), "random")) == 2


class _StopError(Exception):
    pass


@pytest.mark.parametrize("method", ["lora", "nls"])
def test_all_subnets_are_tuned_once_and_shift_another_process(
    make: Callable[..., Supernet], windows: torch.Tensor, tmp_path: Path, method: str
) -> None:
    def run(folder: Path, stop_at: int | None) -> tuple[Supernet, TunedSupernet]:
        supernet = make()

        def progress(done: int, total: int, what: str) -> None:
            if done == stop_at:
                raise _StopError

        often = replace(SETTINGS[method], training=replace(SETTINGS[method].training, checkpoint_s=0))
        evaluator = Evaluator(supernet, windows[:4])
        return supernet, tune_supernet(supernet, SUBNETS, windows, evaluator, often, folder, progress)

    supernet, tuned = run(tmp_path / "whole", None)
    assert len(tuned.kl) == 2
    assert all(after < 0.98 * before for before, after in tuned.kl.values())
    judged = Evaluator(supernet, windows[:4])
    assert [judged.evaluate(replace(s, bits=32)).kl for s in SUBNETS] == [after for _, after in tuned.kl.values()]
    with pytest.raises(_StopError):
        run(tmp_path / "stopped", 7)
    assert run(tmp_path / "stopped", None)[1].digest == tuned.digest

    other = make()
    assert shift_by(other, tmp_path / "whole") == tuned
    for subnet in SUBNETS:  # rounded to their bits after the shift
        assert torch.equal(active_logits(other, windows, subnet), active_logits(supernet, windows, subnet))
    with pytest.raises(ValueError, match="got one from others"):
        shift_by(make(seed=1), tmp_path / "whole")


def test_folders_of_something_else_are_refused(
    make: Callable[..., Supernet], windows: torch.Tensor, tmp_path: Path
) -> None:
    supernet = make()
    evaluator = Evaluator(supernet, windows[:4])
    for settings in (TuneSettings("full"), replace(SETTINGS["lora"], sparsity=0.5)):
        with pytest.raises(ValueError, match="by lora or nls without sparsity"):
            tune_supernet(supernet, SUBNETS, windows, evaluator, settings, tmp_path)
    sandwich = replace(SETTINGS["nls"], training=replace(TRAINING, sampling="sandwich"))
    with pytest.raises(ValueError, match="got sandwich"):
        tune_supernet(supernet, SUBNETS, windows, evaluator, sandwich, tmp_path)
    evolved = replace(SETTINGS["nls"], rank_search="evolution")
    with pytest.raises(ValueError, match="got evolution"):
        tune_supernet(supernet, SUBNETS, windows, evaluator, evolved, tmp_path)
    with pytest.raises(ValueError, match="search first"):
        tune_supernet(supernet, [], windows, evaluator, SETTINGS["lora"], tmp_path)
    short = replace(SETTINGS["lora"], training=replace(TRAINING, steps=1))
    tune_supernet(supernet, SUBNETS, windows, evaluator, short, tmp_path)
    weights = tmp_path / "layer_001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"that supernet\.json names"):
        shift_by(make(), tmp_path)
    weights.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="wanted cached tensors"):
        shift_by(make(), tmp_path)
    (tmp_path / SHIFT_FILE).write_text("[]")
    with pytest.raises(ValueError, match="wrote whole"):
        shift_by(make(), tmp_path)
