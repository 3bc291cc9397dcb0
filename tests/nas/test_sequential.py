from dataclasses import replace

import pytest
import torch

from export.quantize import dequantize
from nas import calibration, sequential
from nas.extraction import extract, rounded_matrices
from nas.families import LoadedModel
from nas.importance import keep_order
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from tests.nas.supernets import active_logits, prepared

LAYERS = (LayerChoice(1, 64), LayerChoice(0, 32), LayerChoice(2, 0))


@pytest.fixture(autouse=True)
def _in_fp32(monkeypatch):
    for module in (calibration, sequential):
        monkeypatch.setattr(module, "fast_dtype", lambda: torch.float32)


@pytest.fixture
def supernet(tiny, windows):
    return prepared(tiny(bias=True), windows)


def _streams(supernet, windows, subnet, module):
    """What `module` reads in `subnet`, and the subnet's and the full model's states that leave its layer."""
    found = {}

    def run(active):
        supernet.activate(active)
        layer = supernet.loaded.layers[0]
        hooks = [
            layer.register_forward_hook(lambda _, __, out: found.update(out=out.flatten(0, 1))),
            layer.get_submodule(module).register_forward_pre_hook(
                lambda _, inputs: found.update(x=inputs[0].flatten(0, 1))
            ),
        ]
        with torch.no_grad():
            supernet.model(windows)
        for hook in hooks:
            hook.remove()
        return found["x"], found["out"]

    full = run(supernet.space.full(32))[1]
    return *run(subnet), full


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_large_model_is_fitted_alike_and_its_weights_are_mapped_from_files(supernet, tiny, windows, tmp_path, bits):
    lean = Supernet(tiny(bias=True), supernet.space, lean=True)
    lean.prepare(windows, cache_dir=tmp_path)
    subnet = Subnet(LAYERS, bits)
    fit_in_sequence(supernet, subnet, windows)
    fit_in_sequence(lean, subnet, windows, cache_dir=tmp_path)
    wanted = active_logits(supernet, windows, subnet)
    assert torch.equal(active_logits(lean, windows, subnet), wanted)
    again = Supernet(tiny(bias=True), supernet.space)
    again.prepare(windows, cache_dir=tmp_path)
    fit_in_sequence(again, subnet, windows, cache_dir=tmp_path)
    assert torch.equal(active_logits(again, windows, subnet), wanted)


def test_the_last_map_of_a_layer_is_the_least_squares_solution(supernet, windows):
    """Against lstsq on the activations; the attention before it is the full model's, so only the MLP is fitted."""
    subnet = Subnet((LayerChoice(3, 64), *LAYERS[1:]), 32)
    x, out, full = _streams(supernet, windows, subnet, "mlp.down_proj")
    damping = 1e-3
    fit_in_sequence(supernet, subnet, windows, damping=damping)
    before = supernet.part_weights(0, "mlp", 64)["mlp.down_proj.weight"]
    ridge = (damping**0.5 * x.double().norm(dim=0)).diag()
    rows, wanted = torch.cat([x.double(), ridge]), torch.cat([(full - out).double(), torch.zeros(64, 96)])
    step = torch.linalg.lstsq(rows, wanted).solution.T
    got = supernet.layer_weights(subnet, 0)["mlp.down_proj.weight"]
    torch.testing.assert_close(got.double(), before + step, rtol=1e-3, atol=1e-4)


def test_a_norm_behind_the_map_is_seen_through(tiny, windows):
    """Against lstsq on what Gemma's norm of the MLP would be given, each token divided by its size."""
    loaded = tiny("gemma3_text")
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.25, 0.5, 1)))
    supernet.prepare(windows)
    subnet = Subnet((LayerChoice(3, 64), *LAYERS[1:]), 32)
    x, out, full = _streams(supernet, windows, subnet, "mlp.down_proj")
    before = supernet.part_weights(0, "mlp", 64)["mlp.down_proj.weight"]
    gain = 1 + loaded.layers[0].post_feedforward_layernorm.weight
    given = x @ before.T
    scaled = (x / given.square().mean(-1, keepdim=True).sqrt()).double()
    damping = 1e-3
    fit_in_sequence(supernet, subnet, windows, damping=damping)
    ridge = (damping**0.5 * scaled.norm(dim=0)).diag()
    wanted = torch.cat([((full - out) / gain).double(), torch.zeros(64, 96)])
    step = torch.linalg.lstsq(torch.cat([scaled, ridge]), wanted).solution.T
    got = supernet.layer_weights(subnet, 0)["mlp.down_proj.weight"]
    torch.testing.assert_close(got.double(), before + step, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_the_stream_that_is_fitted_on_is_the_subnets_own(tiny, windows, monkeypatch, model_type, bits):
    kept = []

    class Spied(sequential._Streams):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(sequential, "_Streams", Spied)
    loaded = tiny(model_type)
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.25, 0.5, 1)))
    supernet.prepare(windows)
    subnet = Subnet(LAYERS, bits)
    fit_in_sequence(supernet, subnet, windows)
    supernet.activate(subnet)
    with torch.no_grad():
        hidden = loaded.embed(windows)
        for layer in range(3):
            hidden = loaded.run_layer(layer, hidden)
    torch.testing.assert_close(torch.cat(kept[0].own), hidden, rtol=1e-4, atol=1e-4)


