"""What the commands ask of a stored study: the answer to a budget, one subnet, a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hw_profiles import Store, Target, Workload, runtime
from hw_profiles.measurement import Role
from hw_profiles.profile import Progress
from hw_profiles.runtimes import SCALE_BYTES, engine_of
from hw_profiles.shapes import PHASES, Precision
from hw_profiles.staleness import StaleProfileError
from nas.budget import Answer, Budget, BudgetUnmetError, admitted, describe, hopeful
from nas.latency import LatencyModel, ProfileMissingError, held_out_errors, latency_curves
from nas.memory import Memory, MemoryModel
from nas.space import SearchSpace
from nas.study import Study, StudyError, Trial
from nas.subnet import Subnet

if TYPE_CHECKING:  # an answer from the database waits for neither torch nor matplotlib
    from export import LatencyPrediction
    from nas.report import ReportData


def answer_query(
    store: Store,
    study: Study,
    budget: Budget,
    device_id: str,
    runtime_name: str,
    threads: int,
    measure: int,
    progress: Progress = lambda done, total, what: None,
    allow_stale: bool = False,
) -> Answer:
    """The trial of best quality within the budget.

    With `measure` one that was timed and met the budget: of those that are likely to meet it (`hopeful`) the best are
    timed, `measure` at a time, until no untimed one is better than the best that met it; and that is timed once more,
    loaded anew, and has to meet it by both timings together.
    Raises BudgetUnmetError where there is none, what `LatencyModel.fit` raises and, where memory is limited, what
    `MemoryModel.fit` and `.predict` raise.
    """
    workloads = list(budget.latency_limits) or [Workload("decode", budget.context_tokens, budget.batch_size)]
    trials = _trials(study)
    memories: list[Memory] | None = None
    try:
        memory = MemoryModel.fit(
            store, device_id, runtime_name, threads, study.space, budget.memory_workloads, allow_stale
        )
        memories = memory.predict([trial.subnet for trial in trials])
    except (ProfileMissingError, StaleProfileError):
        if budget.max_memory_bytes is not None:
            raise

    def answers() -> list[Answer]:
        models = {
            workload: LatencyModel.fit(
                store, device_id, runtime_name, threads, study.space, workload, allow_stale=allow_stale
            )
            for workload in workloads
        }
        scale_bytes = SCALE_BYTES.get(engine_of(runtime_name), 2)
        return describe(trials, models, study.space.base.parameters, memories, scale_bytes)

    select = hopeful if measure else admitted
    best, *others = select(answers(), budget)
    while measure and not best.is_confirmed:
        from nas.profiling import measure_finalists

        role: Role = "confirmation" if best.is_measured else "finalist"
        finalists = [best] if best.is_measured else [a for a in (best, *others[: measure - 1]) if not a.is_measured]
        for precision in {answer.subnet.precision for answer in finalists}:
            target = Target(device_id, runtime_name, precision, threads)
            shapes = [study.space.model_shape(a.subnet) for a in finalists if a.subnet.precision == precision]
            engine = runtime(runtime_name)
            measure_finalists(store, target, engine, study.space.base, shapes, role, workloads, progress)
        best, *others = select(answers(), budget)
    return best


def _trials(study: Study) -> list[Trial]:
    trials = study.trials()
    if not trials:
        raise StudyError(f"study {study.name!r} has no trials yet; run nas search again to go on with it")
    return trials


def find_subnet(study: Study, name: str, precision: Precision | None) -> Subnet:
    """A trial by its id, or `full`, at its own bits or at those of `precision`."""
    if name == "full":
        return study.space.full().at(precision or "fp32")
    for trial in study.trials():
        if trial.subnet.id == name:
            return trial.subnet if precision is None else trial.subnet.at(precision)
    raise StudyError(f"study {study.name!r} has no subnet {name!r}; take an id from nas query or nas search, or `full`")


def predictions_for(
    store: Store,
    space: SearchSpace,
    subnet: Subnet,
    format_: str,
    device_id: str,
    threads: int,
    workloads: Sequence[Workload],
) -> list[LatencyPrediction]:
    """What the device's profile says of a subnet in a format; empty where its runtimes have none or it is stale."""
    from export import FORMAT_OF_RUNTIME, LatencyPrediction

    predictions = []
    for runtime_name in sorted({target.runtime for target in store.targets() if target.device_id == device_id}):
        for workload in workloads if FORMAT_OF_RUNTIME.get(engine_of(runtime_name)) == format_ else ():
            try:
                predicted = LatencyModel.fit(store, device_id, runtime_name, threads, space, workload).predict([subnet])
            except (ProfileMissingError, StaleProfileError):
                continue
            target = f"{device_id}/{Target(device_id, runtime_name, subnet.precision, threads).key}"
            values = (float(column[0]) for column in (predicted.value_ms, predicted.low_ms, predicted.high_ms))
            predictions.append(LatencyPrediction(workload.phase, workload.tokens, workload.batch_size, target, *values))
    return predictions


