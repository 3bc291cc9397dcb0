import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.huggingface import write_huggingface
from export.quantize import dequantize, is_rounded, quantize
from nas import families, part_plans
from nas.calibration import collect
from nas.extraction import extract, rounded_matrices
from nas.families import FAMILIES, LoadedModel, wrap
from nas.part_plans import part_order
from nas.rounding import output_error
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from tests.export import tiny_models
from tests.nas.supernets import active_logits, prepared

pytestmark = pytest.mark.usefixtures("_in_fp32")

SUBNET = Subnet((LayerChoice(1, 64), LayerChoice(0, 32), LayerChoice(2, 0)), 32)


OTHER_FAMILIES = [{"model_type": name} for name in FAMILIES if name != "llama"]
VARIANTS = [{}, {"tied": False}, {"bias": True}, *OTHER_FAMILIES]


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_subnet_is_the_original_bit_for_bit(tiny, windows, variant):
    loaded = tiny(**variant)
    with torch.no_grad():
        wanted = loaded.model(windows).logits
    supernet = prepared(loaded, windows)
    assert torch.equal(active_logits(supernet, windows, supernet.space.full(32)), wanted)
    for subnet in (SUBNET, supernet.space.full(4), supernet.space.smallest):
        assert not torch.allclose(active_logits(supernet, windows, subnet), wanted, atol=1e-3)
    assert torch.equal(active_logits(supernet, windows, supernet.space.full(32)), wanted)


def test_a_subnet_is_the_same_whatever_was_active_before(tiny, windows):
    supernet = prepared(tiny(bias=True), windows)
    rng = np.random.default_rng(0)
    subnets = [supernet.space.sample(rng) for _ in range(6)]
    first = [active_logits(supernet, windows, subnet) for subnet in subnets]
    for subnet, wanted in zip(subnets[::-1], first[::-1], strict=True):
        assert torch.equal(active_logits(supernet, windows, subnet), wanted)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_large_model_is_put_together_layer_by_layer(tiny, windows, tmp_path, model_type):
    """The same logits and integers; between passes the model holds the loaded weights and nothing besides."""
    roomy = prepared(tiny(model_type), windows)
    lean = prepared(tiny(model_type), windows, lean=True, cache_dir=tmp_path)
    loaded = _places(lean)
    for bits in (32, 8, 4):
        subnet = Subnet(SUBNET.layers, bits)
        wanted = active_logits(roomy, windows, subnet)
        assert torch.equal(active_logits(lean, windows, subnet), wanted)
        with torch.no_grad():
            torch.testing.assert_close(lean.loaded.logits(windows), wanted)
        lean.ends.activate("fp32")
        assert _places(lean) == loaded
        for name, quantized in rounded_matrices(roomy, subnet).items():
            assert torch.equal(quantized.integers, rounded_matrices(lean, subnet)[name].integers)
    assert list(tmp_path.glob("rounded-*/*.safetensors"))
    assert torch.equal(
        active_logits(lean, windows, lean.space.full(32)), active_logits(roomy, windows, roomy.space.full(32))
    )


def _places(supernet):
    """In memory, of every tensor of the model."""
    return {name: tensor.data_ptr() for name, tensor in supernet.model.state_dict().items()}


