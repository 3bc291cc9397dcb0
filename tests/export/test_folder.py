from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.decoder import decoder_from_model
from export.folder import generation_config
from export.genai_config import write_genai_config
from export.onnx import write_onnx
from export.openvino import write_openvino, write_openvino_tokenizer
from export.tokenizer_files import write_tokenizer
from hw_profiles.runtimes.openvino import compile_properties
from tests.genai import genai_tokens

from . import tiny_models


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_models.heterogeneous()


def test_a_text_ends_where_tokenizer_or_model_say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    found = generation_config(model, tokenizer)
    assert (found.eos_token_id, found.pad_token_id, found.do_sample) == (tiny_models.EOS, tiny_models.EOS, False)
    model.generation_config.eos_token_id = [7, tiny_models.EOS, 9]
    found = generation_config(model, tokenizer)
    assert (found.eos_token_id, found.pad_token_id) == ([tiny_models.EOS, 7, 9], tiny_models.EOS)


def test_prompts_of_a_batch_may_differ_in_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """onnxruntime-genai fills the shorter ones up on the right."""
    genai = pytest.importorskip("onnxruntime_genai")
    decoder = decoder_from_model(model, "fp32")
    write_tokenizer(tokenizer, tmp_path)
    write_onnx(decoder, tmp_path)
    write_genai_config(decoder, generation_config(model, tokenizer), tmp_path)
    texts = ["the theme of it", "abc", "of a theme"]
    loaded = genai.Model(str(tmp_path))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=24, do_sample=False, batch_size=len(texts))
    generator = genai.Generator(loaded, params)
    prompts = genai.Tokenizer(loaded).encode_batch(texts)
    generator.append_tokens(prompts)
    for _ in range(6):
        generator.generate_next_token()
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        found = [int(token) for token in generator.get_sequence(row)][longest:]
        assert found == tiny_models.greedy(model, ids, 6)


def test_runtimes_end_at_any_of_several_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    openvino, openvino_genai = pytest.importorskip("openvino"), pytest.importorskip("openvino_genai")
    ids = tiny_models.tokens(11)
    free = tiny_models.greedy(model, ids, 16)
    end = next(token for token in free[4:] if token not in free[:4])  # a token that comes up first after a few others
    expected = free[: free.index(end)]
    model.generation_config.eos_token_id = [end, tiny_models.EOS]
    decoder, generation = decoder_from_model(model, "fp32"), generation_config(model, tokenizer)

    for folder in ("onnx", "openvino"):
        (tmp_path / folder).mkdir()
        generation.save_pretrained(tmp_path / folder)
    write_onnx(decoder, tmp_path / "onnx")
    write_genai_config(decoder, generation, tmp_path / "onnx")
    assert genai_tokens(tmp_path / "onnx", ids[0].tolist(), 29) == expected

    write_openvino(decoder, tmp_path / "openvino")
    write_openvino_tokenizer(tokenizer, tmp_path / "openvino")
    pipeline = openvino_genai.LLMPipeline(str(tmp_path / "openvino"), "CPU", **compile_properties(1))
    config = pipeline.get_generation_config()
    config.max_new_tokens = 29
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids.numpy()), openvino.Tensor(np.ones((1, 11), np.int64)))
    assert list(pipeline.generate(inputs, config).tokens[0]) == [*expected, end]
