from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

from export import heterogeneous_model
from hw_profiles.shapes import BlockShape

from . import tiny_models


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_full_blocks_are_the_plain_model(family: str, tied: bool, attention: str) -> None:
    fields = tiny_models.llama_config(tied, num_hidden_layers=3, sliding_window=None).to_dict() | {"model_type": family}
    config = AutoConfig.for_model(**fields, attn_implementation=attention)
    plain = tiny_models.randomise(AutoModelForCausalLM.from_config(config))
    model = heterogeneous_model(config, [BlockShape(4, 2, 96)] * 3)
    model.set_attn_implementation(attention)
    model.load_state_dict(plain.state_dict(), strict=True)
    ids = tiny_models.tokens(16, batch=2)
    np.testing.assert_array_equal(tiny_models.torch_logits(model, ids), tiny_models.torch_logits(plain, ids))
    labels = {"input_ids": ids, "labels": ids}
    assert torch.equal(model(**labels).loss, plain(**labels).loss)


def test_skipped_parts_are_the_identity() -> None:
    """As a plain Llama whose output projections are zero there."""
    config = tiny_models.llama_config(num_hidden_layers=4)
    plain = tiny_models.randomise(LlamaForCausalLM(config))
    blocks = [BlockShape(4, 2, 96), BlockShape(0, 0, 96), BlockShape(4, 2, 0), BlockShape(0, 0, 0)]
    model = heterogeneous_model(config, blocks)
    names = set(model.state_dict())
    model.load_state_dict({name: t for name, t in plain.state_dict().items() if name in names}, strict=True)
    for layer, block in zip(plain.model.layers, blocks, strict=True):
        if not block.num_attention_heads:
            layer.self_attn.o_proj.weight.zero_()
        if not block.intermediate_size:
            layer.mlp.down_proj.weight.zero_()
    ids = tiny_models.tokens(16)
    expected = tiny_models.torch_logits(plain, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(model, ids), expected, rtol=0, atol=1e-5)


def test_fewer_kv_groups_are_a_llama_without_the_others() -> None:
    """Dropping the second group of two heads: as a plain Llama whose output projection is zero for these heads."""
    config = tiny_models.llama_config(num_hidden_layers=1)
    plain = tiny_models.randomise(LlamaForCausalLM(config))
    model = heterogeneous_model(config, [BlockShape(2, 1, 64)])
    state, attention, mlp = plain.state_dict(), "model.layers.0.self_attn", "model.layers.0.mlp"
    kept = {f"{attention}.{name}_proj.weight": rows for name, rows in (("q", 32), ("k", 16), ("v", 16))}
    kept |= {f"{mlp}.gate_proj.weight": 64, f"{mlp}.up_proj.weight": 64}
    sliced = {name: tensor[: kept[name]] if name in kept else tensor for name, tensor in state.items()}
    for name, columns in ((f"{attention}.o_proj.weight", 32), (f"{mlp}.down_proj.weight", 64)):
        sliced[name] = state[name][:, :columns]
        state[name][:, columns:] = 0
    model.load_state_dict(sliced, strict=True)
    ids = tiny_models.tokens(16)
    expected = tiny_models.torch_logits(plain, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_sees_a_later_one(attention: str) -> None:
    model = tiny_models.heterogeneous()
    model.set_attn_implementation(attention)
    ids = tiny_models.tokens(16)
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 256
    before, after = (tiny_models.torch_logits(model, tokens)[0] for tokens in (ids, changed))
    np.testing.assert_allclose(after[:10], before[:10], rtol=0, atol=1e-5)
    assert np.abs(after[15] - before[15]).max() > 1e-2


@torch.inference_mode()
def test_the_cache_numbers_attention_layers_densely(models: dict[bool, PreTrainedModel]) -> None:
    cache = DynamicCache(config=models[True].config)
    models[True](input_ids=tiny_models.tokens(7), past_key_values=cache, use_cache=True)
    kept = [layer.keys.shape for layer in cache.layers if layer.is_initialized]
    assert kept == [(1, groups, 7, tiny_models.HEAD_DIM) for groups in (2, 1, 3)]


@pytest.mark.parametrize("tied", [True, False])
def test_cached_generation_is_uncached_generation(models: dict[bool, PreTrainedModel], tied: bool) -> None:
    ids = tiny_models.tokens(9)
    generated = models[tied].generate(ids, min_new_tokens=24, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert generated[0, 9:].tolist() == tiny_models.greedy(models[tied], ids, 24)


def test_left_padded_batches_generate_as_each_prompt_alone(models: dict[bool, PreTrainedModel]) -> None:
    long, short = tiny_models.tokens(9), tiny_models.tokens(5, seed=2)
    padded = torch.cat([long, torch.nn.functional.pad(short, (4, 0))])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = models[True].generate(padded, attention_mask=mask, **options)[:, 9:].tolist()
    assert both == [tiny_models.greedy(models[True], prompt, 12) for prompt in (long, short)]
