from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from transformers import GenerationConfig, PreTrainedModel

import export.onnx
from export.decoder import Decoder, decoder_from_model, random_decoder
from export.genai_config import write_genai_config
from export.onnx import DATA_FILE, MODEL_FILE, write_onnx
from hw_profiles.runtimes import Session, runtime
from hw_profiles.shapes import BlockShape, Precision
from tests.genai import genai_tokens

from . import tiny_models
from .writer_contract import FED, PROMPT, WriterContract

UNEQUAL = (BlockShape(4, 2, 96), BlockShape(4, 1, 0), BlockShape(2, 2, 64))


class TestOnnx(WriterContract):
    """With MatMulNBits computing in fp32; what rounded activations do to the logits is measured further down."""

    runtime = "onnxruntime"
    tolerance = {"fp32": 1e-4, "fp16": 1e-4, "int8": 1e-3, "int4": 1e-3}  # noqa: RUF012
    graph_bytes = 12_000
    reserves_cache = True

    @staticmethod
    def write(decoder: Decoder, directory: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export.onnx, "ACCURACY_LEVEL", 0)
            return write_onnx(decoder, directory)

    @staticmethod
    def weight_bytes(directory: Path) -> int:
        model = onnx.load(directory / MODEL_FILE)
        tensors = [tensor for tensor in model.graph.initializer if not tensor.name.endswith(("cos_cache", "sin_cache"))]
        return sum(numpy_helper.to_array(tensor).nbytes for tensor in tensors)

    @staticmethod
    def cache_bytes(session: Session) -> int:
        return sum(buffer.numpy().nbytes for buffer in session._past.values())  # type: ignore[attr-defined]

    @staticmethod
    def operators(path: Path) -> list[str]:
        return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_shipped_files_round_activations_a_little(
    models: dict[bool, PreTrainedModel], tied: bool, precision: Precision, tmp_path: Path
) -> None:
    path = write_onnx(decoder_from_model(models[tied], precision), tmp_path)
    levels = [
        attribute.i
        for node in onnx.load(path, load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert set(levels) == {4}
    session = runtime("onnxruntime").load(tmp_path, threads=1, max_tokens=32)
    ids = tiny_models.tokens(FED)
    found = tiny_models.session_logits(session, ids, PROMPT)
    expected = tiny_models.torch_logits(tiny_models.rounded(models[tied], precision), ids)[:, PROMPT - 1 :]
    unrounded = tiny_models.torch_logits(models[tied], ids)[:, PROMPT - 1 :]
    kl = tiny_models.mean_kl(expected, found)
    assert kl < 0.02
    if precision == "int4":  # rounding the activations costs far less than rounding the weights did
        assert kl < 0.1 * tiny_models.mean_kl(unrounded, expected)


def test_the_data_file_holds_the_tensors_and_gaps_before_pages(tmp_path: Path) -> None:
    decoder = random_decoder(tiny_models.shape(tied=True), "int8")
    path = write_onnx(decoder, tmp_path)
    tensors = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    sizes = [int(entry.value) for t in tensors for entry in t.external_data if entry.key == "length"]
    tables = decoder.max_position_embeddings * tiny_models.HEAD_DIM * 4
    assert sorted(sizes)[-3:].count(tables // 2) == 2
    assert 0 <= (tmp_path / DATA_FILE).stat().st_size - sum(sizes) < 4096 * len(sizes)


def test_two_files_and_one_buffer_for_past_and_present(models: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    path = write_onnx(decoder_from_model(models[True], "int4"), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [MODEL_FILE, DATA_FILE]
    assert path.stat().st_size < 64 * 1024
    assert runtime("onnxruntime").load(tmp_path, threads=1, max_tokens=32).shares_cache


def _expect_torchs_tokens(model: PreTrainedModel, precision: Precision, directory: Path) -> None:
    ids = tiny_models.tokens(11)
    expected = tiny_models.greedy(tiny_models.rounded(model, precision), ids, 24)
    decoder = decoder_from_model(model, precision)
    TestOnnx.write(decoder, directory)
    unused = min(set(range(tiny_models.VOCAB_SIZE)) - set(expected))  # so that the text does not end early
    generation = GenerationConfig(bos_token_id=unused, eos_token_id=unused, pad_token_id=unused)
    write_genai_config(decoder, generation, directory)
    assert genai_tokens(directory, ids[0].tolist(), 24) == expected


@pytest.mark.parametrize("precision", TestOnnx.tolerance)
@pytest.mark.parametrize("tied", [True, False])
def test_genai_generates_torchs_tokens(
    models: dict[bool, PreTrainedModel], tied: bool, precision: Precision, tmp_path: Path
) -> None:
    """Layers with three, two, one and no KV heads, of which the config of onnxruntime-genai knows only the most."""
    _expect_torchs_tokens(models[tied], precision, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", *tiny_models.GEMMA, *tiny_models.OTHER_SIZES])
def test_genai_with_other_families(family: str, tmp_path: Path) -> None:
    _expect_torchs_tokens(tiny_models.heterogeneous(family=family), "int4", tmp_path)


def test_genai_with_unequal_heads_per_kv_head(tmp_path: Path) -> None:
    _expect_torchs_tokens(tiny_models.heterogeneous(blocks=UNEQUAL), "fp32", tmp_path)


def test_unequal_heads_per_kv_head(tmp_path: Path) -> None:
    model, ids = tiny_models.heterogeneous(blocks=UNEQUAL), tiny_models.tokens(FED)
    session = TestOnnx().load(model, "fp32", tmp_path)
    found = tiny_models.session_logits(session, ids, PROMPT)
    np.testing.assert_allclose(found, tiny_models.torch_logits(model, ids)[:, PROMPT - 1 :], rtol=0, atol=1e-4)


def test_genai_config_counts_the_slots_of_the_cache(models: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    decoder = decoder_from_model(models[True], "fp32")
    generation = GenerationConfig(bos_token_id=1, eos_token_id=tiny_models.EOS, pad_token_id=0)
    write_genai_config(decoder, generation, tmp_path)
    model = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert model["decoder"]["num_hidden_layers"] == 3
    assert model["decoder"]["head_size"] == tiny_models.HEAD_DIM
    assert model["context_length"] == tiny_models.MAX_POSITIONS
    assert (model["eos_token_id"], model["pad_token_id"]) == (tiny_models.EOS, 0)


def test_bf16_is_refused(models: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got bf16; take another or openvino"):
        write_onnx(decoder_from_model(models[True], "bf16"), tmp_path)
    assert not list(tmp_path.iterdir())
