from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from export.decoder import decoder_shape
from export.heterogeneous import HeterogeneousLlamaForCausalLM
from export.heterogeneous_gemma import HeterogeneousGemma2ForCausalLM, HeterogeneousGemma3ForCausalLM
from export.huggingface import register, write_huggingface
from hw_profiles.shapes import BlockShape

from . import tiny_models

IDS = tiny_models.tokens(12)

#: Run where llm-nas cannot be imported: argv are the folder and the file for the results.
_ELSEWHERE = """
import json, sys

class NoLlmNas:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nas", "predictors", "hw_profiles", "export"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoLlmNas())
import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[3]))
results = []
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.tolist()
    generated = model.generate(ids, min_new_tokens=24, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:].tolist()
    results.append({"module": type(model).__module__, "logits": logits, "generated": generated})
with open(sys.argv[2], "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def folders(models: dict[bool, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, scratch: Path) -> dict[bool, Path]:
    written = {}
    for tied in models:
        folder = scratch / f"tied-{tied}"
        folder.mkdir()
        written[tied] = write_huggingface(tiny_models.heterogeneous(tied), tokenizer, folder)
    return written


def test_loads_as_remote_code_where_llm_nas_is_not_installed(
    models: dict[bool, PreTrainedModel], folders: dict[bool, Path], tmp_path: Path
) -> None:
    _expect_the_same_elsewhere([models[tied] for tied in folders], list(folders.values()), tmp_path)


@pytest.mark.parametrize(
    ("family", "form"),
    [("gemma2", HeterogeneousGemma2ForCausalLM), ("gemma3_text", HeterogeneousGemma3ForCausalLM)],
)
def test_gemma_loads_as_remote_code_where_llm_nas_is_not_installed(
    family: str, form: type[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its first layers have no attention, the text is longer than its window, and so is what is generated."""
    blocks = (
        BlockShape(0, 0, 64),
        BlockShape(0, 0, 0),
        BlockShape(4, 2, 96),
        BlockShape(2, 1, 0),
        BlockShape(6, 3, 32),
    )
    model = tiny_models.heterogeneous(family=family, blocks=blocks)
    folder = tmp_path / "gemma"
    folder.mkdir()
    write_huggingface(model, tokenizer, folder)
    _expect_the_same_elsewhere([model], [folder], tmp_path)
    register()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    assert type(loaded) is form
    assert decoder_shape(loaded) == decoder_shape(model)


def _expect_the_same_elsewhere(models: Sequence[PreTrainedModel], folders: Sequence[Path], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = [json.dumps([str(folder) for folder in folders]), str(results), json.dumps(IDS.tolist())]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-I", "-c", _ELSEWHERE, *arguments],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    for model, found in zip(models, json.loads(results.read_text()), strict=True):
        assert found["module"].startswith("transformers_modules.")
        expected = tiny_models.torch_logits(model, IDS)
        np.testing.assert_allclose(np.array(found["logits"]), expected, rtol=0, atol=1e-5)
        assert found["generated"] == _greedy_without_eos(model, 24)


def _greedy_without_eos(model: PreTrainedModel, count: int) -> list[int]:
    ids = IDS
    for _ in range(count):
        logits = torch.from_numpy(tiny_models.torch_logits(model, ids))[:, -1:]
        logits[..., tiny_models.EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_loads_without_remote_code_where_it_is(
    models: dict[bool, PreTrainedModel], folders: dict[bool, Path], tied: bool
) -> None:
    register()
    loaded = AutoModelForCausalLM.from_pretrained(folders[tied], dtype=torch.float32, trust_remote_code=False).eval()
    assert type(loaded) is HeterogeneousLlamaForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    np.testing.assert_array_equal(tiny_models.torch_logits(loaded, IDS), tiny_models.torch_logits(models[tied], IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_config_serves_old_and_new_transformers(folders: dict[bool, Path], tied: bool) -> None:
    config = json.loads((folders[tied] / "config.json").read_text())
    assert config["rope_theta"] == 300.0
    assert config["rope_parameters"]["rope_theta"] == 300.0
    assert config["rms_norm_eps"] == 1e-3
    assert config["tie_word_embeddings"] is tied
    assert config["num_hidden_layers"] == len(config["block_configs"]) == len(tiny_models.BLOCKS)
    assert config["model_type"] == "heterogeneous_llama"


def test_scaled_rotary_embeddings_serve_old_and_new_transformers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As in Llama 3.1. transformers 4 reads the two older fields, and knows no other class of fast tokenizers."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = tiny_models.llama_config(rope_parameters={"rope_theta": 300.0, **scaling})
    model = tiny_models.randomise(LlamaForCausalLM(config))
    write_huggingface(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (300.0, scaling)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {**scaling, "rope_theta": 300.0}.items() <= dict(loaded.config.rope_parameters).items()
    ids = tiny_models.tokens(40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_nothing_pickled_and_no_matrix_twice(folders: dict[bool, Path]) -> None:
    for tied, folder in folders.items():
        assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".py", ".jinja"}
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
            count = sum(file.get_tensor(name).numel() for name in names)
            assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
        assert ("lm_head.weight" in names) != tied
        assert count == tiny_models.shape(tied).parameters


def test_tokenizer_travels_along(tokenizer: PreTrainedTokenizerFast, folders: dict[bool, Path]) -> None:
    text = "the theme of 300 €"
    assert AutoTokenizer.from_pretrained(folders[True])(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_plain_llama_stays_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_models.randomise(LlamaForCausalLM(tiny_models.llama_config()))
    write_huggingface(model, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is LlamaForCausalLM
    np.testing.assert_array_equal(tiny_models.torch_logits(loaded, IDS), tiny_models.torch_logits(model, IDS))


def test_large_models_come_in_several_files(
    models: dict[bool, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.huggingface.MAX_SHARD_SIZE", "100KB")
    write_huggingface(tiny_models.heterogeneous(), tokenizer, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = tiny_models.torch_logits(models[True], IDS)
    np.testing.assert_allclose(tiny_models.torch_logits(loaded, IDS), expected, rtol=0, atol=1e-5)
