import re

import numpy as np
import pytest
from transformers import LlamaConfig

from hw_profiles.shapes import BlockShape
from nas.space import LayerChoice, SearchSpace, Subnet


@pytest.fixture
def space():
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return SearchSpace.from_config(config)


def test_smollm2_choices(space):
    assert space.group_choices == (0, 1, 2, 3)
    assert space.width_choices == (0, 96, 192, 384, 576, 768, 1152, 1536)
    assert space.size == (4 * 8) ** 4 * 2
    assert len(space.block_choices()) == len(set(space.block_choices())) == 32
    assert space.block(LayerChoice(2, 96)) == BlockShape(6, 2, 96)


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


def test_ends_of_the_space(space):
    assert space.model_shape(space.full(32)) == space.base
    assert space.full(32) not in space
    assert space.full(8) in space
    assert space.full(32).precision == "fp32"
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
    with pytest.raises(ValueError, match="to the full 3"):
        SearchSpace(space.base, (0, 1), (0, 1536))