def test_a_layer_that_fails_has_its_loaded_weights_back(tiny, windows):
    lean = prepared(tiny(), windows, lean=True)
    lean.activate(SUBNET)
    wanted = lean.loaded.layers[0].mlp.down_proj.weight.data_ptr()
    with pytest.raises(RuntimeError):
        lean.loaded.run_layer(0, torch.zeros(1, 4, 7))
    assert lean.loaded.layers[0].mlp.down_proj.weight.data_ptr() == wanted


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_weights_in_half_precision_are_computed_with_in_fp32(tiny_model, windows, tmp_path, model_type):
    model = tiny_model(model_type, tied=model_type == "llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    whole = copy.deepcopy(model).float()
    halved, exact = (prepared(wrap(m, None, "tiny"), windows, cache_dir=tmp_path) for m in (model, whole))
    assert halved.loaded.fingerprint == exact.loaded.fingerprint
    assert (halved.lean, exact.lean) == (True, False)
    for subnet in (halved.space.full(32), *(Subnet(SUBNET.layers, bits) for bits in (32, 8, 4))):
        wanted = active_logits(exact, windows, subnet)
        halved.activate(subnet)
        with torch.no_grad():
            torch.testing.assert_close(halved.loaded.logits(windows), wanted)
        extracted, theirs = extract(halved, subnet, shared=True), extract(exact, subnet)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(extracted.state_dict()[name], tensor)
    halved.ends.activate("fp32")
    assert {tensor.dtype for tensor in halved.model.parameters()} == {torch.bfloat16}


def test_models_that_fill_the_memory_are_lean(tiny, monkeypatch):
    assert not Supernet(tiny(), SearchSpace.from_config(tiny().config)).lean
    little = replace(families.detect(), memory_bytes=2**20)
    monkeypatch.setattr(families, "detect", lambda: little)
    assert Supernet(tiny(), SearchSpace.from_config(tiny().config)).lean


@pytest.mark.parametrize("variant", [{}, {"tied": False}, *OTHER_FAMILIES])
def test_extraction_computes_what_activation_computes(tiny, windows, variant):
    supernet = prepared(tiny(**variant), windows)
    for subnet in (SUBNET, supernet.space.full(32)):
        extracted = extract(supernet, subnet)
        with torch.no_grad():
            got = extracted(windows).logits
        torch.testing.assert_close(got, active_logits(supernet, windows, subnet), rtol=1e-4, atol=1e-4)
        assert sum(p.numel() for p in extracted.parameters()) == supernet.space.model_shape(subnet).parameters


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if FAMILIES[name].computed_as in ("", "llama")])
def test_layers_that_are_alike_are_extracted_as_the_plain_architecture(tiny, windows, model_type):
    loaded = tiny(model_type)
    supernet = prepared(loaded, windows)
    kept, skipped = LayerChoice(2, 64), LayerChoice(0, 0)
    for layers, count in (((skipped, kept, kept), 2), ((LayerChoice(3, 128),) * 3, 3)):
        extracted = extract(supernet, Subnet(layers, 32))
        assert type(extracted) is type(loaded.model)
        assert len(extracted.model.layers) == extracted.config.num_hidden_layers == count
        with torch.no_grad():
            got = extracted(windows).logits
        torch.testing.assert_close(got, active_logits(supernet, windows, Subnet(layers, 32)), rtol=1e-4, atol=1e-4)
    names = set(extract(supernet, Subnet((skipped, kept, kept), 4)).state_dict())
    assert set(rounded_matrices(supernet, Subnet((skipped, kept, kept), 4))) < names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [0, 4])
