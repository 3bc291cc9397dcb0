from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hw_profiles import Measurement, Target, Workload
from nas.budget import Answer, Budget, BudgetUnmetError, Latency, admitted, describe, hopeful
from nas.latency import Timed, timed_together
from nas.memory import Memory
from nas.quality import Quality
from nas.study import Trial
from nas.subnet import LayerChoice, Subnet
from predictors import LatencyPrediction
from tests.nas.synthetic import tiny_space

DECODE, PREFILL = Workload("decode", 128), Workload("prefill", 128)
SUBNET = tiny_space(2).full(8)


def answer(
    kl: float, tpot: Latency, ttft: Latency | None = None, size_bytes: int = 1000, parameters_ratio: float = 0.5
) -> Answer:
    latencies = {DECODE: tpot} | ({PREFILL: ttft} if ttft else {})
    return Answer(SUBNET, Quality(kl, 9.0, 1, 1.0), latencies, size_bytes, 100, parameters_ratio)


def kls(answers: list[Answer], budget: Budget) -> list[float]:
    return [found.quality.kl for found in admitted(answers, budget)]


def test_admitted_by_the_upper_bound_or_the_measurement_and_best_first() -> None:
    answers = [
        answer(0.1, Latency(9.0, 8.0, 10.5, None)),  # its middle fits, its upper bound does not
        answer(0.3, Latency(9.0, 8.0, 10.0, None)),
        answer(0.2, Latency(9.0, 8.0, 10.5, 9.8, 9.9)),  # measured: that counts
        answer(0.05, Latency(9.0, 8.0, 9.5, 9.8, 10.1)),  # by its upper end
        answer(0.4, Latency(2.0, 1.0, 3.0, None)),
    ]
    assert kls(answers, Budget(tpot_ms=10.0)) == [0.2, 0.3, 0.4]


def test_worth_timing_is_what_is_likely_to_be_admitted_then() -> None:
    answers = [
        answer(0.1, Latency(9.4, 8.0, 20.0)),
        answer(0.15, Latency(9.9, 8.0, 20.0)),  # too near for a measurement's upper end
        answer(0.2, Latency(10.1, 8.0, 20.0)),
        answer(0.05, Latency(9.0, 8.0, 9.5, 9.8, 10.1)),
        answer(0.3, Latency(12.0, 11.0, 13.0, 9.8, 9.9)),
    ]
    budget = Budget(tpot_ms=10.0)
    assert [found.quality.kl for found in hopeful(answers, budget)] == [0.1, 0.3]
    # with nothing better in sight even a small chance is worth a try
    assert [found.quality.kl for found in hopeful(answers[1:4], budget)] == [0.15]
    with pytest.raises(BudgetUnmetError):
        hopeful(answers[2:4], budget)
    assert [found.is_measured for found in answers] == [False, False, False, True, True]


def test_every_limit_counts() -> None:
    fast, slow = Latency(1.0, 1.0, 1.0, None), Latency(9.0, 9.0, 9.0, None)
    answers = [
        answer(0.1, fast, slow, 100, 0.1),
        answer(0.2, slow, fast, 100, 0.1),
        answer(0.3, fast, fast, 999, 0.1),
        answer(0.4, fast, fast, 100, 0.9),
        answer(0.5, fast, fast, 100, 0.1),
    ]
    assert kls(answers, Budget(ttft_ms=2.0)) == [0.2, 0.3, 0.4, 0.5]
    assert kls(answers, Budget(tpot_ms=2.0)) == [0.1, 0.3, 0.4, 0.5]
    assert kls(answers, Budget(max_size_bytes=100)) == [0.1, 0.2, 0.4, 0.5]
    assert kls(answers, Budget(max_parameters_ratio=0.1)) == [0.1, 0.2, 0.3, 0.5]
    assert kls(answers, Budget(tpot_ms=2.0, ttft_ms=2.0, max_size_bytes=100, max_parameters_ratio=0.1)) == [0.5]


def test_memory_is_held_against_its_upper_bound() -> None:
    fast = answer(0.1, Latency(1.0, 1.0, 1.0))
    answers = [replace(fast, memory=Memory(90, 80, high_bytes, 50)) for high_bytes in (99, 100, 101)]
    budget = Budget(max_memory_bytes=100)
    assert admitted(answers, budget) == hopeful(answers, budget) == answers[:2]
    assert answers[2].excess(budget) == pytest.approx(1.01)
    with pytest.raises(ValueError, match="needs a profile of memory"):
        fast.excess(budget)
    assert Budget(tpot_ms=1.0, prompt_tokens=64, context_tokens=512, batch_size=2).memory_workloads == (
        Workload("prefill", 64, 2),
        Workload("decode", 512, 2),
    )


