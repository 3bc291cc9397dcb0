from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hw_profiles.planning import PlannedGraph, is_of_precision, plan, workloads_of_graphs
from hw_profiles.shapes import BlockShape, ModelShape, Workload

FULL = ModelShape(576, 64, 49152, True, (BlockShape(9, 3, 1536),) * 30)
ATTENTIONS = [(9, 3), (6, 2), (3, 1), (0, 0)]
WIDTHS = [1536, 1152, 768, 384, 192, 96, 0]
CHOICES = [BlockShape(heads, groups, width) for heads, groups in ATTENTIONS for width in WIDTHS]


def test_roles_and_counts() -> None:
    planned = plan(FULL, CHOICES)
    assert planned[0].shape == FULL
    assert Counter(graph.role for graph in planned) == {
        "reference": 3,
        "table": 3 + 6,
        "anchor": 12,
        "heldout": 8,
        "repeat": 2,
    }
    roles = [graph.role for graph in planned]
    assert (roles[:3], roles[-2:]) == (["reference"] * 3, ["repeat"] * 2)
    # mixed: wherever a profile is cut in two, both halves hold graphs to fit on and graphs to judge
    assert all({"table", "anchor", "heldout"} <= set(half) for half in (roles[3:17], roles[17:-2]))


def test_table_changes_one_thing_in_all_layers_but_leaves_some_attention() -> None:
    for graph in plan(FULL, CHOICES):
        if graph.role == "table":
            (changed,) = set(graph.shape.blocks[1::2])
            full = FULL.blocks[0]
            assert changed != full
            assert set(graph.shape.blocks[::2]) == {changed if changed.num_attention_heads else full}
            assert full in (
                replace(changed, intermediate_size=1536),
                replace(changed, num_attention_heads=9, num_key_value_heads=3),
            )


def test_random_shapes_are_distinct_heterogeneous_and_offered() -> None:
    planned = [graph for graph in plan(FULL, CHOICES) if graph.role in ("anchor", "heldout")]
    assert len({graph.shape for graph in planned}) == 20
    for graph in planned:
        assert set(graph.shape.blocks) <= set(CHOICES)
        assert len(set(graph.shape.blocks)) > 2


@pytest.mark.parametrize("role", ["anchor", "heldout"])
def test_random_shapes_cover_small_and_large(role: str) -> None:
    for seed in range(5):
        planned = plan(FULL, CHOICES, seed=seed)
        empty = replace(FULL, blocks=()).parameters
        kept = [(g.shape.parameters - empty) / (FULL.parameters - empty) for g in planned if g.role == role]
        assert min(kept) < 0.4
        assert max(kept) > 0.8
        thirds = np.histogram(kept, bins=[0.15, 0.45, 0.7, 1.0])[0]
        assert thirds.sum() == len(kept)
        assert thirds.min() >= 1


def test_a_few_anchors_reach_as_low_as_what_judges_them() -> None:
    for seed in range(5):
        planned = plan(FULL, CHOICES, anchors=3, heldout=9, seed=seed)
        smallest = {role: min(g.shape.parameters for g in planned if g.role == role) for role in ("anchor", "heldout")}
        assert smallest["anchor"] < 1.3 * smallest["heldout"]


def test_attention_and_mlp_vary_apart() -> None:
    """Were the two densities one, no fit could tell what an attention costs from what an MLP costs."""
    shapes = [graph.shape for graph in plan(FULL, CHOICES, anchors=60) if graph.role == "anchor"]
    groups = [sum(block.num_key_value_heads for block in shape.blocks) for shape in shapes]
    widths = [sum(block.intermediate_size for block in shape.blocks) for shape in shapes]
    assert 0.3 < np.corrcoef(groups, widths)[0, 1] < 0.9


def test_repeats_are_heldout_shapes() -> None:
    planned = plan(FULL, CHOICES, heldout=6, repeats=6)
    shapes = {role: {g.shape for g in planned if g.role == role} for role in ("heldout", "repeat")}
    assert shapes["repeat"] == shapes["heldout"]


def test_only_the_seed_decides() -> None:
    assert plan(FULL, CHOICES, seed=3) == plan(FULL, CHOICES, seed=3) != plan(FULL, CHOICES, seed=4)


def test_choices_need_not_form_a_grid() -> None:
    choices = [BlockShape(9, 3, 1536), BlockShape(9, 3, 384), BlockShape(0, 0, 768)]
    for graph in plan(FULL, choices):
        if graph.role in ("anchor", "heldout"):
            assert set(graph.shape.blocks) <= set(choices)
            assert graph.shape.attention_blocks


