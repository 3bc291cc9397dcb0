from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from export import BUILDERS
from hw_profiles import RUNTIMES, ModelShape, Store, Target, Workload, detect
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.shapes import Precision
from hw_profiles.staleness import StaleProfileError
from hw_profiles.timing import measure
from nas.budget import Answer, Budget, BudgetUnmetError
from nas.latency import ProfileMissingError
from nas.queries import answer_query, find_subnet, predictions_for, report_data
from nas.study import Study, StudyError, Trial
from nas.subnet import Subnet
from tests.nas.synthetic import (
    SyntheticEvaluator,
    fill_memory,
    fill_profile,
    shape_ms,
    shape_peak_bytes,
    tiny_space,
)

DEVICE = detect()
SPACE = tiny_space(4)
DECODE, PREFILL = Workload("decode", 16), Workload("prefill", 16)
TRIALS = 25


class FakeDevice:
    """Runs graphs in `shape_ms` of the profile, or `lie(shape)` times as long; its clock is its own."""

    def __init__(self) -> None:
        self.lie: Callable[[ModelShape], float] = lambda shape: 1.0
        self.built: list[ModelShape] = []
        self.now_s = 0.0

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def build(self, shape: ModelShape, precision: Precision, directory: Path) -> Path:
        self.built.append(shape)
        token_ms = shape_ms(shape, precision, DECODE) * self.lie(shape)
        return FakeModel(base_ms=0.0, token_ms=token_ms, vocab_size=shape.vocab_size).write(directory)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setitem(RUNTIMES, "fake", lambda: FakeRuntime(fake.wait))
    monkeypatch.setitem(BUILDERS, "fake", fake.build)
    timer = partial(measure, clock=lambda: fake.now_s, sleep=fake.wait)
    monkeypatch.setattr("hw_profiles.profile.measure", timer)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "query.db")) as opened:
        fill_profile(opened, SPACE, DEVICE, "fake", [DECODE, PREFILL], version=FakeRuntime().version())
        yield opened


@pytest.fixture
def study(store: Store) -> Study:
    return random_study(store)


def random_study(store: Store) -> Study:
    made = Study.create(store, "s", "/models/tiny", "0123", SPACE, {})
    rng, evaluator = np.random.default_rng(3), SyntheticEvaluator(SPACE)
    for subnet in [SPACE.full(8), SPACE.full(4), *(SPACE.sample(rng) for _ in range(TRIALS - 2))]:
        made.add(Trial(subnet, evaluator.evaluate(subnet), "seed"))
    return made


def ms(subnet: Subnet, workload: Workload = DECODE) -> float:
    return shape_ms(SPACE.model_shape(subnet), subnet.precision, workload)


def best_first(study: Study, budget_ms: float) -> list[Subnet]:
    """By the formula; no trial is so near the budget that the predictor's interval decides."""
    trials = sorted(study.trials(), key=lambda trial: trial.quality.kl)
    assert min(abs(ms(trial.subnet) / budget_ms - 1) for trial in trials) > 0.005
    return [trial.subnet for trial in trials if ms(trial.subnet) <= budget_ms]


def ask(store: Store, study: Study, budget: Budget, measure_count: int = 0) -> Subnet:
    return answer_query(store, study, budget, DEVICE.id, "fake", 1, measure_count).subnet


BUDGET = Budget(tpot_ms=3.4, prompt_tokens=16, context_tokens=16)


def test_the_best_trial_within_the_budget(store: Store, study: Study, device: FakeDevice) -> None:
    assert BUDGET.tpot_ms
    expected = best_first(study, BUDGET.tpot_ms)
    assert 3 <= len(expected) < TRIALS - 3
    assert ask(store, study, BUDGET) == expected[0]
    assert device.built == []


def test_prefill_and_size_limits(store: Store, study: Study, device: FakeDevice) -> None:
    budget = Budget(ttft_ms=30.0, max_size_bytes=120_000, max_parameters_ratio=0.7, prompt_tokens=16)
    fitting = [
        trial
        for trial in study.trials()
        if ms(trial.subnet, PREFILL) <= 30.0
        and SPACE.model_shape(trial.subnet).weight_bytes(trial.subnet.precision) <= 120_000
        and SPACE.model_shape(trial.subnet).parameters <= 0.7 * SPACE.base.parameters
    ]
    assert 0 < len(fitting) < TRIALS
    assert ask(store, study, budget) == min(fitting, key=lambda trial: trial.quality.kl).subnet


