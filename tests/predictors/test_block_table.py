from dataclasses import replace

import numpy as np
import pytest

from hw_profiles.shapes import BlockShape
from predictors.block_table import AdditiveTable
from predictors.metrics import mape

WIDE = ("attention_bits", "mlp_bits")


def changed(full, layers, heads=9, groups=3, width=1536):
    """`full` with that choice in its first `layers` layers."""
    return replace(full, blocks=(BlockShape(heads, groups, width),) * layers + full.blocks[layers:])


@pytest.fixture
def graphs(full):
    attention = [changed(full, 10, 3 * groups, groups) for groups in (0, 1, 2)]
    return attention + [changed(full, 10, width=width) for width in (0, 96, 384, 1152)]


def test_an_additive_device_is_predicted_exactly(full, graphs, sample_shapes, device) -> None:
    widths = [changed(full, 5, width=width) for width in (192, 768)]
    measured = device([full, *graphs, *widths], noise=0.0)
    table = AdditiveTable.fit(full, measured[0], [*graphs, *widths], measured[1:])
    test = [full, *sample_shapes(50, seed=0)]
    np.testing.assert_allclose(table.predict(test), device(test, noise=0.0))


def test_widths_between_are_interpolated_but_not_towards_a_skipped_mlp(full, graphs, device) -> None:
    measured = device([full, *graphs], noise=0.0)
    table = AdditiveTable.fit(full, measured[0], graphs, measured[1:])
    between = [changed(full, 7, width=width) for width in (768, 1344)]
    np.testing.assert_allclose(table.predict(between), device(between, noise=0.0))  # linear from 384 up
    for width in (48, 2048):
        with pytest.raises(ValueError, match=f"intermediate_size of {width}"):
            table.predict([changed(full, 1, width=width)])


def test_graphs_of_one_choice_combine_by_least_squares(full) -> None:
    few, many = changed(full, 1, width=0), changed(full, 3, width=0)
    table = AdditiveTable.fit(full, 30.0, [few, many], [28.0, 27.0])
    assert table.mlp_ms[0] == pytest.approx(-(1 * 2 + 3 * 3) / (1 + 9))


def test_noise_of_one_per_cent_costs_a_few(full, graphs, sample_shapes, device) -> None:
    measured = device([full, *graphs], seed=5)
    table = AdditiveTable.fit(full, measured[0], graphs, measured[1:])
    test = sample_shapes(100, seed=0)
    assert 0.001 < mape(table.predict(test), device(test, noise=0.0)) < 0.1


def test_graphs_that_tell_nothing_are_refused(full) -> None:
    two_choices = changed(changed(full, 2, width=96), 1, width=0)
    both_parts = changed(full, 2, 3, 1, width=96)
    shorter = replace(full, blocks=full.blocks[:20])
    for graph in (full, two_choices, both_parts, shorter):
        with pytest.raises(ValueError, match="one other choice of one part"):
            AdditiveTable.fit(full, 30.0, [graph], [20.0])
    with pytest.raises(ValueError, match="must be alike"):
        AdditiveTable.fit(two_choices, 30.0, [], [])
    with pytest.raises(ValueError, match="one finite latency a graph"):
        AdditiveTable.fit(full, 30.0, [changed(full, 1, width=0)], [np.nan])


def test_what_was_not_measured_is_refused(full, graphs, device) -> None:
    table = AdditiveTable.fit(full, 30.0, graphs, device(graphs))
    with pytest.raises(ValueError, match=r"attention of \(3, 3\)"):
        table.predict([changed(full, 1, 3, 3)])
    with pytest.raises(ValueError, match="table is of 30 layers"):
        table.predict([replace(full, blocks=full.blocks[:20])])


def test_bits_of_their_own_cost_parts_their_share_of_what_whole_ones_cost_and_heads_what_they_save(
    full, graphs, device
) -> None:
    measured = device([full, *graphs], noise=0.0)
    wide = [replace(full, blocks=tuple(replace(b, **{part: 8}) for b in full.blocks)) for part in WIDE]
    own_bits, own_ms = [*wide, narrow := replace(full, head_bits=4)], [measured[0] + more for more in (6, 3, -2)]
    table = AdditiveTable.fit(full, measured[0], [*graphs, *own_bits], [*measured[1:], *own_ms])
    mixed = replace(full, blocks=(BlockShape(6, 2, 384, 8, 8), BlockShape(9, 3, 384, 0, 8), *full.blocks[2:]))
    plain = replace(full, blocks=(BlockShape(6, 2, 384), BlockShape(9, 3, 384), *full.blocks[2:]))
    more_ms = (table.predict([mixed]) - table.predict([plain])).item()
    assert more_ms == pytest.approx(6 / 30 * 2 / 3 + 2 * 3 / 30 / 4)
    without = AdditiveTable.fit(full, measured[0], graphs, measured[1:])
    with pytest.raises(ValueError, match="attention_bits of 8"):
        without.predict([mixed])
    less_ms = (table.predict([plain]) - table.predict([replace(plain, head_bits=4)])).item()
    assert less_ms == pytest.approx(2)
    with pytest.raises(ValueError, match="head of 4 bits"):
        without.predict([narrow])
