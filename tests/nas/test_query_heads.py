"""Query heads of KV groups as a choice, from the space to what is shipped."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from export.huggingface import write_huggingface
from export.openvino import check_heads
from export.quantize import dequantize, is_rounded
from hw_profiles import Store, Workload, detect
from hw_profiles.shapes import BlockShape
from nas.additive import fill_in, scored_choices
from nas.extraction import extract, rounded_matrices
from nas.families import FAMILIES
from nas.importance import normalise
from nas.latency import LatencyModel, ProfileMissingError, held_out_errors, latency_curves
from nas.part_plans import kept_of, kept_rows, part_order, part_outputs
from nas.published_searches import PUBLISHED
from nas.search import SearchSettings, search
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.study import Study
from nas.subnet import SKIPPED, FewerHeads, LayerChoice, Subnet
from nas.supernet import Supernet
from tests.export import tiny_models
from tests.nas.supernets import active_logits, prepared
from tests.nas.synthetic import SyntheticEvaluator, fill_profile, latency_ms, shape_ms, tiny_space

pytestmark = pytest.mark.usefixtures("_in_fp32")

#: Two KV groups of one head each, then a group of two, then all three groups of one.
LAYERS = (LayerChoice(2, 64, heads_per_group=1), LayerChoice(1, 32), LayerChoice(3, 0, heads_per_group=1))
_supernet = partial(prepared, query_heads=True)
GROUPED = [name for name in FAMILIES if name not in ("gpt2", "gpt_neox", "opt")]


@pytest.fixture
def space(smollm2_config):
    return SearchSpace.from_config(smollm2_config, query_heads=True)


def test_groups_and_heads_are_one_choice_in_the_order_of_what_they_compute(space):
    fewer = [FewerHeads(groups, heads) for groups in (1, 2, 3) for heads in (1, 2)]
    assert set(space.sizes("attention")) == {0, 1, 2, 3, *fewer}
    assert [str(size) for size in space.sizes("attention")] == [
        "0",
        "1x1",
        "1x2",
        "1",
        "2x1",
        "2x2",
        "3x1",
        "2",
        "3x2",
        "3",
    ]
    assert space.size == (10 * 8) ** 4 * 2
    assert space.block(LayerChoice(2, 96, heads_per_group=1)) == BlockShape(2, 2, 96)
    assert {(b.num_attention_heads, b.num_key_value_heads) for b in space.block_choices()} == {
        (groups * heads, groups) for groups in (1, 2, 3) for heads in (1, 2, 3)
    } | {(0, 0)}
    assert SearchSpace.from_json(space.to_json()) == space
    assert not replace(space, head_choices=()).to_json().count("head_choices")  # as studies of earlier versions have it


def test_subnets_encode_and_keep_their_ids(space):
    rng = np.random.default_rng(0)
    sampled = [space.sample(rng) for _ in range(100)]
    assert all(space.decode(space.encode(s)) == s == Subnet.from_json(s.to_json()) for s in sampled)
    assert {layer.heads_per_group for s in sampled for layer in s.layers} == {0, 1, 2}
    whole = Subnet((LayerChoice(3, 96), LayerChoice(1, 0, 8)), 4)
    assert whole.to_json() == '{"bits":4,"layers":[[3,96],[1,0,8,0]]}'
    assert Subnet((LayerChoice(3, 96, heads_per_group=2),), 8).to_json() == '{"bits":8,"layers":[[3,96,0,0,2]]}'
    for layer in (LayerChoice(0, 96, heads_per_group=1), LayerChoice(3, 96, heads_per_group=3)):
        with pytest.raises(ValueError, match=r"heads_per_group out of \(0, 1, 2\)"):
            space.validate(Subnet((layer,) * 4, 8))
    alike = replace(space, homogeneous=True)
    assert all(alike.decode(alike.encode(s)) == s for s in (alike.sample(rng) for _ in range(50)))


def test_spaces_refuse_heads_that_groups_have_not(space):
    with pytest.raises(ValueError, match=r"head_choices ascending from 1 to less than 3, got \(1, 3\)"):
        replace(space, head_choices=(1, 3))
    alone = LlamaConfig(hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    with pytest.raises(ValueError, match="wanted several query heads per KV group"):
        SearchSpace.from_config(alone, query_heads=True)


def test_heads_fill_blocks_of_the_quantiser():
    """Of 16 dimensions an even number is kept."""
    sizes = tiny_space(query_heads=True).sizes("attention")
    assert [str(size) for size in sizes] == ["0", "1", "2x1", "2"]


def test_what_is_kept_of_an_order():
    order = torch.tensor([[4, 5], [1, 0], [2, 3]])  # heads of the groups 2, 0 and 1
    assert kept_of(order, FewerHeads(2, 1)).tolist() == [[4], [1]]
    assert kept_of(order, 1).tolist() == [[4, 5]]
    assert kept_rows(order, FewerHeads(2, 1), 12, by_group=False).tolist() == [8, 9, 2, 3]
    assert kept_rows(order, FewerHeads(2, 1), 6, by_group=True).tolist() == [4, 5, 0, 1]
    assert kept_rows(order, 1, 12, by_group=False).tolist() == [8, 9, 10, 11]


def test_outputs_are_least_squares_over_the_heads_kept():
    """Against the normal equations, solved for each size on its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 24, generator=generator)
    X = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    H = X.T @ X
    order = part_order("attention", weight, H, (3, 2))
    assert sorted(order.flatten().tolist()) == list(range(6))
    assert all(len({head // 2 for head in row}) == 1 for row in order.tolist())
    C, scale = normalise(H)
    damped = C * scale * scale.unsqueeze(1)
    sizes = [FewerHeads(1, 1), 1, FewerHeads(3, 1), 2, FewerHeads(2, 1)]
    outputs = part_outputs(weight, H, order, sizes)
    assert set(outputs) == set(sizes)
    total = (weight.double() @ damped * weight).sum()
    for size, found in outputs.items():
        kept = kept_rows(order, size, 24, by_group=False)
        wanted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.double().T).T
        torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-3, atol=1e-4)
        change = weight.double().clone()
        change[:, kept] -= wanted
        assert found.error == pytest.approx(float((change @ damped * change).sum() / total), rel=1e-4)


def test_the_head_that_carries_nothing_goes_first():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(100, 24, generator=generator)
    weight = torch.randn(8, 24, generator=generator)
    weight[:, 4:8] = weight[:, 8:12] = weight[:, 20:] = 0  # one head of each group of two
    order = part_order("attention", weight, X.T @ X, (3, 2))
    assert set(order[:, 1].tolist()) == {1, 2, 5}


@pytest.mark.parametrize("model_type", GROUPED)
def test_inherited_heads_are_the_original_with_the_others_silenced(tiny, windows, model_type):
    """Dropped heads are those whose columns of o_proj are zero in the Hugging Face model."""
    original, loaded = tiny(model_type).model, tiny(model_type)
    supernet = _supernet(loaded, windows, reform=False)
    subnet = Subnet((LayerChoice(3, 128, heads_per_group=1), LayerChoice(3, 128), LayerChoice(2, 128)), 32)
    for index, choice in enumerate(subnet.layers):
        size = choice.size("attention")
        projection = original.get_submodule(f"model.layers.{index}.self_attn.o_proj").weight.data
        if size != supernet.full_size("attention"):
            kept = supernet.kept_indices(index, "attention", size, loaded.family.output)
            silenced = torch.ones(projection.shape[1], dtype=torch.bool)
            silenced[kept] = False
            projection[:, silenced] = 0
    with torch.no_grad():
        wanted = original(windows).logits
    torch.testing.assert_close(active_logits(supernet, windows, subnet), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", GROUPED)
def test_extraction_and_files_compute_what_activation_computes(tiny, windows, tmp_path, model_type):
    loaded = tiny(model_type)
    supernet = _supernet(loaded, windows)
    subnet = Subnet(LAYERS, 4)
    model, quantized = extract(supernet, subnet, shared=True), rounded_matrices(supernet, subnet)
    assert sum(p.numel() for p in model.parameters()) == supernet.space.model_shape(subnet).parameters
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter):
            parameter.data = dequantize(quantized[name])
    wanted = active_logits(supernet, windows, subnet)
    with torch.no_grad():
        torch.testing.assert_close(model(windows).logits, wanted, rtol=1e-4, atol=1e-4)
    write_huggingface(model, tiny_models.tokenizer(), tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(shipped(windows).logits, wanted, rtol=1e-4, atol=1e-4)


def test_layers_of_fewer_heads_that_are_alike_are_the_plain_architecture(tiny, windows):
    loaded = tiny("llama")
    supernet = _supernet(loaded, windows)
    subnet = Subnet((LayerChoice(3, 64, heads_per_group=1),) * 3, 32)
    extracted = extract(supernet, subnet)
    assert type(extracted) is type(loaded.model)
    assert (extracted.config.num_attention_heads, extracted.config.num_key_value_heads) == (3, 3)
    with torch.no_grad():
        got = extracted(windows).logits
    torch.testing.assert_close(got, active_logits(supernet, windows, subnet), rtol=1e-4, atol=1e-4)


def test_plans_are_kept_apart_from_those_of_whole_groups(tiny, windows, tmp_path):
    first = _supernet(tiny(), windows, cache_dir=tmp_path)
    whole = Supernet(tiny(), replace(first.space, head_choices=()))
    whole.prepare(windows, cache_dir=tmp_path)
    again = _supernet(tiny(), windows, cache_dir=tmp_path)
    assert whole.plan(0, "attention").order.shape == (3, 1)
    assert torch.equal(first.plan(0, "attention").order // 2, whole.plan(0, "attention").order.expand(-1, 2))
    for layer in range(3):
        made, found = first.plan(layer, "attention"), again.plan(layer, "attention")
        assert torch.equal(made.order, found.order)
        assert made.errors == found.errors
        assert made.errors[FewerHeads(3, 1)] < made.errors[FewerHeads(1, 1)]
    subnet = Subnet((LayerChoice(2, 64), LayerChoice(1, 32), LayerChoice(3, 0)), 32)  # heads in another order alone
    torch.testing.assert_close(
        active_logits(first, windows, subnet), active_logits(whole, windows, subnet), rtol=1e-4, atol=1e-4
    )


def test_what_is_rounded_in_files_is_kept_apart_as_well(tiny, windows, tmp_path):
    """Biases are made anew in a supernet's own order of heads, and must meet integers in the same."""
    first = _supernet(tiny("qwen2"), windows, lean=True, cache_dir=tmp_path)
    subnet = Subnet((LayerChoice(2, 64), LayerChoice(1, 32), LayerChoice(3, 0)), 8)
    active_logits(first, windows, subnet)
    whole = Supernet(tiny("qwen2"), replace(first.space, head_choices=()), lean=True)
    whole.prepare(windows, cache_dir=tmp_path)
    model, quantized = extract(whole, subnet), rounded_matrices(whole, subnet)
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter):
            parameter.data = dequantize(quantized[name])
    with torch.no_grad():
        got = model(windows).logits
    torch.testing.assert_close(got, active_logits(whole, windows, subnet), rtol=1e-4, atol=1e-4)


def test_weights_fitted_in_sequence_are_better_than_shared_ones(tiny, windows):
    supernet = _supernet(tiny(), windows)
    subnet = Subnet(LAYERS, 32)
    full = active_logits(supernet, windows, supernet.space.full(32)).log_softmax(-1)

    def kl():
        return float((full.exp() * (full - active_logits(supernet, windows, subnet).log_softmax(-1))).sum(-1).mean())

    shared = kl()
    fit_in_sequence(supernet, subnet, windows)
    assert kl() < shared
    extracted = extract(supernet, subnet)
    with torch.no_grad():
        got = extracted(windows).logits
    torch.testing.assert_close(got, active_logits(supernet, windows, subnet), rtol=1e-4, atol=1e-4)


def test_sizes_between_those_scored_are_filled_in_by_their_errors(space):
    scored = scored_choices(space, "attention")
    assert [str(size) for size in scored] == ["0", "1", "2", "3x1", "3x2"]
    sizes = space.sizes("attention")
    errors = {size: 1 - index / 9 for index, size in enumerate(sizes[:-1])}
    filled = fill_in(sizes, {size: errors[size] ** 2 for size in scored}, errors)
    assert filled[-1] == 0
    assert (np.diff(filled) < 0).all()
    np.testing.assert_allclose(filled[[sizes.index(s) for s in scored]], [errors[s] ** 2 for s in scored])


@pytest.mark.parametrize("kind", [{}, {"homogeneous": True}, {"mixed_bits": True}])
def test_searches_choose_heads(tmp_path, kind):
    space = tiny_space(4, query_heads=True, **kind)
    evaluator = SyntheticEvaluator(space)
    settings = SearchSettings(evaluations=30, batch=6, seeds_per_bits=4, population=24, generations=8)
    with Store(str(tmp_path / "search.db")) as store:
        study = Study.create(store, "s", "a model", "0123", space, {"windows": 2})
        trials = search(space, evaluator, latency_ms, study, settings)
        assert [trial.subnet for trial in Study.load(store, "s").trials()] == [trial.subnet for trial in trials]
    assert any(layer.heads_per_group for trial in trials for layer in trial.subnet.layers)
    assert {choice for _, part, choice in evaluator.scored if part == "attention"} >= {0, 1, FewerHeads(2, 1)}


@pytest.mark.parametrize("algorithm", PUBLISHED)
def test_published_searches_choose_heads(tmp_path, algorithm):
    space = tiny_space(4, query_heads=True)
    settings = SearchSettings(evaluations=60, algorithm=algorithm)
    with Store(str(tmp_path / "search.db")) as store:
        study = Study.create(store, "s", "a model", "0123", space, {"windows": 2})
        trials = search(space, SyntheticEvaluator(space), latency_ms, study, settings)
    assert any(layer.heads_per_group for trial in trials for layer in trial.subnet.layers)


def test_latencies_of_fewer_heads_need_a_profile_with_some(tmp_path):
    decode = Workload("decode", 128)
    with Store(str(tmp_path / "profile.db")) as store:
        space, whole = tiny_space(4, query_heads=True), tiny_space(4)
        fill_profile(store, whole, detect(), "openvino", [decode])
        with pytest.raises(ProfileMissingError, match=r"fewer query heads per KV group.*nas profile --query-heads"):
            LatencyModel.fit(store, detect().id, "openvino", 1, space, decode)
        fill_profile(store, space, detect(), "openvino", [decode])
        model = LatencyModel.fit(store, detect().id, "openvino", 1, space, decode)
    subnets = [space.sample(np.random.default_rng(seed)) for seed in range(40)]
    wanted = [shape_ms(space.model_shape(s), s.precision, decode) for s in subnets]
    np.testing.assert_allclose(model.value_ms(subnets), wanted, rtol=0.05)


def test_precisions_profiled_without_fewer_heads_are_left_out(tmp_path):
    works = [Workload("decode", 128), Workload("decode", 512)]
    space, whole = tiny_space(4, query_heads=True), tiny_space(4)
    with Store(str(tmp_path / "profile.db")) as store:
        fill_profile(store, space, detect(), "openvino", works, ["int8"])
        fill_profile(store, whole, detect(), "openvino", works, ["int4"])
        where = (store, detect().id, "openvino", 1, space)
        model = LatencyModel.fit(*where, works[0])
        assert set(model.predictors) == {"int8"}
        with pytest.raises(ProfileMissingError, match="nas profile --precision int4 --query-heads"):
            model.predict([space.full(4)])
        # what a report says of the profile itself is of all of it
        assert {curve.precision for curve in latency_curves(*where, "decode")} == {"int8", "int4"}
        assert {graph.precision for graph in held_out_errors(*where, "decode").graphs} == {"int8", "int4"}


def test_openvino_runs_one_number_of_heads_per_group():
    space = tiny_space(query_heads=True)
    with pytest.raises(ValueError, match="as many query heads per KV group in every layer for openvino, got 1, 2;"):
        check_heads(space.block_choices())
    check_heads(space.model_shape(Subnet((LayerChoice(2, 64, heads_per_group=1), SKIPPED) * 3, 8)).blocks)
