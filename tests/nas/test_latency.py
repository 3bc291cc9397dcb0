from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from hw_profiles import RUNTIMES, Device, Measurement, Store, Target, Workload, detect
from hw_profiles.runtimes.fake import FakeRuntime
from hw_profiles.staleness import StaleProfileError
from hw_profiles.store import Role
from nas.latency import (
    LOAD_NOISE,
    LatencyModel,
    ProfileMissingError,
    held_out_errors,
    latency_curves,
    timed_together,
)
from nas.subnet import Subnet
from tests.nas.synthetic import VERSION, fill_profile, measurement, shape_ms, tiny_space

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
SPACE = tiny_space(4)
DECODE, PREFILL = Workload("decode", 16), Workload("prefill", 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "profiles.db")) as opened:
        yield opened


def fit(store: Store, workload: Workload = DECODE, runtime: str = "openvino", threads: int = 1) -> LatencyModel:
    return LatencyModel.fit(store, DEVICE.id, runtime, threads, SPACE, workload)


def random_subnets(count: int = 40) -> list[Subnet]:
    rng = np.random.default_rng(7)
    return [SPACE.sample(rng) for _ in range(count)]


@pytest.mark.parametrize("workload", [DECODE, PREFILL])
def test_predictions_are_those_of_each_subnets_own_precision(store: Store, workload: Workload) -> None:
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE, PREFILL])
    subnets = random_subnets()
    assert {subnet.bits for subnet in subnets} == {8, 4}
    expected = [shape_ms(SPACE.model_shape(subnet), subnet.precision, workload) for subnet in subnets]
    model = fit(store, workload)
    predicted = model.predict(subnets)
    assert predicted.value_ms == pytest.approx(expected, rel=1e-3)
    assert (predicted.low_ms <= predicted.value_ms).all()
    assert (predicted.value_ms <= predicted.high_ms).all()
    assert np.array_equal(model.value_ms(subnets), predicted.value_ms)
    assert len(model.predict([]).value_ms) == 0


def test_held_out_graphs_are_not_fitted_on_and_finalists_only_where_wanted(store: Store) -> None:
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], factors={"heldout": 5.0, "repeat": 5.0})
    subnets = random_subnets()
    target = Target(DEVICE.id, "openvino", "int8", 1)
    shape = SPACE.model_shape(subnets[0])
    store.add_measurements([measurement(target, SPACE.base, shape, DECODE, "finalist", 99.0)])
    expected = [shape_ms(SPACE.model_shape(subnet), subnet.precision, DECODE) for subnet in subnets]
    without = LatencyModel.fit(store, DEVICE.id, "openvino", 1, SPACE, DECODE, learn_from_finalists=False)
    assert without.predict(subnets).value_ms == pytest.approx(expected, rel=1e-3)
    assert fit(store).predict(subnets).value_ms != pytest.approx(expected, rel=1e-2)


def measured_ms(model: LatencyModel, subnet: Subnet) -> float:
    timed = model.timed(subnet)
    assert timed is not None
    return timed.latency_ms


def test_only_the_full_model_and_finalists_count_as_measured(store: Store) -> None:
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE])
    finalist, other = random_subnets()[:2]
    target = Target(DEVICE.id, "openvino", finalist.precision, 1)
    shape = SPACE.model_shape(finalist)
    store.add_measurements([measurement(target, SPACE.base, shape, DECODE, "finalist", 3.25)])
    model = fit(store)
    assert measured_ms(model, finalist) == pytest.approx(3.25)
    assert model.timed(other) is None
    assert measured_ms(model, SPACE.full(4)) == pytest.approx(shape_ms(SPACE.base, "int4", DECODE))
    opposite = Subnet(finalist.layers, 12 - finalist.bits)
    assert model.timed(opposite) is None  # the same shape at other bits


def test_what_is_missing_is_named(store: Store) -> None:
    with pytest.raises(ProfileMissingError, match=r"\(profiled: nothing\); run nas profile"):
        fit(store)
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], precisions=["int8"])
    there = r"profiled: openvino with 1 threads decode at 16 tokens\)"
    for options in ({"workload": PREFILL}, {"runtime": "onnxruntime"}, {"threads": 2}):
        with pytest.raises(ProfileMissingError, match=there):
            fit(store, **options)  # type: ignore[arg-type]
    with pytest.raises(ProfileMissingError, match=r"int4 was not profiled \(only int8\).*--precision int4"):
        fit(store).predict([SPACE.full(8), SPACE.full(4)])


def test_any_workload_between_those_profiled_is_answered(store: Store) -> None:
    measured = [Workload("prefill", tokens) for tokens in (16, 32, 64)]
    fill_profile(store, SPACE, DEVICE, "openvino", [*measured, DECODE])
    subnets, between = random_subnets(), Workload("prefill", 48)
    target, shape = Target(DEVICE.id, "openvino", subnets[0].precision, 1), SPACE.model_shape(subnets[0])
    timed_ms = shape_ms(shape, target.precision, measured[0])
    store.add_measurements([measurement(target, SPACE.base, shape, measured[0], "finalist", timed_ms)])
    model = fit(store, between)
    expected = [shape_ms(SPACE.model_shape(subnet), subnet.precision, between) for subnet in subnets[1:]]
    assert model.predict(subnets[1:]).value_ms == pytest.approx(expected, rel=0.02)
    assert model.timed(subnets[0]) is None  # timed, but on another workload
    assert model.timed(SPACE.full(4)) is None
    with pytest.raises(ProfileMissingError, match=r"prefill at 65 tokens.*1 threads prefill at 16 to 64 tokens"):
        fit(store, Workload("prefill", 65))


