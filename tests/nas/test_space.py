import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from transformers import LlamaConfig

from hw_profiles.shapes import BlockShape
from nas.space import SearchSpace
from nas.subnet import PARTS, SKIPPED, LayerChoice, Subnet
from tests.nas.synthetic import tiny_space


@pytest.fixture
def space(smollm2_config):
    return SearchSpace.from_config(smollm2_config)


def test_smollm2_choices(space):
    assert space.group_choices == (0, 1, 2, 3)
    assert space.width_choices == (0, 96, 192, 384, 576, 768, 1152, 1536)
    assert space.size == (4 * 8) ** 4 * 2
    assert len(space.block_choices()) == len(set(space.block_choices())) == 32
    assert space.block(LayerChoice(2, 96)) == BlockShape(6, 2, 96)


def test_heads_kept_fill_blocks_of_the_quantiser():
    """Of 80 dimensions two at a time, as in Pythia 2.8B; a quarter of six is none or two."""
    config = LlamaConfig(hidden_size=480, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, head_dim=80)
    assert SearchSpace.from_config(config).group_choices == (0, 2, 4, 6)


def test_subnet_json_and_id_are_canonical(space):
    subnet = space.sample(np.random.default_rng(0))
    again = Subnet.from_json(subnet.to_json())
    assert again == subnet
    assert hash(again) == hash(subnet)
    assert re.fullmatch(r"[0-9a-f]{10}", subnet.id)
    assert again.id == subnet.id != space.full(8).id != space.full(4).id


def test_space_json_round_trip(space):
    assert SearchSpace.from_json(space.to_json()) == space


def test_samples_encode_and_decode_to_themselves(space):
    rng = np.random.default_rng(0)
    for _ in range(100):
        subnet = space.sample(rng)
        genes = space.encode(subnet)
        assert subnet in space
        assert genes.shape == (9,)
        assert (genes < space.gene_sizes).all()
        assert space.decode(genes) == subnet


def test_samples_spread_over_sizes_and_repeat_with_the_seed(space):
    rng = np.random.default_rng(0)
    samples = [space.sample(rng) for _ in range(300)]
    full = space.model_shape(space.full(8))
    kept = [sum(map(full.block_parameters, space.model_shape(s).blocks)) / 4 for s in samples]
    kept = np.array(kept) / full.block_parameters(full.blocks[0])
    assert np.percentile(kept, 5) < 0.35
    assert np.percentile(kept, 95) > 0.75
    assert {s.bits for s in samples} == {8, 4}
    assert samples[0] == space.sample(np.random.default_rng(0))


def test_layers_of_a_homogeneous_space_are_alike(space):
    space = replace(space, homogeneous=True)
    rng = np.random.default_rng(0)
    samples = [space.sample(rng) for _ in range(300)]
    assert all(len({*s.layers} - {SKIPPED}) == 1 for s in samples)
    assert all(space.decode(space.encode(s)) == s and s in space for s in samples)
    assert {sum(layer != SKIPPED for layer in s.layers) for s in samples} == {1, 2, 3, 4}
    assert {layer for s in samples for layer in s.layers} == {
        SKIPPED,
        *(LayerChoice(g, w) for g in space.group_choices[1:] for w in space.width_choices[1:]),
    }
    for halves in ((LayerChoice(3, 0), LayerChoice(0, 96)), (LayerChoice(1, 96), LayerChoice(2, 96))):
        with pytest.raises(ValueError, match="wanted layers of one size, others skipped whole"):
            space.validate(Subnet((*halves, SKIPPED, SKIPPED), 8))
    with pytest.raises(ValueError, match="wanted choices from 0 on in a homogeneous space"):
        replace(space, group_choices=(1, 3))


def test_a_homogeneous_space_counts_its_subnets_and_decodes_to_them_alone():
    space = tiny_space(2, bits=(8,), homogeneous=True)
    decoded = {space.decode(np.array(genes)) for genes in product(*map(range, space.gene_sizes))}
    assert len(decoded) == space.size == 2 * 4 * 3 + 1
    assert all(subnet in space for subnet in decoded)
    half, whole = LayerChoice(1, 64), LayerChoice(2, 128)
    assert space.decode(np.array([1, 2, 2, 4, 0])).layers[0] in (half, LayerChoice(2, 96))
    assert space.decode(np.array([2, 4, 2, 0, 0])).layers == (whole, SKIPPED)
    assert SearchSpace.from_json(space.to_json()) == space != tiny_space(2, bits=(8,))
    assert "homogeneous" not in tiny_space(2).to_json()  # as studies of earlier versions have it


