from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hw_profiles.shapes import BlockShape, ModelShape, Workload, bits_per_weight

SMOLLM2_135M = ModelShape(576, 64, 49152, True, (BlockShape(9, 3, 1536),) * 30)
#: hidden 4, two heads of 3 on one KV head, MLP width 5, then a block without attention; vocabulary 7, head not tied.
TINY = ModelShape(4, 3, 7, False, (BlockShape(2, 1, 5), BlockShape(0, 0, 2)))


def test_parameters_of_smollm2() -> None:
    assert SMOLLM2_135M.parameters == 134_515_008  # as its model card and its safetensors say


def test_parameters_by_hand() -> None:
    first = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5 + 2 * 4  # q, k and v, o, MLP, two norms
    second = 3 * 4 * 2 + 4
    assert TINY.parameters == first + second + 4 + 2 * 7 * 4


def test_parameters_with_biases_and_norms_of_heads_by_hand() -> None:
    biases, norms = 2 * 3 + 2 * 3, 2 * 3  # of q, k and v; of q and k
    assert replace(TINY, attention_bias=True).parameters == TINY.parameters + biases
    assert replace(TINY, qk_norm=True).parameters == TINY.parameters + norms
    assert replace(TINY, qk_norm=True).weight_bytes("int4") == TINY.weight_bytes("int4") + 4 * norms
    assert replace(TINY, post_norms=True).parameters == TINY.parameters + 3 * 4  # behind three parts
    assert replace(TINY, layer_norm=True).parameters == TINY.parameters + 4 * 4  # before three parts, and the last
    assert replace(TINY, gated_mlp=False).parameters == TINY.parameters - 4 * (5 + 2)
    assert replace(TINY, output_bias=True).parameters == TINY.parameters + 4
    assert replace(TINY, mlp_bias=True).parameters == TINY.parameters + (2 * 5 + 4) + (2 * 2 + 4)
    assert replace(TINY, mlp_bias=True, gated_mlp=False).parameters == TINY.parameters - 28 + (5 + 4) + (2 + 4)
    positions = replace(TINY, learned_positions=9)
    assert positions.weight_bytes("int4") == TINY.weight_bytes("int4") + 4 * 9 * 4


def test_flops_by_hand() -> None:
    weights = (4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5 + 8) + (3 * 4 * 2 + 4)
    head = 2 * 4 * 7
    # two heads of 3, twice (scores and values), two FLOPs each, over 1 + 2 + 3 positions
    assert TINY.flops(Workload("prefill", 3)) == 3 * 2 * weights + 4 * 2 * 3 * 6 + head
    # one token on 5 in the cache sees 6 positions
    assert TINY.flops(Workload("decode", 5, batch_size=2)) == 2 * (2 * weights + 4 * 2 * 3 * 6 + head)


def test_weight_and_cache_bytes() -> None:
    assert TINY.weight_bytes("fp32") == 4 * TINY.parameters
    norms = 4 * (1 + 2 + 1)
    matrices, embedding = TINY.parameters - norms - 56, 56
    assert TINY.weight_bytes("bf16") == 2 * (matrices + embedding) + 4 * norms
    assert TINY.weight_bytes("int4") == round(matrices * 4.5 / 8 + embedding * 8.5 / 8 + norms * 4)
    assert TINY.kv_cache_bytes(tokens=10, batch_size=2) == 2 * 1 * 3 * 10 * 2 * 4
    assert bits_per_weight(8) == 8.5


def test_parts_with_bits_of_their_own_weigh_accordingly() -> None:
    block = TINY.blocks[0]
    attention, mlp = TINY.matrix_parameters(block)
    assert attention + mlp + TINY.vector_parameters(block) == TINY.block_parameters(block)
    for part, weights in (("attention_bits", attention), ("mlp_bits", mlp)):
        wide = replace(TINY, blocks=(replace(block, **{part: 8}), *TINY.blocks[1:]))
        assert wide.weight_bytes("int4") == TINY.weight_bytes("int4") + weights * 4 / 8
        assert wide.parameters == TINY.parameters
        assert wide.is_mixed > TINY.is_mixed


def test_a_narrow_head_is_a_matrix_of_its_own() -> None:
    tied = replace(TINY, tie_word_embeddings=True)
    narrow = replace(tied, head_bits=4)
    assert narrow.weight_bytes("int4") == pytest.approx(tied.weight_bytes("int4") + 28 * 4.5 / 8, abs=1)
    assert narrow.read_weight_bytes("int4") == pytest.approx(tied.weight_bytes("int4") - 28 * 4 / 8, abs=1)
    assert tied.read_weight_bytes("int4") == tied.weight_bytes("int4")
    assert replace(TINY, head_bits=4).weight_bytes("int4") == narrow.weight_bytes("int4")
    assert TINY.read_weight_bytes("fp32") == tied.weight_bytes("fp32")
    assert narrow.is_mixed > tied.is_mixed
    assert narrow.parameters == tied.parameters
    with pytest.raises(ValueError, match="bits of the head must be 0 or 4, got 8"):
        replace(TINY, head_bits=8)


def test_json_keeps_a_shape_and_its_id() -> None:
    changes: list[dict[str, Any]] = [
        {"head_bits": 4},
        {"attention_bias": True},
        {"qk_norm": True},
        {"post_norms": True},
        {"scaled_embedding": True},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"windows": (6, 0)},
        {"layer_norm": True},
        {"gated_mlp": False},
        {"output_bias": True},
        {"mlp_bias": True},
        {"parallel_residual": True},
        {"learned_positions": 9},
    ]
    shapes = [TINY, SMOLLM2_135M, *(replace(TINY, **change) for change in changes)]
    shapes.append(replace(TINY, blocks=(replace(TINY.blocks[0], mlp_bits=8), *TINY.blocks[1:])))
    assert [ModelShape.from_json(shape.to_json()) for shape in shapes] == shapes
    assert len({shape.id for shape in shapes}) == len(shapes)
    assert TINY.id == "f53e06dd9833"  # what databases and packs of version 0.1 call it


@pytest.mark.parametrize(
    "sizes", [(3, 2, 8), (0, 1, 8), (2, 0, 8), (2, 1, -1), (2, 1, 8, 4), (0, 0, 8, 8), (2, 1, 0, 0, 8)]
)
def test_impossible_blocks_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        BlockShape(*sizes)


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Workload("prefill", 0)
    with pytest.raises(ValueError, match="prefill or decode"):
        Workload("train", 1)  # type: ignore[arg-type]
    assert Workload("decode", 0).tokens == 0