def test_unmet_names_the_one_whose_worst_excess_is_least() -> None:
    answers = [
        answer(0.1, Latency(4.0, 4.0, 4.0, None), size_bytes=2_000_000),  # 2 x the latency, 1 x the size
        answer(0.2, Latency(1.0, 1.0, 1.0, None), size_bytes=3_000_000),  # 0.5 x, 1.5 x
        answer(0.3, Latency(2.2, 2.2, 2.2, 3.4, 3.5), size_bytes=1_000_000),  # measured at 1.75 x
    ]
    with pytest.raises(BudgetUnmetError, match=r"decode 1\.00 ms, 3 MB and 50% of the parameters") as unmet:
        admitted(answers, Budget(tpot_ms=2.0, max_size_bytes=2_000_000))
    assert unmet.value.nearest is answers[1]
    assert SUBNET.id in str(unmet.value)
    assert answers[1].excess(Budget(tpot_ms=2.0, max_size_bytes=2_000_000)) == pytest.approx(1.5)


def test_a_limit_just_met_is_met() -> None:
    found = answer(0.1, Latency(2.0, 2.0, 2.0, None), parameters_ratio=0.25)
    assert admitted([found], Budget(tpot_ms=2.0, max_parameters_ratio=0.25)) == [found]
    with pytest.raises(BudgetUnmetError):
        admitted([found], Budget(tpot_ms=1.9999))


@pytest.mark.parametrize("limits", [{}, {"prompt_tokens": 64}])
def test_a_budget_needs_a_limit(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs a budget; give --tpot-ms"):
        Budget(**limits)


@pytest.mark.parametrize("limit", ["tpot_ms", "ttft_ms", "max_size_bytes", "max_parameters_ratio", "max_memory_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_above_zero(limit: str, value: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Budget(**{limit: value})


def test_limits_belong_to_their_workloads() -> None:
    budget = Budget(tpot_ms=3.0, ttft_ms=40.0, prompt_tokens=64, context_tokens=512)
    assert budget.latency_limits == {Workload("decode", 512): 3.0, Workload("prefill", 64): 40.0}
    assert replace(budget, tpot_ms=None).latency_limits == {Workload("prefill", 64): 40.0}


class Model:
    """What `describe` asks of a LatencyModel: predictions 1, 2, .. times `scale`, and one subnet that is measured."""

    space = tiny_space(2)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def predict(self, subnets: list[Subnet]) -> LatencyPrediction:
        value_ms = self.scale * np.arange(1.0, len(subnets) + 1)
        return LatencyPrediction(value_ms, value_ms * 0.5, value_ms * 2)

    def timed(self, subnet: Subnet) -> Timed | None:
        if subnet != self.space.full(4):
            return None
        target, base = Target("d", "fake", "int4", 1), self.space.base
        return timed_together(
            [Measurement(target, base, DECODE, "finalist", base.id, 0.5, 0.1, 15, {base.id: 14.0 * self.scale}, "1")]
        )


def test_describe_gives_each_trial_its_own_costs() -> None:
    """By hand, per layer: attention 2 x 64 x 16 x (4 + 2) = 12288 weights, MLP 3 x 64 x 128 = 24576; norms of 64 each.

    Embedding 256 x 64 = 16384. A byte is 8 of 8.5 bits a weight with its scale, or of 4.5.
    """
    small = Subnet((LayerChoice(2, 128), LayerChoice(0, 0)), 8)
    subnets = [Model.space.full(8), small, Model.space.full(4)]
    trials = [Trial(subnet, Quality(0.1 * i, 9.0, 1, 1.0), "seed") for i, subnet in enumerate(subnets)]
    models: Any = {DECODE: Model(1.0), PREFILL: Model(10.0)}
    layer, embedding = 12288 + 24576, 16384
    full_parameters = 2 * (layer + 2 * 64) + 64 + embedding
    small_parameters = layer + 2 * 64 + 64 + embedding
    answers = describe(trials, models, full_parameters)
    assert [a.subnet for a in answers] == subnets
    assert [a.quality for a in answers] == [trial.quality for trial in trials]
    assert [a.parameters for a in answers] == [full_parameters, small_parameters, full_parameters]
    assert answers[1].parameters_ratio == pytest.approx(small_parameters / full_parameters)
    assert [a.size_bytes for a in answers] == [
        round((2 * layer + embedding) * 8.5 / 8 + 5 * 64 * 4),
        round((layer + embedding) * 8.5 / 8 + 3 * 64 * 4),
        round(2 * layer * 4.5 / 8 + embedding * 8.5 / 8 + 5 * 64 * 4),
    ]
    assert answers[1].latencies == {DECODE: Latency(2.0, 1.0, 4.0, None), PREFILL: Latency(20.0, 10.0, 40.0, None)}
    # 15 ratios of 0.5, half of them within 0.1: a standard error of 1.25 x 1.48 x 0.1 / sqrt(15) = 0.0478
    high_ms = pytest.approx(70.0 * (0.5 + 2 * 0.0478) / 0.5, rel=1e-3)
    assert answers[2].latencies[PREFILL] == Latency(30.0, 15.0, 60.0, pytest.approx(70.0), high_ms)
