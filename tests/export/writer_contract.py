"""What every writer must hold to, against torch: subclassed in `test_onnx.py` and `test_openvino.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM, PreTrainedModel

from export import BUILDERS
from export.decoder import Decoder, decoder_from_model, random_decoder
from hw_profiles.runtimes import SCALE_BYTES, Session, runtime
from hw_profiles.shapes import HIDDEN_ACTS, BlockShape, ModelShape, Precision

from . import tiny_models

PROMPT, FED = 9, 20
Sessions = Callable[[PreTrainedModel, Precision], Session]


class WriterContract:
    runtime: str
    tolerance: dict[Precision, float]
    #: At most those of the graph of a few layers without its weights.
    graph_bytes: int
    #: Of MLPs, that it computes behind a gate.
    activations: tuple[str, ...] = HIDDEN_ACTS
    #: Whether the cache has room for all tokens from the first on.
    reserves_cache: bool

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every precision that the writer knows, in tests that name none."""
        named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
        if "precision" in metafunc.fixturenames and "precision" not in named:
            metafunc.parametrize("precision", self.tolerance)

    @staticmethod
    def write(decoder: Decoder, directory: Path) -> Path:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def sessions(self, tmp_path_factory: pytest.TempPathFactory) -> Sessions:
        """Each file is written and compiled once, and comes with an empty cache."""
        kept: dict[tuple[int, Precision], Session] = {}

        def get(model: PreTrainedModel, precision: Precision) -> Session:
            key = id(model), precision
            if key not in kept:
                kept[key] = self.load(model, precision, tmp_path_factory.mktemp("model"))
            kept[key].reset()
            return kept[key]

        return get

    def load(self, model: PreTrainedModel, precision: Precision, directory: Path) -> Session:
        self.write(decoder_from_model(model, precision), directory)
        return runtime(self.runtime).load(directory, threads=1, max_tokens=tiny_models.MAX_POSITIONS)

    @pytest.mark.parametrize("tied", [True, False])
    def test_logits_are_those_of_torch(
        self, models: dict[bool, PreTrainedModel], sessions: Sessions, tied: bool, precision: Precision
    ) -> None:
        ids = tiny_models.tokens(FED)
        expected = tiny_models.torch_logits(tiny_models.rounded(models[tied], precision), ids)[:, PROMPT - 1 :]
        found = tiny_models.session_logits(sessions(models[tied], precision), ids, PROMPT)
        np.testing.assert_allclose(found, expected, rtol=0, atol=self.tolerance[precision])
        # the comparison sees the rounding: torch with the weights of another precision is far off
        other: Precision = "int4" if precision != "int4" else "int8"
        far = tiny_models.torch_logits(tiny_models.rounded(models[tied], other), ids)[:, PROMPT - 1 :]
        assert np.abs(found - far).max() > 10 * self.tolerance[precision]

    @pytest.mark.parametrize("precision", ["fp32", "int4"])
    def test_a_batch_is_its_sequences(
        self, models: dict[bool, PreTrainedModel], sessions: Sessions, precision: Precision
    ) -> None:
        ids = tiny_models.tokens(FED, batch=2)
        expected = tiny_models.torch_logits(tiny_models.rounded(models[True], precision), ids)[:, PROMPT - 1 :]
        found = tiny_models.session_logits(sessions(models[True], precision), ids, PROMPT)
        np.testing.assert_allclose(found, expected, rtol=0, atol=self.tolerance[precision])

    def test_reset_forgets_the_sequence_before(self, models: dict[bool, PreTrainedModel], sessions: Sessions) -> None:
        session = sessions(models[True], "fp32")
        ids = tiny_models.tokens(FED)
        first = tiny_models.session_logits(session, ids, PROMPT)
        session.reset()
        tiny_models.session_logits(session, tiny_models.tokens(31, batch=3, seed=5), 4)
        remembered = session.step(np.repeat(ids[:, :1].numpy(), 3, axis=0))
        assert np.abs(remembered[0] - tiny_models.torch_logits(models[True], ids[:, :1])[0, -1]).max() > 0.1
        session.reset()
        np.testing.assert_allclose(tiny_models.session_logits(session, ids, PROMPT), first, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("prompt", [1, 2, 7, FED])
    def test_any_split_of_the_text_gives_the_same_logits(
        self, models: dict[bool, PreTrainedModel], sessions: Sessions, prompt: int
    ) -> None:
        ids = tiny_models.tokens(FED, seed=4)
        last = tiny_models.session_logits(sessions(models[False], "fp32"), ids, prompt)[:, -1]
        expected = tiny_models.torch_logits(models[False], ids)[:, -1]
        np.testing.assert_allclose(last, expected, rtol=0, atol=self.tolerance["fp32"])

    def test_the_last_positions_that_the_model_knows(
        self, models: dict[bool, PreTrainedModel], sessions: Sessions
    ) -> None:
        ids = tiny_models.tokens(tiny_models.MAX_POSITIONS, seed=6)
        found = tiny_models.session_logits(sessions(models[True], "fp32"), ids, 60)
        expected = tiny_models.torch_logits(models[True], ids)[:, 59:]
        np.testing.assert_allclose(found, expected, rtol=0, atol=self.tolerance["fp32"])

    def test_a_plain_llama(self, tmp_path: Path) -> None:
        model = tiny_models.randomise(LlamaForCausalLM(tiny_models.llama_config(tied=False, num_hidden_layers=2)))
        self._expect_parity(model, tmp_path)

    @pytest.mark.parametrize("family", ["qwen2", "qwen3", *tiny_models.GEMMA, *tiny_models.OTHER_SIZES])
    def test_families_that_are_no_llamas(self, family: str, precision: Precision, tmp_path: Path) -> None:
        model = tiny_models.heterogeneous(family=family)
        decoder = decoder_from_model(model, precision)
        self._expect_parity(model, tmp_path, precision)
        wanted = decoder.shape.weight_bytes(precision, SCALE_BYTES[self.runtime])
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024
        timed = tmp_path / "timed"
        timed.mkdir()
        assert self.operators(self.write(random_decoder(decoder.shape, precision), timed)) == self.operators(
            self.write(decoder, timed)
        )

    @pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
    def test_a_gemma_whose_attention_is_of_one_kind(self, kind: str, tmp_path: Path) -> None:
        """The others' is skipped, and their rotary embedding with them."""
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        blocks = tuple(BlockShape(4, 2, 96) if found == kind else BlockShape(0, 0, 64) for found in kinds)
        self._expect_parity(tiny_models.heterogeneous(blocks=blocks, family="gemma3_text"), tmp_path)

    def test_biases_and_activations(self, tmp_path: Path) -> None:
        for activation in self.activations:
            fields = {"attention_bias": True, "mlp_bias": True, "hidden_act": activation, "num_hidden_layers": 2}
            folder = tmp_path / activation
            folder.mkdir()
            self._expect_parity(tiny_models.randomise(LlamaForCausalLM(tiny_models.llama_config(**fields))), folder)

    def test_scaled_rotary_embedding(self, tmp_path: Path) -> None:
        scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = {**scaling, "rope_theta": 300.0, "original_max_position_embeddings": 64}
        config = tiny_models.llama_config(num_hidden_layers=2, rope_parameters=rope)
        model = tiny_models.randomise(LlamaForCausalLM(config))
        self._expect_parity(model, tmp_path)
        ids = tiny_models.tokens(FED)
        unscaled = LlamaForCausalLM(tiny_models.llama_config(num_hidden_layers=2))
        unscaled.load_state_dict(model.state_dict())
        difference = tiny_models.torch_logits(unscaled.eval(), ids) - tiny_models.torch_logits(model, ids)
        assert np.abs(difference).max() > 100 * self.tolerance["fp32"]

    @pytest.mark.parametrize(
        "blocks",
        [
            (BlockShape(0, 0, 0), BlockShape(4, 2, 96), BlockShape(0, 0, 0)),
            (BlockShape(0, 0, 64), BlockShape(2, 1, 0)),
            (BlockShape(2, 2, 0), BlockShape(4, 4, 0)),
        ],
        ids=["empty ends", "MLP first, attention last", "no MLP"],
    )
    def test_parts_skipped_at_either_end(self, blocks: tuple[BlockShape, ...], tmp_path: Path) -> None:
        self._expect_parity(tiny_models.heterogeneous(blocks=blocks), tmp_path)

    @pytest.mark.parametrize("tied", [True, False])
    def test_size_on_disk(self, tied: bool, precision: Precision, tmp_path: Path) -> None:
        """No matrix is stored twice, least of all an embedding that is the head as well."""
        shape = ModelShape(256, 64, 2048, tied, (BlockShape(4, 2, 512), BlockShape(0, 0, 256), BlockShape(2, 1, 0)))
        self.write(replace(random_decoder(shape, precision), max_position_embeddings=16), tmp_path)
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        wanted = shape.weight_bytes(precision, SCALE_BYTES[self.runtime])
        assert wanted <= size <= wanted * 1.02 + self.graph_bytes

    @pytest.mark.parametrize("tied", [True, False])
    def test_weights_on_disk(
        self, models: dict[bool, PreTrainedModel], tied: bool, precision: Precision, tmp_path: Path
    ) -> None:
        """What a budget of size counts, to a KiB of small constants."""
        decoder = decoder_from_model(models[tied], precision)
        self.write(decoder, tmp_path)
        wanted = decoder.shape.weight_bytes(precision, SCALE_BYTES[self.runtime])
        assert 0 <= self.weight_bytes(tmp_path) - wanted <= 1024

    @staticmethod
    def weight_bytes(directory: Path) -> int:
        """Of all weights in the files, without tables of the positions and the gaps before pages."""
        raise NotImplementedError

    def test_the_cache_holds_what_the_shape_says(self, models: dict[bool, PreTrainedModel], sessions: Sessions) -> None:
        session = sessions(models[True], "int4")
        tiny_models.session_logits(session, tiny_models.tokens(9, batch=2), 4)
        positions = tiny_models.MAX_POSITIONS if self.reserves_cache else 9
        assert self.cache_bytes(session) == tiny_models.shape(tied=True).kv_cache_bytes(positions, batch_size=2)

    @staticmethod
    def cache_bytes(session: Session) -> int:
        """Of what the runtime itself says that it holds."""
        raise NotImplementedError

    def test_the_profiler_builds_the_same_graph(self, tmp_path: Path) -> None:
        path = BUILDERS[self.runtime](tiny_models.shape(tied=True), "int4", tmp_path)
        assert path.parent == tmp_path
        built = runtime(self.runtime).load(tmp_path, threads=1, max_tokens=32)
        logits = tiny_models.session_logits(built, tiny_models.tokens(6), 4)
        assert logits.shape == (1, 3, tiny_models.VOCAB_SIZE)
        assert np.isfinite(logits).all()
        assert self.operators(path) == self.operators(
            self.write(decoder_from_model(tiny_models.heterogeneous(), "int4"), tmp_path)
        )

    @staticmethod
    def operators(path: Path) -> list[str]:
        raise NotImplementedError

    def _expect_parity(self, model: PreTrainedModel, directory: Path, precision: Precision = "fp32") -> None:
        ids = tiny_models.tokens(FED)
        found = tiny_models.session_logits(self.load(model, precision, directory), ids, PROMPT)
        expected = tiny_models.torch_logits(tiny_models.rounded(model, precision), ids)[:, PROMPT - 1 :]
        np.testing.assert_allclose(found, expected, rtol=0, atol=self.tolerance[precision])
