"""Budget queries: the best trial that a device can run within the limits, from what is stored.

A prediction is admitted by its interval's upper bound, never by its middle; a measured subnet by two standard errors
above its median. Which subnets are worth measuring is another question: see `hopeful`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hw_profiles import Workload
from nas.latency import LatencyModel
from nas.memory import Memory
from nas.quality import Quality
from nas.study import Trial
from nas.subnet import Subnet

#: By how much the upper end of a finalist's measurement lies above its median, about: a subnet whose middle is nearer
#: to the budget is unlikely to be admitted once it was timed.
MEASURED_MARGIN = 0.05


@dataclass(frozen=True)
class Budget:
    """Limits; None where there is none. `max_parameters_ratio` is relative to the full model."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None
    max_size_bytes: int | None = None
    max_parameters_ratio: float | None = None
    prompt_tokens: int = 128
    context_tokens: int = 128
    batch_size: int = 1
    #: Of a process that runs both the prompt and the context.
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        limits = (self.tpot_ms, self.ttft_ms, self.max_size_bytes, self.max_parameters_ratio, self.max_memory_bytes)
        if all(limit is None for limit in limits):
            raise ValueError(
                "a query needs a budget; give --tpot-ms, --ttft-ms, --memory-mb, --max-size-mb or "
                "--max-parameters-ratio"
            )
        if wrong := [limit for limit in limits if limit is not None and not limit > 0]:
            raise ValueError(f"budgets must be above 0, got {wrong[0]:g}")

    @property
    def memory_workloads(self) -> tuple[Workload, Workload]:
        """What a process does whose memory is asked for: read the prompt, and fill the context."""
        return (
            Workload("prefill", self.prompt_tokens, self.batch_size),
            Workload("decode", self.context_tokens, self.batch_size),
        )

    @property
    def latency_limits(self) -> dict[Workload, float]:
        """Milliseconds allowed of each workload that is limited."""
        limits = {
            Workload("decode", self.context_tokens, self.batch_size): self.tpot_ms,
            Workload("prefill", self.prompt_tokens, self.batch_size): self.ttft_ms,
        }
        return {workload: limit for workload, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one workload: predicted, with its 90 % interval, and measured where it was.

    `measured_high_ms` is the measurement's upper end, `is_confirmed` as in `nas.latency.Timed`.
    """

    value_ms: float
    low_ms: float
    high_ms: float
    measured_ms: float | None = None
    measured_high_ms: float | None = None
    is_confirmed: bool = False

    @property
    def admitted_ms(self) -> float:
        """What is held against a budget."""
        return self.high_ms if self.measured_high_ms is None else self.measured_high_ms

    def hoped_ms(self, margin: float) -> float:
        """What is held against a budget by someone about to measure, who expects `margin` above the middle at most."""
        likely_ms = min(self.high_ms, self.value_ms * (1 + margin))
        return likely_ms if self.measured_high_ms is None else self.measured_high_ms


@dataclass(frozen=True)
class Answer:
    """A subnet, its quality, what it costs on the device, and its share of the full model's parameters."""

    subnet: Subnet
    quality: Quality
    latencies: Mapping[Workload, Latency]
    size_bytes: int
    parameters: int
    parameters_ratio: float
    #: None where it was not profiled.
    memory: Memory | None = None

    @property
    def is_measured(self) -> bool:
        return all(latency.measured_ms is not None for latency in self.latencies.values())

    @property
    def is_confirmed(self) -> bool:
        return all(latency.is_confirmed for latency in self.latencies.values())

    def excess(self, budget: Budget, margin: float | None = None) -> float:
        """By which factor the most exceeded limit is exceeded; at most 1 within the budget.

        With a `margin` an unmeasured latency counts with so much above its middle, where its upper bound is more.
        """
        ratios = []
        for workload, limit in budget.latency_limits.items():
            latency = self.latencies[workload]
            ratios.append((latency.admitted_ms if margin is None else latency.hoped_ms(margin)) / limit)
        if budget.max_size_bytes is not None:
            ratios.append(self.size_bytes / budget.max_size_bytes)
        if budget.max_parameters_ratio is not None:
            ratios.append(self.parameters_ratio / budget.max_parameters_ratio)
        if budget.max_memory_bytes is not None:
            if self.memory is None:
                raise ValueError(f"a limit of memory needs a profile of memory, got none for {self.subnet.id}")
            ratios.append(self.memory.high_bytes / budget.max_memory_bytes)
        return max(ratios)


class BudgetUnmetError(ValueError):
    """No trial meets the budget; `nearest` comes closest."""

    def __init__(self, message: str, nearest: Answer) -> None:
        super().__init__(message)
        self.nearest = nearest


def describe(
    trials: Sequence[Trial],
    models: Mapping[Workload, LatencyModel],
    space_parameters: int,
    memories: Sequence[Memory] | None = None,
    scale_bytes: int = 2,
) -> list[Answer]:
    """Every trial with its latencies on the models' device and, where that is known, its memory.

    `scale_bytes` is what a scale takes in the files that the device runs.
    """
    subnets = [trial.subnet for trial in trials]
    predictions = {workload: model.predict(subnets) for workload, model in models.items()}
    answers = []
    for i, trial in enumerate(trials):
        model = next(iter(models.values()))
        shape = model.space.model_shape(trial.subnet)
        latencies = {}
        for workload, p in predictions.items():
            predicted = (float(p.value_ms[i]), float(p.low_ms[i]), float(p.high_ms[i]))
            timed = models[workload].timed(trial.subnet)
            measured = () if timed is None else (timed.latency_ms, timed.high_ms, timed.is_confirmed)
            latencies[workload] = Latency(*predicted, *measured)
        size_bytes = shape.weight_bytes(trial.subnet.precision, scale_bytes)
        ratio = shape.parameters / space_parameters
        memory = None if memories is None else memories[i]
        answers.append(Answer(trial.subnet, trial.quality, latencies, size_bytes, shape.parameters, ratio, memory))
    return answers


def hopeful(answers: Sequence[Answer], budget: Budget) -> list[Answer]:
    """Those that were timed and meet the budget, and those that are likely to once they are, best quality first.

    Where there are none, those that may: by the middle of their prediction. Raises as `admitted`.
    """
    try:
        return admitted(answers, budget, MEASURED_MARGIN)
    except BudgetUnmetError:
        return admitted(answers, budget, 0.0)


def admitted(answers: Sequence[Answer], budget: Budget, margin: float | None = None) -> list[Answer]:
    """Those within every limit, best quality first; `margin` as in `Answer.excess`.

    Raises BudgetUnmetError, with the answer that comes nearest, where there is none.
    """
    within = [answer for answer in answers if answer.excess(budget, margin) <= 1]
    if not within:
        nearest = min(answers, key=lambda answer: answer.excess(budget, margin))
        costs = [f"{w.phase} {latency.admitted_ms:.2f} ms" for w, latency in nearest.latencies.items()]
        if nearest.memory is not None:
            costs.append(f"{nearest.memory.high_bytes / 1e6:.0f} MB of memory")
        raise BudgetUnmetError(
            f"no subnet of the study meets the budget; the nearest, {nearest.subnet.id}, has {', '.join(costs)}, "
            f"{nearest.size_bytes / 1e6:.0f} MB and {nearest.parameters_ratio:.0%} of the parameters",
            nearest,
        )
    return sorted(within, key=lambda answer: answer.quality.loss)