def test_parts_and_head_have_the_bits_that_are_theirs(tiny, windows, head_bits, tied):
    loaded = tiny("llama", tied=tied)
    supernet = Supernet(loaded, replace(prepared(loaded, windows).space, mixed_bits=True))
    supernet.prepare(windows)
    layers = [replace(layer, mlp_bits=8 if layer.intermediate_size else 0) for layer in SUBNET.layers]
    mixed = Subnet.of_parts(layers, 4, head_bits)
    assert mixed.is_mixed
    model, quantized = extract(supernet, mixed), rounded_matrices(supernet, mixed)
    assert model.config.tie_word_embeddings == (tied and not head_bits)
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter):
            narrow = "self_attn" in name or (head_bits and name == "lm_head.weight")
            assert quantized[name].bits == (4 if narrow else 8)
            parameter.copy_(dequantize(quantized[name]))
    with torch.no_grad():
        wanted = model(windows).logits
    torch.testing.assert_close(active_logits(supernet, windows, mixed), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(active_logits(supernet, windows, mixed.at_bits(8)), wanted, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [(LayerChoice(2, 64),) * 3, SUBNET.layers])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_of_other_bits_than_the_embedding_is_stored_beside_it(tiny, windows, tmp_path, model_type, layers):
    loaded = tiny(model_type)
    supernet = Supernet(loaded, replace(prepared(loaded, windows).space, mixed_bits=True))
    supernet.prepare(windows)
    subnet = Subnet(layers, 4, head_bits=4)
    model, quantized = extract(supernet, subnet, shared=True), rounded_matrices(supernet, subnet)
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter):
            parameter.data = dequantize(quantized[name])
    write_huggingface(model, tiny_models.tokenizer(), tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        found = shipped(windows).logits
    torch.testing.assert_close(found, active_logits(supernet, windows, subnet), rtol=1e-4, atol=1e-4)


def test_a_narrow_head_is_rounded_for_what_it_reads(tiny, windows, tmp_path):
    loaded = tiny("llama")
    supernet = prepared(loaded, windows, cache_dir=tmp_path)
    read = []
    hook = loaded.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        loaded.model(windows)
    hook.remove()
    H = collect(loaded, windows, tmp_path).head_input
    torch.testing.assert_close(H, read[0].T @ read[0], rtol=1e-4, atol=1e-3)
    weight = loaded.head.weight
    assert output_error(weight, supernet.ends.narrow_head(), H) < 0.9 * output_error(weight, quantize(weight, 4), H)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_active_weights_are_those_an_exporter_rounds(tiny, windows, bits, model_type):
    supernet = prepared(tiny(model_type), windows)
    subnet = Subnet(SUBNET.layers, bits)
    model = extract(supernet, subnet)
    quantized = rounded_matrices(supernet, subnet)
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter):
            assert quantized[name].bits == (8 if "embed" in name or "head" in name else bits)
            parameter.copy_(dequantize(quantized[name]))
    with torch.no_grad():
        wanted = model(windows).logits
    torch.testing.assert_close(active_logits(supernet, windows, subnet), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_active_weights_at_16_bits_are_halves(tiny, windows, tied, half):
    supernet = prepared(tiny(tied=tied), windows)
    subnet = SUBNET.at(half)
    supernet.activate(SUBNET.at("bf16"))  # which leaves nothing of the other behind
    model = extract(supernet, subnet)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.bfloat16() if half == "bf16" else parameter.half())
    with torch.no_grad():
        wanted = model(windows).logits
    torch.testing.assert_close(active_logits(supernet, windows, subnet), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(active_logits(supernet, windows, SUBNET), wanted)
    assert rounded_matrices(supernet, subnet) == {}


def test_parts_keep_whole_groups_and_the_best_weights_for_them(tiny, windows, tmp_path):
    loaded = tiny()
    original = copy.deepcopy(loaded.model)
    supernet = prepared(loaded, windows, cache_dir=tmp_path)
    plan = supernet.plan(0, "attention")
    weights = supernet.layer_weights(SUBNET, 0)
    attention = original.model.layers[0].self_attn
    group = plan.order[0]
    heads = torch.arange(64) + 64 * group  # two heads of 32 per group
    assert torch.equal(weights["self_attn.q_proj.weight"], attention.q_proj.weight[heads])
    assert torch.equal(weights["self_attn.k_proj.weight"], attention.k_proj.weight[torch.arange(32) + 32 * group])
    H = collect(loaded, windows, tmp_path).layer(0).attention_output
    H = H + 0.01 * H.diagonal().diag()
    wanted = torch.linalg.solve(H[heads][:, heads].double(), (H @ attention.o_proj.weight.T)[heads].double()).T
    torch.testing.assert_close(weights["self_attn.o_proj.weight"].double(), wanted, rtol=1e-3, atol=1e-4)


def test_reformation_brings_the_layer_closer_to_the_original(tiny, windows):
    loaded = tiny()
    with torch.no_grad():
        wanted = loaded.model(windows).logits
    narrow = Subnet((LayerChoice(2, 64),) * 3, 32)
    errors = {}
    for reform in (True, False):
        supernet = prepared(loaded, windows, reform=reform)
        errors[reform] = float((active_logits(supernet, windows, narrow) - wanted).square().mean())
        supernet.activate(supernet.space.full(32))
    assert errors[True] < 0.9 * errors[False]


def test_cached_preparation_is_the_same_and_runs_nothing(tiny, windows, tmp_path, monkeypatch):
    wanted = active_logits(prepared(tiny(), windows, cache_dir=tmp_path), windows, SUBNET)
    monkeypatch.setattr(LoadedModel, "run_layer", None)
    assert torch.equal(active_logits(prepared(tiny(), windows, cache_dir=tmp_path), windows, SUBNET), wanted)


def test_of_an_interrupted_preparation_only_what_is_missing_is_made(tiny, windows, tmp_path, monkeypatch):
    wanted = active_logits(prepared(tiny(), windows, cache_dir=tmp_path), windows, SUBNET)
    for folder in ("orders-*", "supernet-*"):
        (file,) = tmp_path.glob(f"{folder}/layer_001.safetensors")
        file.unlink()
    made, told = [], []
    monkeypatch.setattr(part_plans, "part_order", lambda *given: made.append(given[0]) or part_order(*given))
    again = prepared(tiny(), windows, cache_dir=tmp_path, progress=lambda *given: told.append(given))
    assert made == ["attention", "mlp"]
    assert told == [(4, 6, "reforming layer 1")]
    assert torch.equal(active_logits(again, windows, SUBNET), wanted)


def test_errors_say_what_to_do(tiny, windows):
    loaded = tiny()
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config))
    with pytest.raises(ValueError, match=r"call prepare"):
        supernet.activate(Subnet((LayerChoice(1, 64),) * 3, 32))
    with pytest.raises(ValueError, match="for another model"):
        Supernet(loaded, SearchSpace.from_config(tiny(tied=False).config))
