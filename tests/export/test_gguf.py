"""GGUF files against torch, in llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from export.decoder import Decoder, decoder_from_model, random_decoder
from export.gguf import MODEL_FILE, write_fp32_copy, write_gguf
from hw_profiles.runtimes import Session, runtime
from hw_profiles.runtimes.llamacpp import LlamaCppRuntime
from hw_profiles.shapes import BlockShape, ModelShape, Precision

from . import tiny_models
from .writer_contract import FED, PROMPT, Sessions, WriterContract

PLAIN = (BlockShape(4, 2, 96), BlockShape(4, 2, 96))
GEMMA2 = replace(
    tiny_models.shape(tied=True),
    blocks=PLAIN,
    post_norms=True,
    scaled_embedding=True,
    hidden_act="gelu_pytorch_tanh",
    windows=(6, 0),
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)


class TestGguf(WriterContract):
    """Of the weights in the file, its cache and its activations in fp32; what rounding these does is further down."""

    runtime = "llamacpp"
    activations = ("silu",)
    tolerance = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-4, "int8": 1e-3, "int4": 1e-3}  # noqa: RUF012
    graph_bytes = 12_000
    reserves_cache = True

    @staticmethod
    def write(decoder: Decoder, directory: Path) -> Path:
        return write_gguf(decoder, directory)

    def load(self, model: PreTrainedModel, precision: Precision, directory: Path) -> Session:
        path = self.write(decoder_from_model(model, precision), directory)
        (directory / "fp32").mkdir()
        copy = write_fp32_copy(path, directory / "fp32" / MODEL_FILE)
        return LlamaCppRuntime().load_exact(copy, 1, tiny_models.MAX_POSITIONS)

    @staticmethod
    def weight_bytes(directory: Path) -> int:
        return sum(tensor.n_bytes for tensor in gguf.GGUFReader(directory / MODEL_FILE).tensors)

    def test_the_cache_holds_what_the_shape_says(self, models: dict[bool, PreTrainedModel], sessions: Sessions) -> None:
        """llama.cpp says what the positions of one sequence take, with 12 bytes for where each of them is."""
        session = sessions(models[True], "int4")
        sizes = []
        for length in (9, 10):
            session.reset(batch_size=2)
            session.step(tiny_models.tokens(length, batch=2).numpy())
            sizes.append(llama_cpp.llama_state_seq_get_size(session._context.pointer, 1))  # type: ignore[attr-defined]
        assert 0 <= sizes[1] - sizes[0] - tiny_models.shape(tied=True).kv_cache_bytes(1) <= 12

    @staticmethod
    def operators(path: Path) -> list[str]:
        """The graph is llama.cpp's: what it follows from are the architecture and the tensors."""
        reader = gguf.GGUFReader(path)
        tensors = [f"{t.name} {t.tensor_type.name} {t.shape.tolist()}" for t in reader.tensors]
        return [reader.fields["general.architecture"].contents(), *sorted(tensors)]

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_families_that_are_no_llamas(self, family: str, precision: Precision, tmp_path: Path) -> None:
        model = tiny_models.heterogeneous(blocks=PLAIN, family=family)
        self._expect_parity(model, tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == family
        wanted = decoder_from_model(model, precision).shape.weight_bytes(precision)
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024

    @pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
    def test_a_gemma_whose_attention_is_of_one_kind(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="wanted layers of one shape"):
            super().test_a_gemma_whose_attention_is_of_one_kind(kind, tmp_path)

    @pytest.mark.parametrize("factor", [None, 4.0])
    def test_gemma3(
        self, precision: Precision, factor: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Windows in two layers of three, scores scaled by the head's size, the only scale that llama.cpp has.

        Its GELU is a table in half precision.
        """
        monkeypatch.setattr(self, "tolerance", dict.fromkeys(self.tolerance, 0.02))
        gemma3 = tiny_models.GEMMA["gemma3_text"]
        monkeypatch.setitem(gemma3, "query_pre_attn_scalar", tiny_models.HEAD_DIM)
        if factor is not None:  # as in the models from 4B on
            rope = gemma3["rope_parameters"]
            scaled = rope | {"full_attention": rope["full_attention"] | {"rope_type": "linear", "factor": factor}}
            monkeypatch.setitem(gemma3, "rope_parameters", scaled)
        model = tiny_models.heterogeneous(blocks=(BlockShape(4, 2, 96),) * 4, family="gemma3_text")
        self._expect_parity(model, tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "gemma3"
        wanted = decoder_from_model(model, precision).shape.weight_bytes(precision)
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024

    def test_gemma2(self, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A window in every second layer, capped scores and logits; its GELU is a table in half precision."""
        monkeypatch.setattr(self, "tolerance", dict.fromkeys(self.tolerance, 0.02))
        own = {"query_pre_attn_scalar": tiny_models.HEAD_DIM, "layer_types": None}
        monkeypatch.setitem(tiny_models.GEMMA, "gemma2", tiny_models.GEMMA["gemma2"] | own)
        model = tiny_models.heterogeneous(blocks=(BlockShape(4, 2, 96),) * 4, family="gemma2")
        self._expect_parity(model, tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "gemma2"
        wanted = decoder_from_model(model, precision).shape.weight_bytes(precision)
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024

    @pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
    def test_layer_norms(
        self, family: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Queries, keys and values in one matrix, positions learned or half of each head rotating.

        Its GELU is a table in half precision, of the tanh form also where GPT-NeoX has the other.
        """
        monkeypatch.setattr(self, "tolerance", dict.fromkeys(self.tolerance, 0.03))
        model = tiny_models.heterogeneous(blocks=(BlockShape(4, 4, 96),) * 2, family=family, tied=family == "gpt2")
        self._expect_parity(model, tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == family.replace("_", "")
        wanted = decoder_from_model(model, precision).shape.weight_bytes(precision)
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024

    def test_biases_everywhere(self, precision: Precision, tmp_path: Path) -> None:
        fields = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}
        model = tiny_models.randomise(LlamaForCausalLM(tiny_models.llama_config(**fields)))
        self._expect_parity(model, tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "llama"

    def test_layers_with_biases_that_differ(self, precision: Precision, tmp_path: Path) -> None:
        self._expect_parity(tiny_models.heterogeneous(family="qwen2"), tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "deci"

    def test_query_heads_per_group_that_differ(self, precision: Precision, tmp_path: Path) -> None:
        blocks = (BlockShape(4, 2, 96), BlockShape(2, 2, 64), BlockShape(4, 1, 64), BlockShape(6, 2, 96))
        self._expect_parity(tiny_models.heterogeneous(blocks=blocks), tmp_path, precision)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "deci"

    def test_attention_meets_the_mlp_of_the_next_layer(self, tmp_path: Path) -> None:
        """An attention without MLP and an MLP without attention are one layer of llama.cpp's, without zeros."""
        blocks = (BlockShape(4, 2, 0), BlockShape(0, 0, 0), BlockShape(0, 0, 96), BlockShape(4, 2, 96))
        model = tiny_models.heterogeneous(blocks=blocks)
        self._expect_parity(model, tmp_path)
        assert self.operators(tmp_path / MODEL_FILE)[0] == "llama"
        wanted = decoder_from_model(model, "fp32").shape.weight_bytes("fp32")
        assert self.weight_bytes(tmp_path) == wanted


def test_layers_alike_are_the_familys_own_architecture(tmp_path: Path) -> None:
    """Loaded back by transformers, which shares nothing with the writer."""
    model = tiny_models.heterogeneous(blocks=PLAIN)
    write_gguf(decoder_from_model(model, "fp32"), tmp_path, {"tokenizer.ggml.model": "gpt2"} | _no_tokens())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=MODEL_FILE)
    ids = tiny_models.tokens(FED)
    expected = tiny_models.torch_logits(model, ids)
    np.testing.assert_allclose(tiny_models.torch_logits(loaded, ids), expected, rtol=0, atol=1e-4)


def _no_tokens() -> dict[str, object]:
    return {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(tiny_models.VOCAB_SIZE)],
        "tokenizer.ggml.token_type": [1] * tiny_models.VOCAB_SIZE,
        "tokenizer.ggml.merges": ["t 1"],
    }


@pytest.mark.parametrize("precision", TestGguf.tolerance)
def test_shipped_files_round_the_cache_and_activations_a_little(
    models: dict[bool, PreTrainedModel], precision: Precision, tmp_path: Path
) -> None:
    write_gguf(decoder_from_model(models[True], precision), tmp_path)
    session = runtime("llamacpp").load(tmp_path, threads=1, max_tokens=32)
    ids = tiny_models.tokens(FED)
    found = tiny_models.session_logits(session, ids, PROMPT)
    expected = tiny_models.torch_logits(tiny_models.rounded(models[True], precision), ids)[:, PROMPT - 1 :]
    kl = tiny_models.mean_kl(expected, found)
    assert kl < (1e-5 if precision == "fp32" else 0.02)
    if precision == "int4":  # rounding the activations costs far less than rounding the weights did
        unrounded = tiny_models.torch_logits(models[True], ids)[:, PROMPT - 1 :]
        assert kl < 0.1 * tiny_models.mean_kl(unrounded, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(tiny_models.shape(tied=True), qk_norm=True), "since llama.cpp runs Qwen3's and Gemma's norms"),
        (
            replace(GEMMA2, blocks=tiny_models.BLOCKS, windows=(6,) * 5),
            "since llama.cpp runs Qwen3's and Gemma's norms",
        ),
        (replace(GEMMA2, attn_logit_softcapping=0.0), r"both scores and logits in Gemma 2 .* got 0 and 30 in gemma2"),
        (replace(GEMMA2, post_norms=False), r"none elsewhere, .* got 50 and 30 in llama"),
        (replace(GEMMA2, windows=(6, 6)), r"at regular distances, .* got \[6, 6\]"),
        (replace(GEMMA2, tie_word_embeddings=False), "a head tied to the embedding in Gemma 2"),
        (replace(tiny_models.shape(tied=True), blocks=(BlockShape(0, 0, 0),)), "wanted a layer that keeps"),
        (
            replace(tiny_models.shape(tied=True), blocks=PLAIN * 2, windows=(6, 0, 0, 6)),
            r"at regular distances, as llama.cpp runs them, got \[6, 0, 0, 6\]",
        ),
        (
            replace(tiny_models.shape(tied=True), layer_norm=True, gated_mlp=False),
            "layers of one width with all heads, since llama.cpp runs gptneox in such models alone, got 4 shapes",
        ),
        (
            replace(tiny_models.shape(tied=True), blocks=PLAIN, hidden_act="relu"),
            "wanted silu in the MLPs, as llama.cpp's llama has it, got relu; export to openvino or onnx",
        ),
    ],
    ids=[
        "normed heads",
        "norms behind parts",
        "half a cap",
        "caps elsewhere",
        "windows everywhere",
        "another head",
        "nothing kept",
        "irregular windows",
        "layer norms",
        "activation",
    ],
)
def test_what_llamacpp_does_not_compute_is_named(shape: ModelShape, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(random_decoder(shape, "int8"), tmp_path)


def test_scores_scaled_otherwise_are_named(tmp_path: Path) -> None:
    decoder = decoder_from_model(tiny_models.heterogeneous(blocks=PLAIN, family="gemma3_text"), "fp32")
    with pytest.raises(ValueError, match=r"scaled by 0\.25, 1 / sqrt\(head_dim\), as llama.cpp does, got 0\.3015"):
        write_gguf(decoder, tmp_path)


def test_scaled_rotary_embedding_beside_biases_is_named(tmp_path: Path) -> None:
    shape = replace(tiny_models.shape(tied=True), blocks=PLAIN, attention_bias=True)
    decoder = random_decoder(shape, "fp32")
    with pytest.raises(ValueError, match="wanted plain rotary embeddings beside those of qwen2"):
        write_gguf(replace(decoder, inverse_frequencies=decoder.inverse_frequencies / 2), tmp_path)