def test_impossible_plans_are_refused() -> None:
    two_layers = replace(FULL, blocks=FULL.blocks[:2])
    with pytest.raises(ValueError, match="wanted 12 more random shapes, found 1 among 2 block choices in 2 layers"):
        plan(two_layers, [BlockShape(9, 3, 1536), BlockShape(9, 3, 768)])
    with pytest.raises(ValueError, match="repeats=9 heldout=8"):
        plan(FULL, CHOICES, repeats=9)
    with pytest.raises(ValueError, match="at least one block"):
        plan(FULL, [])


def test_every_graph_shares_one_workload_a_phase_and_takes_another_in_turn() -> None:
    prefills = [Workload("prefill", tokens) for tokens in (16, 128, 512)]
    decodes = [Workload("decode", tokens) for tokens in (0, 128, 1024)]
    planned = plan(FULL, CHOICES)
    assigned = workloads_of_graphs(planned, [*decodes, *prefills])
    assert all(set(works) == {*prefills, *decodes} for works in assigned[:3])  # the references
    counts: Counter[tuple[str, Workload]] = Counter()
    for graph, works in zip(planned[3:], assigned[3:], strict=True):
        assert Counter(work.phase for work in works) == {"prefill": 2, "decode": 2}
        assert {prefills[1], decodes[1]} <= set(works)
        counts.update((graph.role, work) for work in works)
    for role in ("table", "anchor", "heldout"):
        for one, other in ((prefills[0], prefills[2]), (decodes[0], decodes[2])):
            assert abs(counts[role, one] - counts[role, other]) <= 1


def test_repeats_are_timed_on_what_their_first_was_and_finalists_on_everything() -> None:
    works = [Workload("decode", tokens) for tokens in (0, 16, 128, 512, 1024)]
    planned = [*plan(FULL, CHOICES, heldout=6, repeats=6), PlannedGraph(FULL, "finalist")]
    assigned = workloads_of_graphs(planned, works)
    first = {g.shape: w for g, w in zip(planned, assigned, strict=True) if g.role == "heldout"}
    assert all(first[g.shape] == w for g, w in zip(planned, assigned, strict=True) if g.role == "repeat")
    assert assigned[-1] == tuple(works)
    # graphs that are added to a plan change nothing for those before them
    assert workloads_of_graphs(planned[:9], works) == assigned[:9]


def test_long_workloads_are_for_the_full_model() -> None:
    long = [Workload("prefill", 2048), Workload("prefill", 128, 16), Workload("decode", 4096, 16)]
    short = [Workload("prefill", 16, 16), Workload("prefill", 512), Workload("decode", 1024, 16)]
    reference, *others = workloads_of_graphs(plan(FULL, CHOICES), long + short)
    assert set(reference) == {*long, *short}
    assert {work for works in others for work in works} == set(short)


def test_the_shortest_workload_is_taken_where_all_are_long() -> None:
    works = [Workload("prefill", 1024), Workload("prefill", 2048)]
    assert workloads_of_graphs(plan(FULL, CHOICES), works)[3] == (works[0],)


def test_without_a_table_the_other_graphs_are_the_same() -> None:
    whole, leaning = plan(FULL, CHOICES), plan(FULL, CHOICES, with_table=False)
    assert leaning == [graph for graph in whole if graph.role != "table"]


def test_graphs_of_mixed_bits_come_besides_and_for_int4_alone() -> None:
    plain, planned = plan(FULL, CHOICES), plan(FULL, CHOICES, mixed=3)
    assert planned[: len(plain)] == plain
    mixed = planned[len(plain) :]
    assert Counter(graph.role for graph in mixed) == {"table": 3, "anchor": 3, "heldout": 3}
    assert Counter(graph.role for graph in mixed if graph.shape.head_bits) == {"table": 1, "anchor": 1, "heldout": 1}
    mixed.remove(PlannedGraph(replace(FULL, head_bits=4), "table"))
    assert all(graph.shape.is_mixed for graph in mixed)
    assert len({graph.shape for graph in mixed}) == len(mixed)
    for graph in mixed:
        parts = [(bool(b.num_attention_heads), b.attention_bits) for b in graph.shape.blocks]
        parts += [(bool(b.intermediate_size), b.mlp_bits) for b in graph.shape.blocks]
        assert {bits for kept, bits in parts if kept} == {0, 8}
    assert [g for g in planned if is_of_precision(g.shape, "int8")] == plain
    assert all(is_of_precision(graph.shape, "int4") for graph in planned)
    leaning = plan(FULL, CHOICES, mixed=3, with_table=False)
    assert leaning == [graph for graph in planned if graph.role != "table"]