def test_a_limit_of_memory(store: Store, study: Study, device: FakeDevice) -> None:
    """Of a process that reads the prompt and fills the context; told without a limit as soon as it is profiled."""

    def peak_bytes(subnet: Subnet) -> int:
        return max(shape_peak_bytes(SPACE.model_shape(subnet), subnet.precision, work) for work in (DECODE, PREFILL))

    def answer(budget: Budget) -> Answer:
        return answer_query(store, study, budget, DEVICE.id, "fake", 1, 0)

    budget = replace(BUDGET, tpot_ms=None, max_memory_bytes=320_000_000)
    with pytest.raises(ProfileMissingError, match="memory of fake with 1 threads was not measured"):
        answer(budget)
    assert answer(BUDGET).memory is None
    fill_memory(store, SPACE, DEVICE, "fake", [DECODE, PREFILL], version=FakeRuntime().version())
    fitting = [trial for trial in study.trials() if peak_bytes(trial.subnet) <= 320_000_000]
    assert 3 <= len(fitting) < TRIALS - 3
    assert min(abs(peak_bytes(trial.subnet) / 320e6 - 1) for trial in study.trials()) > 0.002
    found = answer(budget)
    assert found.subnet == min(fitting, key=lambda trial: trial.quality.kl).subnet
    assert found.memory is not None
    assert found.memory.value_bytes == pytest.approx(peak_bytes(found.subnet), rel=1e-3)
    timed = answer(BUDGET)
    assert timed.memory is not None
    assert timed.memory.value_bytes == pytest.approx(peak_bytes(timed.subnet), rel=1e-3)
    with pytest.raises(BudgetUnmetError, match=r"the nearest, .* MB of memory") as unmet:
        answer(replace(budget, max_memory_bytes=1000))
    assert unmet.value.nearest.subnet == min(study.trials(), key=lambda trial: peak_bytes(trial.subnet)).subnet


@pytest.mark.parametrize("measure_count", [1, 2, 4])
def test_finalists_that_miss_the_budget_when_timed_are_never_returned(
    store: Store, study: Study, device: FakeDevice, measure_count: int
) -> None:
    """The profile says nothing of it: the three best are twice as slow as their parts.

    From one of them the predictor may learn what another is.
    """
    assert BUDGET.tpot_ms
    expected = best_first(study, BUDGET.tpot_ms)
    liars = {SPACE.model_shape(subnet) for subnet in expected[:3]}
    device.lie = lambda shape: 2.0 if shape in liars else 1.0
    answer = answer_query(store, study, BUDGET, DEVICE.id, "fake", 1, measure_count)
    assert answer.subnet == expected[3]
    latency = answer.latencies[DECODE]
    assert latency.measured_ms == pytest.approx(ms(expected[3]), rel=1e-3)
    assert latency.measured_ms <= BUDGET.tpot_ms
    finalists = [m for m in store.measurements(roles=["finalist"]) if m.shape in liars]
    assert SPACE.model_shape(expected[0]) in {m.shape for m in finalists}
    assert [m.latency_ms for m in finalists] == pytest.approx(
        [2 * shape_ms(m.shape, m.target.precision, DECODE) for m in finalists], rel=1e-3
    )
    # what is known stays known, also to a query that times nothing
    built = len(device.built)
    assert ask(store, study, BUDGET, measure_count) == ask(store, study, BUDGET) == expected[3]
    assert len(device.built) == built


def test_an_answer_is_timed_once_more_and_luck_does_not_last(store: Store, study: Study, device: FakeDevice) -> None:
    """The best is fast only while it is loaded for the first time."""
    assert BUDGET.tpot_ms
    best, second, *_ = best_first(study, BUDGET.tpot_ms)
    loads: Counter[ModelShape] = Counter()

    def luck(shape: ModelShape) -> float:
        loads[shape] += 1
        return 1.5 if shape == SPACE.model_shape(best) and loads[shape] > 1 else 1.0

    device.lie = luck
    answer = answer_query(store, study, BUDGET, DEVICE.id, "fake", 1, 2)
    assert answer.subnet == second
    confirmed = store.measurements(roles=["confirmation"])
    assert [m.shape for m in confirmed] == [SPACE.model_shape(best), SPACE.model_shape(second)]
    assert confirmed[0].latency_ms == pytest.approx(1.5 * ms(best), rel=1e-3)


def test_timing_finds_what_a_wide_interval_hides(tmp_path: Path, device: FakeDevice) -> None:
    """A profile that scatters by 30 %: by the upper bound much of the budget stays unused, by timing it does not."""
    assert BUDGET.tpot_ms
    with Store(str(tmp_path / "noisy.db")) as store:
        fill_profile(store, SPACE, DEVICE, "fake", [DECODE], scatter=0.3)
        study = random_study(store)
        timid = answer_query(store, study, BUDGET, DEVICE.id, "fake", 1, measure=0)
        bold = answer_query(store, study, BUDGET, DEVICE.id, "fake", 1, measure=2)
    assert bold.is_measured
    assert not timid.is_measured
    assert bold.quality.kl < timid.quality.kl
    assert ms(timid.subnet) < ms(bold.subnet) <= BUDGET.tpot_ms


def test_a_stale_profile_is_refused_or_with_leave_answers_and_learns(
    tmp_path: Path, store: Store, study: Study, device: FakeDevice
) -> None:
    """Finalists are timed with the installed version: they must be found again, or timing would never end."""
    expected = ask(store, study, BUDGET, 2)
    with Store(str(tmp_path / "old.db")) as old:
        fill_profile(old, SPACE, DEVICE, "fake", [DECODE], version="0.9")
        stale = random_study(old)
        with pytest.raises(StaleProfileError, match=r"profiled with fake 0\.9, but 1 is installed; .*--allow-stale"):
            ask(old, stale, BUDGET)
        assert predictions_for(old, SPACE, expected, "onnx", DEVICE.id, 1, [DECODE]) == []
        assert report_data(old, stale, 3.4, DEVICE.id, "fake", 1, 16).chosen is not None
        answer = answer_query(old, stale, BUDGET, DEVICE.id, "fake", 1, 2, allow_stale=True)
        assert (answer.subnet, answer.is_measured) == (expected, True)