def test_ends_of_the_space(space):
    assert space.model_shape(space.full(32)) == space.base
    assert space.full(32) not in space
    assert space.full(8) in space
    assert space.full(32).precision == "fp32"
    halves = [space.full().at(half) for half in ("bf16", "fp16")]
    assert [half.precision for half in halves] == ["bf16", "fp16"]
    assert halves[0] == space.full(16)  # whose id is as old as bf16 is
    assert halves[0].id != halves[1].id
    assert [Subnet.from_json(half.to_json()) for half in halves] == halves
    assert halves[1].at("int4") == halves[0].at("int4").at("int4") == space.full(4)
    assert space.smallest.precision == "int4"
    assert space.model_shape(space.smallest).attention_blocks == ()


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet((LayerChoice(3, 1536),) * 3, 8), "wanted a subnet of 4 layers, got 3"),
        (Subnet((LayerChoice(3, 1536),) * 4, 2), "wanted bits out of"),
        (Subnet((LayerChoice(3, 100),) * 4, 8), "wanted num_key_value_heads out of"),
    ],
)
def test_validate_says_what_is_wrong(space, subnet, message):
    assert subnet not in space
    with pytest.raises(ValueError, match=message):
        space.validate(subnet)


def test_decode_refuses_genes_out_of_range(space):
    genes = space.encode(space.full(8))
    genes[0] = 4
    with pytest.raises(ValueError, match="wanted 9 indices"):
        space.decode(genes)


def test_a_space_refuses_ragged_or_incomplete_choices(space):
    with pytest.raises(ValueError, match="multiples of 32"):
        SearchSpace(space.base, (0, 3), (0, 100, 1536))
    narrow = replace(space.base, head_dim=80, blocks=(BlockShape(4, 4, 1536),) * 4)
    with pytest.raises(
        ValueError, match=r"group_choices in multiples of 2, .* a multiple of 32 dimensions, got \[1, 3\]"
    ):
        SearchSpace(narrow, (0, 1, 2, 3, 4), (0, 1536))
    with pytest.raises(ValueError, match="to the full 3"):
        SearchSpace(space.base, (0, 1), (0, 1536))


def test_parts_of_a_mixed_space_have_their_own_bits(space):
    mixed = replace(space, mixed_bits=True)
    assert SearchSpace.from_json(mixed.to_json()) == mixed
    assert mixed.block_choices() == space.block_choices()
    rng = np.random.default_rng(0)
    drawn = [mixed.sample(rng) for _ in range(100)]
    assert {subnet.bits for subnet in drawn if subnet.is_mixed} == {4}
    assert 10 < sum(subnet.head_bits == 4 for subnet in drawn) < 40
    assert 30 < sum(subnet.is_mixed for subnet in drawn) < 70
    for subnet in drawn:
        genes = mixed.encode(subnet)
        assert genes.shape == (17,)
        assert (genes < mixed.gene_sizes).all()
        assert mixed.decode(genes) == Subnet.from_json(subnet.to_json()) == subnet
        shape = mixed.model_shape(subnet)
        for i, block in enumerate(shape.blocks):
            wide = subnet.bits == 4 and subnet.part_precision(i, "attention") == "int8"
            assert block.attention_bits == (8 if wide else 0)
        assert shape.head_bits == subnet.head_bits
        assert (subnet in space) == (not subnet.is_mixed)
        assert not subnet.at_bits(8).is_mixed
        assert subnet.at_bits(subnet.bits) == subnet


def test_all_parts_at_8_bits_are_a_subnet_of_8_bits(space):
    mixed = replace(space, mixed_bits=True)
    wide = LayerChoice(2, 96, 8, 8), LayerChoice(0, 96, 0, 8), SKIPPED, LayerChoice(3, 0, 8, 0)
    plain = tuple(LayerChoice(*(layer.size(part) for part in PARTS)) for layer in wide)
    assert Subnet.of_parts(wide, 4) == Subnet(plain, 8)
    genes = mixed.encode(Subnet(plain, 4))
    genes.reshape(-1)[:-1].reshape(4, 4)[:, 2:] = 1
    assert mixed.decode(genes) == Subnet(plain, 8)  # a skipped part has no bits
    partly = Subnet.of_parts((wide[0], *plain[1:]), 4)
    assert (partly.bits, partly.description) == (4, "int4, 2 of 4 parts at 8 bits")
    narrow = Subnet.of_parts(wide, 4, head_bits=4)
    assert (narrow.bits, narrow.description) == (4, "int4, 4 of 4 parts at 8 bits, head at 4")
    assert Subnet(plain, 4, head_bits=4).description == "int4, head at 4"
    for refused in (Subnet(plain, 8, head_bits=4), Subnet(plain, 4, head_bits=8)):
        with pytest.raises(ValueError, match=r"wanted bits of parts and head|wanted head_bits of 0 or 4"):
            mixed.validate(refused)


def test_mixed_subnets_are_counted_as_they_are():
    space = tiny_space(2, mixed_bits=True)
    genes = product(*map(range, space.gene_sizes))
    found = {space.decode(np.array(row)) for row in genes}
    assert len(found) == space.size + 1  # nothing at all, which has no bits, is there at 8 and at 4
    assert sum(subnet.head_bits > 0 for subnet in found) == space.size / 2


@pytest.mark.parametrize("fields", [{"bits_choices": (8,)}, {"bits_choices": (16, 4)}, {"homogeneous": True}])
def test_mixed_bits_need_both_and_layers_that_differ(space, fields):
    with pytest.raises(ValueError, match="wanted mixed_bits with 4 and 8"):
        replace(space, mixed_bits=True, **fields)