def report_data(
    store: Store,
    study: Study,
    tpot_ms: float | None,
    device_id: str,
    runtime_name: str,
    threads: int,
    context_tokens: int,
    chosen_id: str | None = None,
) -> ReportData:
    """All that the database knows for a report, stale or not; the files' own figures are for the caller to add.

    The chosen subnet is `chosen_id`, or the answer to `tpot_ms` alone.
    """
    from nas.report import LatencyError, MeasuredLatency, ReportData, TrialPoint
    from nas.search import quality_report

    decode = Workload("decode", context_tokens)
    latency = LatencyModel.fit(store, device_id, runtime_name, threads, study.space, decode, allow_stale=True)
    trials = _trials(study)
    predicted = latency.predict([trial.subnet for trial in trials])
    answers = describe(trials, {decode: latency}, study.space.base.parameters)
    chosen: Answer | None = None
    if chosen_id is not None:
        chosen = next((answer for answer in answers if answer.subnet.id == chosen_id), None)
    elif tpot_ms is not None:
        try:
            chosen = admitted(answers, Budget(tpot_ms=tpot_ms, context_tokens=context_tokens))[0]
        except BudgetUnmetError:
            chosen = None
    quality = quality_report(study.space, trials)
    profiled = sorted({target.runtime for target in store.targets() if target.device_id == device_id})
    errors = []
    for name in profiled:
        for phase in PHASES:
            try:
                errors.append(held_out_errors(store, device_id, name, threads, study.space, phase, allow_stale=True))
            except ProfileMissingError:
                continue
    device = next((known.name for known in store.devices() if known.id == device_id), device_id)
    return ReportData(
        title=f"{study.name}: {study.model.rsplit('/', 1)[-1]}",
        model=study.model.rsplit("/", 1)[-1],
        device=device,
        runtime=runtime_name,
        precision=chosen.subnet.description if chosen else "int8 and int4",
        budget_tpot_ms=tpot_ms,
        trials=[
            TrialPoint(
                t.subnet.id, t.subnet.bits, t.quality.kl, t.quality.perplexity, float(ms), t.role, t.subnet.is_mixed
            )
            for t, ms in zip(trials, predicted.value_ms, strict=True)
        ],
        chosen=chosen.subnet if chosen else None,
        chosen_id=chosen.subnet.id if chosen else None,
        chosen_predicted=_interval(chosen, decode) if chosen else None,
        full=study.space.full(),
        heads_per_group=study.space.heads_per_group,
        quality_spearman=quality.spearman if quality else None,
        additive_spearman=quality.additive_spearman if quality else None,
        latency=[
            MeasuredLatency(
                e.runtime,
                e.phase,
                g.precision,
                g.predicted_ms,
                g.low_ms,
                g.high_ms,
                g.measured_ms,
                g.shape.parameters,
            )
            for e in errors
            for g in e.graphs
        ],
        latency_errors=[
            LatencyError(
                e.runtime,
                e.phase,
                e.mape,
                e.within_5,
                e.within_10,
                e.spearman,
                e.additive_mape,
                e.flops_spearman,
                e.repeat_noise,
                e.samples,
            )
            for e in errors
        ],
        latency_curves=[
            curve
            for name in profiled
            for phase in PHASES
            for curve in latency_curves(store, device_id, name, threads, study.space, phase)
        ],
    )


def _interval(answer: Answer, workload: Workload) -> tuple[float, float, float]:
    latency = answer.latencies[workload]
    return latency.value_ms, latency.low_ms, latency.high_ms
