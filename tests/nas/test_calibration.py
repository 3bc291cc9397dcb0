import pytest
import torch

from nas import calibration
from nas.arithmetic import fast_dtype
from nas.calibration import collect, load_layer
from nas.families import LoadedModel

pytestmark = pytest.mark.usefixtures("_in_fp32")


def test_sums_are_those_of_the_plain_forward(tiny, windows, tmp_path):
    loaded = tiny()
    seen = {}
    layer = loaded.layers[2]
    for name, module in (("o", layer.self_attn.o_proj), ("d", layer.mlp.down_proj), ("q", layer.self_attn.q_proj)):
        module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0].flatten(0, 1)))
    with torch.no_grad():
        loaded.model(windows)
    x = dict(seen)
    statistics = collect(loaded, windows, tmp_path).layer(2)
    torch.testing.assert_close(statistics.attention_output, x["o"].T @ x["o"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.mlp_output, x["d"].T @ x["d"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.attention_input, x["q"].T @ x["q"], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(fast_dtype() != torch.bfloat16, reason="this processor multiplies in fp32 anyway")
@pytest.mark.parametrize("around", [torch.float32, torch.bfloat16])
def test_moments_in_bf16_have_sums_in_fp32(monkeypatch, around):
    monkeypatch.setattr(calibration, "fast_dtype", lambda: torch.bfloat16)
    x, y = (torch.randn(4096, n).bfloat16().float() for n in (64, 48))  # as a product in bf16 leaves them
    precision = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", enabled=around == torch.bfloat16):
        made = calibration.moments(x, y)
    exact = x.double().T @ y.double()
    assert made.dtype == torch.float32
    assert float((made - exact).abs().max()) < 1e-6 * 4096
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("size", [5, 192, 200, 576])
def test_second_moments_are_a_product_with_itself(size):
    x = torch.randn(64, size, generator=torch.Generator().manual_seed(0))
    made = calibration.second_moments(x)
    torch.testing.assert_close(made, x.T @ x, rtol=2e-2 if fast_dtype() == torch.bfloat16 else 1e-4, atol=1e-1)
    torch.testing.assert_close(made, made.T, rtol=1e-5, atol=1e-4)  # some processors add up in another order


def test_batches_sum_to_the_same(tiny, windows, tmp_path, monkeypatch):
    whole = collect(tiny(), windows, tmp_path / "whole").layer(1)
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 96)
    parts = collect(tiny(), windows, tmp_path / "parts").layer(1)
    torch.testing.assert_close(parts.mlp_output, whole.mlp_output, rtol=1e-4, atol=1e-3)


def test_second_time_comes_from_the_cache(tiny, windows, tmp_path, monkeypatch):
    first = collect(tiny(), windows, tmp_path)
    monkeypatch.setattr(LoadedModel, "run_layer", None)
    second = collect(tiny(), windows, tmp_path)
    assert second == first
    assert torch.equal(second.layer(0).mlp_input, first.layer(0).mlp_input)


def test_other_weights_or_text_are_another_cache(tiny, windows, tmp_path):
    keys = {
        collect(tiny(), windows, tmp_path).key,
        collect(tiny(seed=1), windows, tmp_path).key,
        collect(tiny(), windows[:8], tmp_path).key,
    }
    assert len(keys) == 3


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_cache_is_made_again(tiny, windows, tmp_path, damage):
    first = collect(tiny(), windows, tmp_path)
    wanted = first.layer(1).mlp_output.clone()
    file = first.folder / "layer_001.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"delete .* to have it rebuilt"):
            load_layer(first.folder, 1, {"mlp_output"})
    else:
        file.unlink()
    assert torch.equal(collect(tiny(), windows, tmp_path).layer(1).mlp_output, wanted)


def test_a_pass_that_was_killed_goes_on(tiny, windows, tmp_path, monkeypatch, interrupted_at):
    whole = collect(tiny(), windows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(tiny(), windows, tmp_path / "killed", interrupted_at(2))
    ran, run_layer = [], LoadedModel.run_layer
    monkeypatch.setattr(LoadedModel, "run_layer", lambda *given: ran.append(given[1]) or run_layer(*given))
    statistics = collect(tiny(), windows, tmp_path / "killed")
    assert set(ran) == {2}
    for index in range(3):
        assert torch.equal(statistics.layer(index).mlp_output, whole.layer(index).mlp_output)
    assert torch.equal(statistics.head_input, whole.head_input)
    assert not list(statistics.folder.glob("*streams*"))


@pytest.mark.parametrize("damage", ["checkpoint", "layer"])
def test_a_pass_with_damaged_files_begins_anew(tiny, windows, tmp_path, interrupted_at, damage):
    wanted = collect(tiny(), windows, tmp_path / "whole").layer(2).mlp_output
    progress = interrupted_at(2)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny(), windows, tmp_path / "killed", progress)
    (file,) = (tmp_path / "killed").rglob("streams.safetensors" if damage == "checkpoint" else "layer_001.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(collect(tiny(), windows, tmp_path / "killed", progress).layer(2).mlp_output, wanted)
    assert progress.begun == [0, 1, 2, 0, 1, 2]
