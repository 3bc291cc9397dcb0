"""GPT-2, GPT-NeoX and OPT in the one form that all writers read, and in their own again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from export.gpt import family_model, gpt_config, gpt_model
from export.heterogeneous_gpt import HeterogeneousGptForCausalLM
from export.huggingface import heterogeneous_model, write_huggingface
from hw_profiles.shapes import BlockShape

from . import tiny_models

FULL, SKIPPED = BlockShape(4, 4, 96), BlockShape(0, 0, 0)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": None, "activation_function": "gelu"}),
    ("opt", {}),
    ("opt", {"enable_bias": False}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}}),
]


def _original(family: str, tied: bool, changes: dict[str, Any], attention: str = "sdpa") -> PreTrainedModel:
    config = tiny_models.other_config(family, tied)
    config.update(changes)
    config._attn_implementation = attention
    return tiny_models.randomise(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_one_form_computes_what_the_family_does(
    family: str, changes: dict[str, Any], tied: bool, attention: str
) -> None:
    original = _original(family, tied, changes, attention)
    made = gpt_model(original)
    made.set_attn_implementation(attention)
    ids = tiny_models.tokens(16, batch=2)
    expected = tiny_models.torch_logits(original, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(made, ids), expected, rtol=0, atol=1e-4)
    # one by one, through the cache, after a prompt that is padded on the left
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ends = {"eos_token_id": tiny_models.EOS}
    assert torch.equal(made.generate(ids, **options, **ends), original.generate(ids, **options, **ends))
    # and back
    again = family_model(made)
    assert type(again) is type(original)
    np.testing.assert_allclose(tiny_models.torch_logits(again, ids), expected, rtol=0, atol=1e-4)
    for name, tensor in original.state_dict().items():
        rows = slice(2, None) if family == "opt" and "positions" in name else slice(None)
        assert torch.equal(again.state_dict()[name][rows], tensor[rows]), name


@pytest.mark.parametrize("family", tiny_models.OTHER_SIZES)
def test_layers_alike_are_written_in_the_familys_own_form(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With all heads; skipped layers are left out."""
    narrow = BlockShape(4, 4, 64)
    model = tiny_models.heterogeneous(family=family, blocks=(narrow, SKIPPED, narrow))
    write_huggingface(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=False).eval()
    assert (loaded.config.model_type, loaded.config.num_hidden_layers) == (family, 2)
    assert not list(tmp_path.glob("*.py"))
    ids = tiny_models.tokens(16)
    expected = tiny_models.torch_logits(model, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(loaded, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny_models.OTHER_SIZES)
@pytest.mark.parametrize(
    "blocks",
    [(FULL, BlockShape(4, 4, 64)), (BlockShape(2, 2, 96),) * 2, (BlockShape(4, 4, 0),) * 2, (SKIPPED,) * 2],
    ids=["differ", "fewer heads", "no MLP", "nothing"],
)
def test_what_the_family_cannot_say(family: str, blocks: tuple[BlockShape, ...]) -> None:
    assert family_model(tiny_models.heterogeneous(family=family, blocks=blocks)) is None


@pytest.mark.parametrize("family", tiny_models.OTHER_SIZES)
def test_fewer_heads_are_the_model_without_the_others(family: str) -> None:
    """As the whole model with output projections that are zero for these heads and channels."""
    original = gpt_model(_original(family, True, {"num_hidden_layers": 1}))
    model = heterogeneous_model(gpt_config(tiny_models.other_config(family)), [BlockShape(2, 2, 64)])
    state, sliced = original.state_dict(), {}
    for name, tensor in state.items():
        if "_proj" in name and "layers" in name:
            rows = model.state_dict()[name].shape
            sliced[name] = tensor[: rows[0]] if len(rows) == 1 else tensor[: rows[0], : rows[1]]
            if "o_proj.weight" in name or "down_proj.weight" in name:
                tensor[:, rows[1] :] = 0
        else:
            sliced[name] = tensor
    model.load_state_dict(sliced, strict=True)
    original.load_state_dict(state)
    ids = tiny_models.tokens(16)
    expected = tiny_models.torch_logits(original, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(model.eval(), ids), expected, rtol=0, atol=1e-4)
    assert isinstance(model, HeterogeneousGptForCausalLM)


def test_scaled_rotary_embeddings_are_refused() -> None:
    config = tiny_models.other_config("gpt_neox")
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}
    with pytest.raises(ValueError, match="wanted rotary embeddings as trained, got a rope_type of 'linear'"):
        gpt_config(config)