def test_channels_are_chosen_anew_and_input_maps_make_up_for_half_of_what_is_lacking(supernet, windows):
    """Against lstsq on the activations, where the layer's attention is gone."""
    width = supernet.full_size("mlp")
    full = supernet.space.full(32)
    without = Subnet((LayerChoice(0, width), *full.layers[1:]), 32)
    normed = _streams(supernet, windows, without, "mlp.gate_proj")[0]
    read = _streams(supernet, windows, without, "mlp.down_proj")[0]
    lacking = _streams(supernet, windows, full, "mlp.gate_proj")[0].double() - normed.double()
    ridge = (0.1**0.5 * normed.double().norm(dim=0)).diag()
    rows = torch.cat([normed.double(), ridge]), torch.cat([lacking, torch.zeros_like(ridge)])
    correction = torch.linalg.lstsq(*rows).solution.T
    whole = supernet.part_weights(0, "mlp", width)
    kept = keep_order(whole["mlp.down_proj.weight"], read.T @ read, chunk=32)[:64]
    assert not torch.equal(kept, supernet.plan(0, "mlp").order[:64])

    subnet = Subnet((LayerChoice(0, 64), *LAYERS[1:]), 32)
    fit_in_sequence(supernet, subnet, windows, damping=0.1, mended=0.5)
    fitted = supernet.layer_weights(subnet, 0)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        wanted = whole[name][kept].double()
        torch.testing.assert_close(fitted[name].double(), wanted + wanted @ correction / 2, rtol=1e-3, atol=1e-4)


def test_the_unrounded_full_model_has_nothing_to_mend(supernet, windows, monkeypatch):
    full = supernet.space.full(32)
    wanted = active_logits(supernet, windows, full)
    monkeypatch.setattr(LoadedModel, "run_layer", None)
    fit_in_sequence(supernet, full, windows)
    assert torch.equal(active_logits(supernet, windows, full), wanted)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_brings_a_subnet_closer_to_the_full_model(supernet, windows, bits):
    subnet = Subnet(LAYERS, bits)
    wanted = active_logits(supernet, windows, supernet.space.full(32))
    before = float((active_logits(supernet, windows, subnet) - wanted).square().mean())
    others = active_logits(supernet, windows, Subnet(LAYERS[::-1], bits))
    fit_in_sequence(supernet, subnet, windows)
    assert float((active_logits(supernet, windows, subnet) - wanted).square().mean()) < 0.9 * before
    assert torch.equal(active_logits(supernet, windows, Subnet(LAYERS[::-1], bits)), others)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_what_is_extracted_is_what_is_active(tiny, windows, bits):
    loaded = tiny()
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.25, 0.5, 1)))
    supernet.prepare(windows)
    subnet = Subnet(LAYERS, bits)
    fit_in_sequence(supernet, subnet, windows)
    model, quantized = extract(supernet, subnet), rounded_matrices(supernet, subnet)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and bits < 16:
            parameter.copy_(dequantize(quantized[name]))
    with torch.no_grad():
        wanted = model(windows).logits
    torch.testing.assert_close(active_logits(supernet, windows, subnet), wanted, rtol=1e-4, atol=1e-4)


def test_mixed_parts_are_fitted_at_their_bits_and_kept(tiny, windows, tmp_path):
    loaded = tiny()
    space = SearchSpace.from_config(loaded.config, width_fractions=(0, 0.25, 0.5, 1), mixed_bits=True)
    supernet = Supernet(loaded, space)
    supernet.prepare(windows)
    subnet = Subnet.of_parts([replace(layer, mlp_bits=8 if layer.intermediate_size else 0) for layer in LAYERS], 4)
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path)
    wanted, quantized = active_logits(supernet, windows, subnet), rounded_matrices(supernet, subnet)
    assert {w.bits for name, w in quantized.items() if "mlp" in name} == {8}
    assert {w.bits for name, w in quantized.items() if "self_attn" in name} == {4}
    supernet.prepare(windows)  # forgets what it adopted
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path)
    assert torch.equal(active_logits(supernet, windows, subnet), wanted)
    assert {name: w.bits for name, w in rounded_matrices(supernet, subnet).items()} == {
        n: w.bits for n, w in quantized.items()
    }


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_cached_weights_are_the_same_and_nothing_runs(supernet, tiny, windows, bits, tmp_path, monkeypatch):
    subnet = Subnet(LAYERS, bits)
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path)
    wanted = active_logits(supernet, windows, subnet)
    supernet.prepare(windows)  # forgets what it adopted
    assert not torch.equal(active_logits(supernet, windows, subnet), wanted)
    monkeypatch.setattr(LoadedModel, "run_layer", None)
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path)
    assert torch.equal(active_logits(supernet, windows, subnet), wanted)


@pytest.mark.parametrize("bits", [32, 4])
def test_a_fit_that_was_killed_goes_on(supernet, windows, tmp_path, interrupted_at, bits):
    subnet = Subnet(LAYERS, bits)
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path / "whole")
    wanted = active_logits(supernet, windows, subnet)
    supernet.prepare(windows)  # forgets what it adopted
    progress = interrupted_at(3)
    with pytest.raises(KeyboardInterrupt):
        fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path / "killed", progress=progress)
    fit_in_sequence(supernet, subnet, windows, cache_dir=tmp_path / "killed", progress=progress)
    assert progress.begun == [0, 1, 2, 3, 2, 3, 4, 5]
    assert torch.equal(active_logits(supernet, windows, subnet), wanted)
    assert not list(tmp_path.rglob("*streams*"))
