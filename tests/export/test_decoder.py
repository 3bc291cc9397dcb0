from __future__ import annotations

import tracemalloc
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from export import dequantize, quantize
from export.decoder import Decoder, PackedMatrix, decoder_from_model, decoder_shape, random_decoder
from hw_profiles.shapes import PRECISIONS, BlockShape, ModelShape, Precision

from . import tiny_models


def _layout(value: Any) -> Any:
    """What a writer sees of a decoder besides the numbers: shapes, types and bits, in the same nesting."""
    if isinstance(value, PackedMatrix):
        return (
            "packed",
            value.bits,
            value.integers.shape,
            value.integers.dtype,
            value.scales.shape,
            value.scales.dtype,
        )
    if value is None or isinstance(value, int):  # a norm that is not there, a window
        return value
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype, value.flags.c_contiguous)
    if isinstance(value, tuple):
        return tuple(map(_layout, value))
    return {field.name: _layout(getattr(value, field.name)) for field in fields(value)}


def _weights(decoder: Decoder) -> tuple[Any, ...]:
    return decoder.embedding, decoder.layers, decoder.norm, decoder.head


def _dense(matrix: Any) -> np.ndarray:
    if getattr(matrix, "dtype", None) == np.uint16:
        return (matrix.astype(np.uint32) << 16).view(np.float32)
    if isinstance(matrix, PackedMatrix):
        return np.repeat(matrix.scales.astype(np.float32), 32, axis=1) * matrix.integers
    return matrix


@pytest.mark.parametrize("tied", [True, False])
def test_shape_of_a_heterogeneous_model(models: dict[bool, PreTrainedModel], tied: bool) -> None:
    shape = decoder_shape(models[tied])
    assert shape == tiny_models.shape(tied)
    assert shape.parameters == sum(parameter.numel() for parameter in models[tied].parameters())


