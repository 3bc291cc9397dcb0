from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export import openvino
from export.decoder import AttentionWeights, Decoder, decoder_from_model
from export.openvino import MODEL_FILE, openvino_model, write_openvino, write_openvino_tokenizer
from hw_profiles.devices import detect
from hw_profiles.runtimes import Session, runtime
from hw_profiles.runtimes.openvino import OpenVinoSession, arithmetic, compile_properties
from hw_profiles.shapes import PRECISIONS, BlockShape, Precision

from . import tiny_models
from .writer_contract import FED, PROMPT, WriterContract


class TestOpenVino(WriterContract):
    """Computing in fp32; what bf16 arithmetic does to the logits is measured further down."""

    runtime = "openvino"
    tolerance = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 1e-4, "int8": 1e-3, "int4": 1e-3}  # noqa: RUF012
    graph_bytes = 300_000
    reserves_cache = False

    @staticmethod
    def write(decoder: Decoder, directory: Path) -> Path:
        return write_openvino(replace(decoder, precision="fp32"), directory)  # the matrices stay as they are

    @staticmethod
    def weight_bytes(directory: Path) -> int:
        return (directory / MODEL_FILE).with_suffix(".bin").stat().st_size

    @staticmethod
    def cache_bytes(session: Session) -> int:
        return sum(state.state.byte_size for state in session._request.query_state())  # type: ignore[attr-defined]

    @staticmethod
    def operators(path: Path) -> list[str]:
        return sorted(operation.get_type_name() for operation in ov.Core().read_model(path).get_ops())


def test_logits_of_every_prompt_token(models: dict[bool, PreTrainedModel]) -> None:
    """[B, S, V], where the runtimes look at the last position only."""
    ids = tiny_models.tokens(FED, batch=2)
    compiled = ov.compile_model(openvino_model(decoder_from_model(models[True], "fp32")), "CPU", compile_properties(1))
    inputs = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((2, FED), np.int64),
        "position_ids": np.tile(np.arange(FED), (2, 1)),
        "beam_idx": np.arange(2, dtype=np.int32),
    }
    found = compiled(inputs)["logits"]
    np.testing.assert_allclose(found, tiny_models.torch_logits(models[True], ids), rtol=0, atol=1e-4)


