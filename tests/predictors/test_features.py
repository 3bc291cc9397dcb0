from dataclasses import replace

import numpy as np
import pytest

from hw_profiles.shapes import PRECISIONS, VALUE_BYTES, BlockShape, ModelShape, Precision, Workload
from predictors.features import SEQUENCE_COLUMNS, STEP_COLUMNS, block_array, latency_features

WORKLOADS = [Workload("decode", 256), Workload("decode", 0, 4), Workload("prefill", 128, 2)]


def columns(shapes: list[ModelShape], workload: Workload, precision: Precision) -> dict[str, np.ndarray]:
    names, X = latency_features(shapes, [workload] * len(shapes), precision)
    assert X.shape == (len(shapes), len(names))
    assert X.dtype == np.float64
    return dict(zip(names, X.T, strict=True))


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_and_flops_agree_with_the_shapes_own(sample_shapes, workload, precision) -> None:
    untied = ModelShape(64, 16, 100, False, (BlockShape(4, 2, 100), BlockShape(0, 0, 32)))
    biased = replace(untied, attention_bias=True, qk_norm=True, post_norms=True, output_bias=True, mlp_bias=True)
    gpt = replace(biased, qk_norm=False, post_norms=False, layer_norm=True, gated_mlp=False, learned_positions=7)
    mixed = replace(untied, blocks=(BlockShape(4, 2, 96, 8, 0), BlockShape(4, 2, 32, 0, 8), BlockShape(2, 1, 64, 8, 8)))
    heads = [replace(untied, head_bits=4), replace(mixed, tie_word_embeddings=True, head_bits=4)]
    shapes = [*sample_shapes(5, seed=0), untied, biased, gpt, mixed, replace(mixed, gated_mlp=False), *heads]
    found = columns(shapes, workload, precision)
    read_bytes = [s.read_weight_bytes(precision) for s in shapes]
    np.testing.assert_allclose(found["read_weight_bytes"], read_bytes, atol=0.5, rtol=0)
    np.testing.assert_array_equal(
        found["projection_flops"] + found["attention_flops"], [s.flops(workload) for s in shapes]
    )
    cached = workload.tokens + (workload.phase == "decode")
    np.testing.assert_array_equal(
        found["kv_bytes"], [s.kv_cache_bytes(cached, workload.batch_size, VALUE_BYTES[precision]) for s in shapes]
    )


def test_counts_by_hand() -> None:
    blocks = (BlockShape(4, 2, 100), BlockShape(0, 0, 64), BlockShape(6, 3, 0), BlockShape(4, 1, 48))
    found = columns([ModelShape(32, 8, 10, True, blocks)], WORKLOADS[0], "fp32")
    by_hand = {
        "constant": 1,
        "attention_layers": 3,
        "kv_groups": 6,
        "query_heads": 14,
        "mlp_layers": 3,
        "intermediate_size": 212,
        "width_padding": 28 + 16,
        "layers_off_16": 1,
        "layers_off_32": 2,
        "layers_off_64": 2,
        "layers_off_128": 3,
        "kernels": 3 * 8 + 3 * 6 + 3,
    }
    assert {name: found[name].item() for name in by_hand} == by_hand


def test_fewer_layers_are_padded_with_skipped_ones(full) -> None:
    block = full.blocks[0]
    short = ModelShape(576, 64, 49152, True, (block,))
    array = block_array([short, full])
    assert array.shape == (2, 30, 5)
    assert array[0].tolist() == [[9, 3, 1536, 0, 0]] + [[0] * 5] * 29
    skipped = ModelShape(576, 64, 49152, True, (block,) + (BlockShape(0, 0, 0),) * 29)
    _, X = latency_features([short, skipped], WORKLOADS[:1] * 2, "int8")
    np.testing.assert_array_equal(X[0], X[1])


def test_names_do_not_depend_on_what_is_asked(sample_shapes) -> None:
    names = {
        latency_features(sample_shapes(n, 0), [w] * n, p)[0] for n in (0, 3) for w in WORKLOADS for p in PRECISIONS
    }
    assert len(names) == 1
    assert {*STEP_COLUMNS, *SEQUENCE_COLUMNS, "tokens_fed"} < set(names.pop())