@pytest.mark.parametrize("head_dim", [16, None])
def test_shape_of_a_plain_llama(head_dim: int | None) -> None:
    config = tiny_models.llama_config(
        tied=False, head_dim=head_dim, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2
    )
    model = LlamaForCausalLM(config)
    shape = decoder_shape(model)
    assert shape.blocks == (BlockShape(8, 4, 96),) * 2
    assert (shape.head_dim, shape.hidden_size, shape.vocab_size) == (head_dim or 8, 64, tiny_models.VOCAB_SIZE)
    assert not shape.tie_word_embeddings
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_laid_out_like_a_models(
    models: dict[bool, PreTrainedModel], tied: bool, precision: Precision
) -> None:
    """What is profiled is what is shipped."""
    trained = decoder_from_model(models[tied], precision)
    random = random_decoder(tiny_models.shape(tied), precision)
    assert _layout(_weights(random)) == _layout(_weights(trained))
    assert random.shape == trained.shape
    for decoder in (random, trained):
        assert (decoder.head is decoder.embedding) == tied


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", tiny_models.GEMMA)
def test_random_weights_of_a_gemma_are_laid_out_like_its_own(family: str, precision: Precision) -> None:
    model = tiny_models.heterogeneous(family=family)
    trained = decoder_from_model(model, precision)
    random = random_decoder(decoder_shape(model), precision)
    assert _layout(_weights(random)) == _layout(_weights(trained))
    assert [layer.attention.window for layer in random.layers if layer.attention] == [6, 0, 6]
    assert random.shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_random_weights_follow_the_seed_and_share_no_memory() -> None:
    shape = tiny_models.shape(tied=False)
    first, same, other = (random_decoder(shape, "int4", seed) for seed in (0, 0, 1))
    gates = [decoder.layers[0].mlp.gate.integers for decoder in (first, same, other)]
    np.testing.assert_array_equal(gates[0], gates[1])
    assert (gates[0] != gates[2]).mean() > 0.5
    assert (gates[0].min(), gates[0].max()) == (-8, 7)
    mlp = first.layers[0].mlp
    assert not np.shares_memory(mlp.gate.integers, mlp.up.integers)
    assert not np.shares_memory(first.embedding.integers, first.head.integers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_two_random_matrices_are_equal(precision: Precision) -> None:
    """OpenVINO stores equal constants once, and a model that fits the cache is no measure of one that does not."""
    decoder = random_decoder(tiny_models.shape(tied=False), precision)
    vectors = ("norm", "biases", "output_bias", "head_norms", "post_norm", "window")
    matrices = [decoder.embedding, decoder.head]
    for layer in decoder.layers:
        for part in filter(None, (layer.attention, layer.mlp)):
            matrices += [getattr(part, field.name) for field in fields(part) if field.name not in vectors]
    arrays = [m for m in matrices if not isinstance(m, PackedMatrix)]
    for packed in (m for m in matrices if isinstance(m, PackedMatrix)):
        arrays += [packed.integers, packed.scales]
    assert len({array.tobytes() for array in arrays}) == len(arrays)
    # nor is one the beginning of another
    assert len({array.tobytes()[:128] for array in arrays}) == len(arrays)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_decoder_holds_the_models_weights(models: dict[bool, PreTrainedModel], precision: Precision) -> None:
    decoder = decoder_from_model(models[False], precision)
    expected = tiny_models.rounded(models[False], precision).state_dict()
    first, third = decoder.layers[0], decoder.layers[2]
    found = {
        "model.embed_tokens.weight": decoder.embedding,
        "lm_head.weight": decoder.head,
        "model.norm.weight": decoder.norm.weight,
        "model.layers.0.input_layernorm.weight": first.attention.norm.weight,
        "model.layers.0.post_attention_layernorm.weight": first.mlp.norm.weight,
        "model.layers.0.self_attn.k_proj.weight": first.attention.k,
        "model.layers.2.self_attn.v_proj.weight": third.attention.v,
        "model.layers.2.self_attn.o_proj.weight": third.attention.o,
        "model.layers.1.mlp.up_proj.weight": decoder.layers[1].mlp.up,
        "model.layers.1.mlp.down_proj.weight": decoder.layers[1].mlp.down,
    }
    for name, matrix in found.items():
        np.testing.assert_array_equal(_dense(matrix), expected[name].numpy(), err_msg=name)
    assert decoder.layers[1].attention is None
    assert third.mlp is None
    assert decoder.layers[3] == replace(decoder.layers[3], attention=None, mlp=None)


def test_half_precision_models_become_fp32(models: dict[bool, PreTrainedModel]) -> None:
    decoder = decoder_from_model(tiny_models.heterogeneous().to(torch.float16), "fp32")
    weight = models[True].state_dict()["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(decoder.layers[0].mlp.gate, weight.half().float().numpy())


def test_weights_are_packed_once_for_all(models: dict[bool, PreTrainedModel]) -> None:
    weight = models[True].state_dict()["model.layers.0.mlp.gate_proj.weight"]
    gate = decoder_from_model(models[True], "int4").layers[0].mlp.gate
    np.testing.assert_array_equal(_dense(gate), dequantize(quantize(weight, 4)).numpy())


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_weights_take_little_more_memory_than_their_arrays(precision: Precision) -> None:
    """On top of the arrays: the source that they are cut from, of 2**22 values at most 8 bytes wide, twice."""
    shape = ModelShape(64, 16, 96, True, (BlockShape(4, 2, 96),) * 40)
    tracemalloc.start()
    decoder = random_decoder(shape, precision)
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(decoder.layers) == 40
    assert held_bytes < 5 * shape.parameters
    assert peak_bytes - held_bytes < 2 * 8 * 2**22


def test_scaled_rotary_frequencies_are_the_models() -> None:
    model = LlamaForCausalLM(tiny_models.llama_config(rope_parameters=LLAMA3))
    plain = decoder_from_model(tiny_models.heterogeneous(), "fp32").inverse_frequencies
    np.testing.assert_allclose(plain, 300.0 ** -(np.arange(8) / 8), rtol=1e-6)
    scaled = decoder_from_model(model, "fp32").inverse_frequencies
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields_", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "mish"}, "mish"),
    ],
)
def test_what_no_writer_computes_is_refused(fields_: dict[str, Any], named: str) -> None:
    model = LlamaForCausalLM(tiny_models.llama_config(**fields_))
    with pytest.raises(ValueError, match=named):
        decoder_from_model(model, "fp32")


def test_graphs_for_timing_have_the_bits_of_their_parts() -> None:
    wide = BlockShape(4, 2, 96, attention_bits=8), BlockShape(4, 2, 96, mlp_bits=8), BlockShape(4, 2, 96)
    made = random_decoder(replace(tiny_models.shape(tied=True), blocks=wide), "int4")
    bits = [(layer.attention.k.bits, layer.attention.o.bits, layer.mlp.down.bits) for layer in made.layers]
    assert bits == [(8, 8, 4), (4, 4, 8), (4, 4, 4)]
    assert made.embedding.bits == 8