def test_a_thread_count_that_was_not_profiled_is_answered_with_those_that_were(store: Store) -> None:
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE, PREFILL], precisions=["int8"])
    with pytest.raises(ProfileMissingError) as missing:
        fit(store, threads=3)
    assert str(missing.value) == (
        "openvino with 3 threads was not profiled for decode at 16 tokens and this model (profiled: openvino with 1 "
        "threads decode at 16 tokens, openvino with 1 threads prefill at 16 tokens); run nas profile first"
    )
    found = store.measurements()
    for threads in (2, 4, 8):
        store.add_measurements([replace(m, target=replace(m.target, threads=threads)) for m in found])
    with pytest.raises(ProfileMissingError, match=r"and this model \(profiled: .*, 4 more that nas devices lists\)"):
        fit(store, threads=3)


def test_versions_of_the_runtime_are_not_mixed(store: Store) -> None:
    """Twice as fast since the upgrade, which only int8 was profiled with so far."""
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], version="1", factors={"heldout": 1.2, "repeat": 1.2})
    before = fit(store).predict(random_subnets()).value_ms
    faster: dict[Role, float] = dict.fromkeys(("table", "anchor", "heldout", "repeat"), 0.5)
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], ["int8"], factors=faster, version="2")
    refusal = r"openvino/int4/1 thread: decode at 16 tokens was profiled with openvino 1, but 2 .*--allow-stale"
    with pytest.raises(StaleProfileError, match=refusal):
        fit(store)
    with pytest.raises(StaleProfileError, match=refusal):
        held_out_errors(store, DEVICE.id, "openvino", 1, SPACE, "decode")
    allowed = LatencyModel.fit(store, DEVICE.id, "openvino", 1, SPACE, DECODE, allow_stale=True)
    int4 = [subnet for subnet in random_subnets() if subnet.bits == 4]
    assert allowed.predict(int4).value_ms == pytest.approx(before[[s.bits == 4 for s in random_subnets()]])
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], ["int4"], factors=faster, version="2")
    only_new = store.measurements(runtime_version="2")
    with Store("sqlite://") as fresh:
        fresh.add_device(DEVICE)
        fresh.add_measurements(only_new)
        expected = fit(fresh).predict(random_subnets()).value_ms
    assert fit(store).predict(random_subnets()).value_ms == pytest.approx(expected)
    assert expected != pytest.approx(before, rel=0.05)
    errors = held_out_errors(store, DEVICE.id, "openvino", 1, SPACE, "decode")
    assert {round(g.measured_ms / shape_ms(g.shape, g.precision, DECODE), 6) for g in errors.graphs} == {0.5}


def test_on_this_device_the_installed_version_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "fake", FakeRuntime)  # of version 1
    fill_profile(store, SPACE, detect(), "fake", [DECODE], version="0.9")
    with pytest.raises(StaleProfileError, match=r"profiled with fake 0\.9, but 1 is installed"):
        LatencyModel.fit(store, detect().id, "fake", 1, SPACE, DECODE)
    allowed = LatencyModel.fit(store, detect().id, "fake", 1, SPACE, DECODE, allow_stale=True)
    fill_profile(store, SPACE, DEVICE, "fake", [DECODE], version="0.9")
    elsewhere = LatencyModel.fit(store, DEVICE.id, "fake", 1, SPACE, DECODE)
    subnets = random_subnets()
    assert allowed.predict(subnets).value_ms == pytest.approx(elsewhere.predict(subnets).value_ms)


def test_another_models_profile_is_not_used(store: Store) -> None:
    fill_profile(store, tiny_space(3), DEVICE, "openvino", [DECODE])
    with pytest.raises(ProfileMissingError, match="and this model"):
        fit(store)


def test_errors_are_those_of_graphs_that_took_a_tenth_longer(store: Store) -> None:
    """The profile is exact but for the held-out graphs: 1.1 times, and 1.1 x 1.05 in the second timing."""
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], factors={"heldout": 1.1, "repeat": 1.1 * 1.05})
    errors = held_out_errors(store, DEVICE.id, "openvino", 1, SPACE, "decode")
    assert errors.samples == len(errors.graphs) == 12  # six of each precision
    assert errors.mape == pytest.approx(1 - 1 / 1.1, rel=0.01)
    assert (errors.within_5, errors.within_10) == (0.0, 1.0)
    assert errors.interval_coverage == 0.0
    assert errors.spearman > 0.95  # 1 but for graphs of equal latency
    assert errors.repeat_noise == pytest.approx(0.05)
    assert errors.additive_mape == pytest.approx(1 - 1 / 1.1, rel=0.01)  # the formula is additive
    by_flops = [
        spearmanr([g.shape.flops(DECODE) for g in graphs], [g.measured_ms for g in graphs]).statistic
        for graphs in ([g for g in errors.graphs if g.precision == p] for p in ("int8", "int4"))
    ]
    assert errors.flops_spearman == pytest.approx(np.mean(by_flops))
    for graph in errors.graphs:
        assert graph.measured_ms == pytest.approx(1.1 * shape_ms(graph.shape, graph.precision, DECODE))
        assert graph.predicted_ms == pytest.approx(shape_ms(graph.shape, graph.precision, DECODE), rel=1e-3)