def test_left_padding_and_reordered_beams(models: dict[bool, PreTrainedModel]) -> None:
    """What `LLMPipeline` does with batches of unequal prompts and in beam search."""
    model, long, short = models[False], tiny_models.tokens(8), tiny_models.tokens(5, seed=2)
    request = ov.compile_model(
        openvino_model(decoder_from_model(model, "fp32")), "CPU", compile_properties(1)
    ).create_infer_request()
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    padded = torch.cat([long, torch.nn.functional.pad(short, (3, 0))])
    request.infer(
        {
            "input_ids": padded.numpy(),
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": np.arange(2, dtype=np.int32),
        }
    )
    first = request.get_tensor("logits").data[:, -1].copy()
    np.testing.assert_allclose(first[0], tiny_models.torch_logits(model, long)[0, -1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(first[1], tiny_models.torch_logits(model, short)[0, -1], rtol=0, atol=1e-4)
    # the beams change places: row 0 goes on from the short prompt
    request.infer(
        {
            "input_ids": np.array([[7], [9]]),
            "attention_mask": np.concatenate([mask[::-1], np.ones((2, 1), np.int64)], axis=1),
            "position_ids": np.array([[5], [8]]),
            "beam_idx": np.array([1, 0], np.int32),
        }
    )
    second = request.get_tensor("logits").data[:, -1]
    for row, (prompt, token) in enumerate([(short, 7), (long, 9)]):
        expected = tiny_models.torch_logits(model, torch.cat([prompt, torch.tensor([[token]])], dim=1))[0, -1]
        np.testing.assert_allclose(second[row], expected, rtol=0, atol=1e-4)


def test_the_file_asks_for_the_numbers_that_were_verified(models: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    """With no properties but fp32 arithmetic, int4 logits are those of torch: no cache or activation in 8 bits."""
    ids = tiny_models.tokens(FED)
    compiled = ov.compile_model(
        ov.Core().read_model(write_openvino(decoder_from_model(models[True], "int4"), tmp_path)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    found = compiled(
        {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((1, FED), np.int64),
            "position_ids": np.arange(FED)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
    )["logits"]
    expected = tiny_models.torch_logits(tiny_models.rounded(models[True], "int4"), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_genai_pipeline_generates_torchs_tokens(
    models: dict[bool, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tied: bool,
    precision: Precision,
    tmp_path: Path,
) -> None:
    _expect_torchs_tokens(models[tied], tokenizer, precision, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", *tiny_models.GEMMA, *tiny_models.OTHER_SIZES])
def test_genai_pipeline_with_other_families(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    backends = ("SDPA",) if family == "gemma2" else ("PA", "SDPA")  # OpenVINO pages no capped scores
    _expect_torchs_tokens(tiny_models.heterogeneous(family=family), tokenizer, "int4", tmp_path, backends)


def _expect_torchs_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    directory: Path,
    backends: Sequence[str] = ("PA", "SDPA"),
) -> None:
    """With paged attention, which OpenVINO Model Server runs as well, and without."""
    import openvino_genai

    write_openvino(decoder_from_model(model, precision), directory)
    write_openvino_tokenizer(tokenizer, directory)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = 24, False, True
    reference = tiny_models.rounded(model, precision)
    prompts = [tiny_models.tokens(11, seed=seed) for seed in (1, 2)]  # the second must not see the first
    expected = [tiny_models.greedy(reference, ids, 24) for ids in prompts]
    for backend in backends:
        properties = {**compile_properties(1), "ATTENTION_BACKEND": backend}
        pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", **properties)
        for ids, tokens in zip(prompts, expected, strict=True):
            inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids.numpy()), ov.Tensor(np.ones((1, 11), np.int64)))
            assert list(pipeline.generate(inputs, config).tokens[0]) == tokens, backend


def test_unequal_heads_per_kv_head_are_refused(tmp_path: Path) -> None:
    """LLMPipeline's paged attention (OpenVINO 2026.4) computes them wrongly, or corrupts the heap and aborts."""
    model = tiny_models.heterogeneous(blocks=(BlockShape(4, 2, 96), BlockShape(0, 0, 64), BlockShape(2, 2, 64)))
    with pytest.raises(ValueError, match="1, 2"):
        write_openvino(decoder_from_model(model, "fp32"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizer_models_tokenize_alike(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import openvino_genai

    write_openvino_tokenizer(tokenizer, tmp_path)
    converted = openvino_genai.Tokenizer(str(tmp_path))
    for text in ("the theme", "Zürich: 300 €\n\tthen 中文"):
        ids = converted.encode(text).input_ids.data[0].tolist()
        assert ids == tokenizer(text)["input_ids"]
        assert converted.decode(ids) == text


@pytest.mark.parametrize(("largest_stacked", "of_attention", "of_mlp"), [(0, 4, 3), (2**22, 2, 2)])
def test_fp16_matrices_stay_compressed(
    models: dict[bool, PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest_stacked: int,
    of_attention: int,
    of_mlp: int,
) -> None:
    """Of all constants these alone are marked, as the plugins want it."""
    monkeypatch.setattr(openvino, "_STACKED_WEIGHTS", largest_stacked)
    decoder = decoder_from_model(models[True], "fp16")
    model = ov.Core().read_model(write_openvino(decoder, tmp_path))
    marked = sum("decompression_0" in node.get_rt_info() for node in model.get_ops())
    parts = [part for layer in decoder.layers for part in (layer.attention, layer.mlp)]
    matrices = [of_attention if isinstance(part, AttentionWeights) else of_mlp for part in parts if part is not None]
    assert marked == 1 + sum(matrices)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert marked == sum(node.get_element_type() == ov.Type.f16 for node in constants)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_stacked_matrices_are_those_of_each(
    models: dict[bool, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    found = []
    for largest in (0, 2**22):
        monkeypatch.setattr(openvino, "_STACKED_WEIGHTS", largest)
        (folder := tmp_path / str(largest)).mkdir()
        write_openvino(decoder_from_model(models[False], precision), folder)
        compiled = ov.Core().compile_model(folder / MODEL_FILE, "CPU", compile_properties(1))
        session = OpenVinoSession(compiled, tiny_models.MAX_POSITIONS)
        found.append(tiny_models.session_logits(session, tiny_models.tokens(FED), PROMPT))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_bf16_files_ask_for_bf16_arithmetic(models: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    """The numbers in the file are exact (the contract), and what the arithmetic adds is little."""
    if not detect().has_bf16:
        pytest.skip("this CPU has no bf16 instructions")
    write_openvino(decoder_from_model(models[True], "bf16"), tmp_path)
    assert arithmetic(ov.Core().read_model(tmp_path / "openvino_model.xml")) == "bf16"
    session = runtime("openvino").load(tmp_path, threads=1, max_tokens=tiny_models.MAX_POSITIONS)
    ids = tiny_models.tokens(FED)
    found = tiny_models.session_logits(session, ids, PROMPT)
    expected = tiny_models.torch_logits(tiny_models.rounded(models[True], "bf16"), ids)[:, PROMPT - 1 :]
    assert np.abs(found - expected).max() > 1e-3
    assert tiny_models.mean_kl(expected, found) < 5e-3