def test_unmet_once_no_hope_is_left(store: Store, study: Study, device: FakeDevice) -> None:
    """All is 30 times as slow as profiled, beside a full model that is not: the timed ones teach that, too."""
    device.lie = lambda shape: 1.0 if shape == SPACE.base else 30.0
    assert BUDGET.tpot_ms
    fitting = best_first(study, BUDGET.tpot_ms)
    with pytest.raises(BudgetUnmetError) as unmet:
        ask(store, study, BUDGET, 3)
    timed = store.measurements(roles=["finalist"])
    assert {SPACE.model_shape(subnet) for subnet in fitting[:3]} <= {m.shape for m in timed}
    assert min(m.latency_ms for m in timed) > BUDGET.tpot_ms
    assert unmet.value.nearest.excess(BUDGET, margin=0.0) > 1


def test_timing_both_workloads_of_a_budget(store: Store, study: Study, device: FakeDevice) -> None:
    budget = Budget(tpot_ms=3.4, ttft_ms=60.0, prompt_tokens=16, context_tokens=16)
    answer = answer_query(store, study, budget, DEVICE.id, "fake", 1, 1)
    assert set(answer.latencies) == {DECODE, PREFILL}
    assert all(latency.measured_ms is not None for latency in answer.latencies.values())


def test_a_budget_out_of_reach_without_timing(store: Store, study: Study, device: FakeDevice) -> None:
    with pytest.raises(BudgetUnmetError) as unmet:
        ask(store, study, Budget(tpot_ms=0.01, context_tokens=16), 2)
    assert unmet.value.nearest.subnet == min(study.trials(), key=lambda t: ms(t.subnet)).subnet
    assert device.built == []


def test_a_study_without_trials_has_no_answer(store: Store) -> None:
    empty = Study.create(store, "empty", "m", "0123", SPACE, {})
    with pytest.raises(StudyError, match=r"'empty' has no trials yet; run nas search"):
        ask(store, empty, BUDGET)


def test_find_subnet_by_id_or_full(study: Study) -> None:
    subnet = study.trials()[5].subnet
    assert find_subnet(study, subnet.id, None) == subnet
    assert find_subnet(study, subnet.id, "fp32") == Subnet(subnet.layers, 32)
    assert find_subnet(study, "full", None) == SPACE.full(32)
    assert find_subnet(study, "full", "int4") == SPACE.full(4)
    with pytest.raises(StudyError, match="no subnet 'nonesuch'"):
        find_subnet(study, "nonesuch", None)


def test_predictions_for_a_format_are_its_runtimes(store: Store, study: Study) -> None:
    fill_profile(store, SPACE, DEVICE, "onnxruntime", [DECODE])
    subnet = study.trials()[4].subnet
    found = predictions_for(store, SPACE, subnet, "onnx", DEVICE.id, 1, [PREFILL, DECODE])
    assert [(p.phase, p.tokens, p.batch_size) for p in found] == [("decode", 16, 1)]
    assert found[0].target == f"{DEVICE.id}/{Target(DEVICE.id, 'onnxruntime', subnet.precision, 1).key}"
    assert found[0].value_ms == pytest.approx(ms(subnet), rel=1e-3)
    for format_ in ("openvino", "huggingface"):
        assert predictions_for(store, SPACE, subnet, format_, DEVICE.id, 1, [PREFILL, DECODE]) == []


@pytest.mark.parametrize(("tpot_ms", "met"), [(3.4, True), (0.01, False), (None, False)])
def test_report_data_holds_every_trial_and_the_answer(
    store: Store, study: Study, tpot_ms: float | None, met: bool
) -> None:
    data = report_data(store, study, tpot_ms, DEVICE.id, "fake", 1, context_tokens=16)
    trials = study.trials()
    assert [(p.subnet_id, p.bits, p.kl, p.role) for p in data.trials] == [
        (t.subnet.id, t.subnet.bits, t.quality.kl, t.role) for t in trials
    ]
    assert [p.tpot_ms for p in data.trials] == pytest.approx([ms(t.subnet) for t in trials], rel=1e-3)
    assert (data.title, data.model, data.device) == ("s: tiny", "tiny", DEVICE.name)
    expected = best_first(study, 3.4)[0] if met else None
    assert data.chosen == expected
    assert data.chosen_id == (expected.id if expected else None)
    assert (data.chosen_predicted is not None) == met
    assert [(e.runtime, e.phase, e.samples) for e in data.latency_errors] == [
        ("fake", "prefill", 12),
        ("fake", "decode", 12),
    ]
    assert len(data.latency) == 24
    assert all(row.predicted_ms == pytest.approx(row.measured_ms, rel=1e-3) for row in data.latency)