def test_each_graph_is_judged_at_its_own_workload(store: Store) -> None:
    """Prompts of 16 and 64; the additive table, timed at 16 alone, is scaled by the full model to 64."""
    far = Workload("prefill", 64)
    fill_profile(store, SPACE, DEVICE, "openvino", [PREFILL, far])
    with Store("sqlite://") as part:
        part.add_device(DEVICE)
        part.add_measurements([m for m in store.measurements() if m.role != "table" or m.workload == PREFILL])
        errors = held_out_errors(part, DEVICE.id, "openvino", 1, SPACE, "prefill")
    assert {graph.workload for graph in errors.graphs} == {PREFILL, far}
    assert errors.samples == 24
    assert errors.mape < 0.01
    for graph in errors.graphs:
        exact_ms = shape_ms(graph.shape, graph.precision, graph.workload)
        assert graph.measured_ms == pytest.approx(exact_ms)
        assert graph.additive_ms == pytest.approx(exact_ms, rel=1e-3)  # the formula is proportional to the prompt


def test_errors_need_held_out_graphs(store: Store) -> None:
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE])
    with Store("sqlite://") as few:  # the same without them
        few.add_device(DEVICE)
        few.add_measurements([m for m in store.measurements() if m.role not in ("heldout", "repeat")])
        assert few.measurements()[0].runtime_version == VERSION
        with pytest.raises(ProfileMissingError, match="no held-out graphs for decode"):
            held_out_errors(few, DEVICE.id, "openvino", 1, SPACE, "decode")


def test_curves_of_the_full_model_pass_through_what_was_measured(store: Store) -> None:
    prompts = [Workload("prefill", tokens, batch) for batch in (1, 2) for tokens in (16, 64)]
    fill_profile(store, SPACE, DEVICE, "openvino", [*prompts, DECODE])
    assert latency_curves(store, DEVICE.id, "openvino", 1, SPACE, "decode") == []  # a single workload
    curves = latency_curves(store, DEVICE.id, "openvino", 1, SPACE, "prefill")
    assert [(c.precision, c.batch_size) for c in curves] == [("int8", 1), ("int8", 2), ("int4", 1), ("int4", 2)]
    for curve in curves:
        full_ms = [shape_ms(SPACE.base, curve.precision, Workload("prefill", t, curve.batch_size)) for t in (16, 64)]
        assert [ms for _, ms in curve.measured] == pytest.approx(full_ms)
        predicted = dict(curve.predicted)
        assert min(predicted) == 16
        assert max(predicted) == 64
        assert [predicted[16], predicted[64]] == pytest.approx(full_ms, rel=0.05)
        assert (np.diff(list(predicted.values())) > 0).all()


def test_timings_of_a_graph_count_together() -> None:
    """Each has a standard error of 2.5 %, 0.1 and 0.2 ms; where they differ by more, that counts."""
    target = Target(DEVICE.id, "fake", "int4", 1)

    def timing(latency_ms: float, role: Role) -> Measurement:
        shape, spread = SPACE.base, 0.025 * 3 / (1.25 * 1.48)  # of nine rounds
        return Measurement(target, shape, DECODE, role, shape.id, 1.0, spread, 9, {shape.id: latency_ms}, "1")

    once = timed_together([timing(4.0, "finalist")])
    assert (once.latency_ms, once.is_confirmed) == (pytest.approx(4.0), False)
    assert once.high_ms == pytest.approx(4.2)
    alike = timed_together([timing(4.0, "finalist"), timing(4.0, "confirmation")])
    assert alike.high_ms == pytest.approx(4.0 + 0.2 / 2**0.5)
    apart = timed_together([timing(4.0, "finalist"), timing(5.0, "confirmation")])
    assert (apart.latency_ms, apart.is_confirmed) == (4.5, True)
    assert apart.high_ms == pytest.approx(4.5 + 1.0)  # two standard errors of the mean of two: their distance


def test_however_long_it_was_timed_a_load_may_have_been_lucky() -> None:
    shape = SPACE.base
    long = Measurement(
        Target(DEVICE.id, "fake", "int4", 1), shape, DECODE, "finalist", shape.id, 1.0, 1e-4, 999, {shape.id: 4.0}, "1"
    )
    assert timed_together([long]).high_ms == pytest.approx(4.0 * (1 + 2 * LOAD_NOISE))
    assert timed_together([long] * 4).high_ms == pytest.approx(4.0 * (1 + LOAD_NOISE))
