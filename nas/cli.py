"""The `nas` command. Every command takes --json: one object on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from safetensors import SafetensorError

from hw_profiles import Device, Store, detect, runtime
from hw_profiles.runtimes import engine_of, installed, names
from hw_profiles.shapes import PRECISIONS, Precision
from hw_profiles.staleness import installed_version, summarise
from nas import improve_commands, subnet_commands, tables
from nas.options import (
    CACHE,
    DATABASE,
    RUNTIME_NAMES,
    AllowStale,
    BatchSize,
    Cache,
    ContextTokens,
    Cpus,
    Database,
    DeviceId,
    Json,
    MemoryLimit,
    PromptTokens,
    QueryHeads,
    RuntimeName,
    Seed,
    StudyName,
    SupernetFolder,
    Threads,
    TpotLimit,
    TtftLimit,
    count,
    device_and_threads,
    objectives,
    one_of_precisions,
    positive,
)
from nas.study import Algorithm
from nas.terminal import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_UNMET,
    emit,
    fail,
    note,
    os_error_sentence,
    progress_bar,
    safetensors_error_sentence,
)

if TYPE_CHECKING:
    from nas.memory import MemoryProfile

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

#: bf16 and fp16 have to be asked for: few runtimes and CPUs gain by them, and no search chooses them.
_PROFILED: tuple[Precision, ...] = ("fp32", "int8", "int4")


@app.command()
def devices(database: Database = DATABASE, as_json: Json = False) -> None:
    """What is here, and what is profiled."""
    here = detect()
    available = {engine.name: {"version": engine.version(), "names": names(engine)} for engine in installed()}
    with Store(database) as store:
        known = {device.id: device.title for device in store.devices()}
        summaries = [
            summarise(store, target, installed_version(target.runtime, target.device_id)) for target in store.targets()
        ]
    profiled = [tables.summary_fields(summary) for summary in summaries]
    engines = "\n".join(f"  {n} {a['version']}: --runtime {', '.join(a['names'])}" for n, a in available.items())
    header = f"{here.id}  {here.title}, {here.cores} cores, {here.memory_bytes / 2**30:.0f} GiB\n{engines}"
    stale = [row["target"] for row in profiled if row["stale"]]
    advice = [f"STALE: another version of the runtime is installed now; nas profile again for {', '.join(stale)}"]
    emit({"here": {"id": here.id, **asdict(here)}, "runtimes": available, "devices": known, "profiled": profiled},
         as_json, header, tables.profiled(summaries), *(advice if stale else []))  # fmt: skip


@app.command()
def profile(
    model: Annotated[str | None, typer.Argument(help="Hugging Face id, local folder, or GGUF file.")] = None,
    runtime_name: Annotated[
        list[str] | None, typer.Option("--runtime", help=f"Any of {RUNTIME_NAMES} All that are installed by default.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(PRECISIONS)}; {', '.join(_PROFILED)} by default."),
    ] = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: Annotated[
        list[int] | None,
        count("Prompt lengths, of which any in between can be asked for; 16, 128 and 512 by default."),
    ] = None,
    context_tokens: Annotated[
        list[int] | None, count("Context lengths, likewise; 0, 128 and 1,024 by default.", least=0)
    ] = None,
    batch_size: Annotated[list[int], count("Sequences run at once, likewise.")] = [1],  # noqa: B006
    anchors: Annotated[
        int, count("Most random graphs that the predictors are fitted on; fewer where more do not help.", least=0)
    ] = 12,
    heldout: Annotated[int, count("Random graphs that they are judged on.", least=0)] = 8,
    repeats: Annotated[int, count("Graphs of the latter timed twice, for the noise floor.", least=0)] = 2,
    rounds: Annotated[int, count("Rounds that every graph is timed in.")] = 3,
    memory_graphs: Annotated[
        int, count("Graphs run in processes of their own for their memory, a quarter held out; 0 for none.", least=0)
    ] = 8,
    query_heads: QueryHeads = False,
    seed: Seed = 0,
    transfer_from: Annotated[
        str | None,
        typer.Option(help="Id of a profiled device, or auto: time fewer graphs, and lean on the most similar profile."),
    ] = None,
    pack: Annotated[
        Path | None, typer.Option(help="Zip file to write the graphs to, for a device that does not run this program.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--import", help="What `python -m hw_profiles run` measured with a pack there.")
    ] = None,
    database: Database = DATABASE,
    as_json: Json = False,
) -> None:
    """Time decoder graphs of MODEL's shapes on this machine. Run again after an interruption to go on."""
    if measured is not None:
        from nas.profiling import import_measured

        if pack is not None:
            raise ValueError("--pack writes a file and --import reads one, got both; give one of the two")
        with Store(database) as store:
            device, results, profiles = import_measured(store, measured, model)
        _emit_profile(device, results, profiles, as_json)
        return
    if model is None:
        raise ValueError("wanted a MODEL to profile, or --import with a file of measurements, got neither")
    runtimes = list(dict.fromkeys(runtime_name or (engine.name for engine in installed())))
    precisions = [one_of_precisions(value) for value in dict.fromkeys(precision or _PROFILED)]
    counts = {"anchors": anchors, "heldout": heldout, "repeats": repeats}
    from nas.profiling import pack_targets, profile_memories, profile_targets, profiled_space, workloads_of

    engines = [runtime(name) for name in runtimes] if pack is None else []  # those of a pack are not here
    space = profiled_space(model, query_heads=query_heads)
    workloads = workloads_of(space, prompt_tokens, context_tokens, batch_size)
    if pack is not None:
        with progress_bar("pack") as progress:
            plan = pack_targets(
                pack, space, runtimes, precisions, threads, workloads,
                counts=counts, rounds=rounds, seed=seed, memory_graphs=memory_graphs, with_table=transfer_from is None,
                progress=progress,
            )  # fmt: skip
        result = {"pack": str(pack), "size_bytes": pack.stat().st_size, "graphs": len(plan.graphs),
                  "targets": ["/".join(target) for target in plan.targets]}  # fmt: skip
        emit(result, as_json, f"{pack}: {result['size_bytes']:,} bytes; on the device, beside the folder hw_profiles:\n"
             f"python -m hw_profiles run {pack.name} --output measured.json")  # fmt: skip
        return
    with Store(database) as store:
        asked = (store, space, engines, precisions, threads or detect().cores, workloads)
        with progress_bar("profile") as progress:
            results = profile_targets(
                *asked, counts=counts, rounds=rounds, seed=seed, transfer_from=transfer_from, progress=progress
            )
        with progress_bar("memory") as progress:
            profiles = profile_memories(*asked, counts=counts, seed=seed, graphs=memory_graphs, progress=progress)
    _emit_profile(detect(), results, profiles, as_json)


def _emit_profile(
    device: Device, results: list[tables.Fields], profiles: Sequence[MemoryProfile], as_json: bool
) -> None:
    memories = [tables.memory_fields(profile) for profile in profiles]
    shown = [tables.timed(results), *([tables.memory(memories)] if memories else [])]
    fields = {"device": device.id, "targets": results, "memory": memories}
    emit(fields, as_json, *shown, f"{device.id}  {device.title}")


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local folder, or GGUF file.")],
    study_name: StudyName,
    runtime_name: RuntimeName = "openvino",
    evaluations: Annotated[int, count("Subnets evaluated on text.")] = 100,
    objective: Annotated[list[str], typer.Option(help="kl, and tpot_ms or ttft_ms.")] = ["kl", "tpot_ms"],  # noqa: B006
    budget_ms: Annotated[float | None, positive("Latency near which a good answer is wanted most.")] = None,
    algorithm: Annotated[Algorithm, typer.Option(help="The others are to compare with.")] = "seeded",
    device: DeviceId = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    batch_size: BatchSize = 1,
    homogeneous: Annotated[
        bool, typer.Option(help="Layers of one size, others dropped whole: files of the plain architecture.")
    ] = False,
    uniform_bits: Annotated[
        bool, typer.Option(help="All parts of a subnet at 8 or at 4 bits, not each at its own.")
    ] = False,
    query_heads: QueryHeads = False,
    text: Annotated[
        list[Path],
        typer.Option(help="Your own text in place of ours, .txt, .jsonl or hf:DATASET: calibrates and guides."),
    ] = [],  # noqa: B006
    task: Annotated[
        list[str],
        typer.Option(
            help="Go by the right choices of multiple-choice tasks in place of KL, as of nas evaluate; items whose "
            "scores you report should not be among them."
        ),
    ] = [],  # noqa: B006
    task_items: Annotated[int, count("Items of each task that a subnet is judged on.")] = 64,
    supernet_folder: SupernetFolder = None,
    reform: Annotated[bool, typer.Option(help="Least-squares weights; off to see what they are worth.")] = True,
    seed: Seed = 0,
    allow_stale: AllowStale = False,
    trust_remote_code: bool = False,
    database: Database = DATABASE,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Search MODEL's subnets for quality and latency. Run again after an interruption to go on."""
    import time

    from export.openvino import check_heads
    from nas.families import load_model
    from nas.latency import LatencyModel
    from nas.protocol import open_evaluator, open_supernet, protocol_on, tuned_digest
    from nas.search import Evaluates, SearchSettings
    from nas.search import search as run_search
    from nas.space import SearchSpace
    from nas.study import Study
    from nas.text_sets import as_files

    if task:  # before anything takes long
        from nas.tasks import ChoiceLoss, TaskEvaluator

    workloads = objectives(prompt_tokens, context_tokens, batch_size)
    if len(objective) != 2 or objective[0] != "kl" or objective[1] not in workloads:
        raise ValueError(f"objectives must be kl and one of {', '.join(workloads)}, got {', '.join(objective)}")
    settings = SearchSettings(evaluations=evaluations, seed=seed, budget_ms=budget_ms, algorithm=algorithm)
    started = time.perf_counter()
    with Store(database) as store:
        device_id, threads = device_and_threads(store, device, threads)
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        mixed_bits = not (homogeneous or uniform_bits)
        space = SearchSpace.from_config(
            loaded.config, homogeneous=homogeneous, mixed_bits=mixed_bits, query_heads=query_heads
        )
        if engine_of(runtime_name) == "openvino" and not homogeneous:
            check_heads(space.block_choices())
        latency = LatencyModel.fit(
            store,
            device_id,
            runtime_name,
            threads,
            space,
            workloads[objective[1]],
            learn_from_finalists=False,
            allow_stale=allow_stale,
        )
        members = tables.space_fields(space, latency)
        note(f"{loaded.name}: {tables.space(members)}")
        if loaded.window:
            note(f"its attention over windows of {loaded.window:,} tokens is taken for full attention over as many")
        if budget_ms is not None and budget_ms < (least_ms := members["smallest"]["low_ms"]):
            sentence = f"wanted {budget_ms:g} ms, but embedding and head alone take {least_ms:.3g} ms; allow more"
            raise typer.Exit(fail(sentence, EXIT_UNMET, {"space": members}))
        text = as_files(text, cache)
        protocol = protocol_on(
            text, reform=reform, tuned=tuned_digest(supernet_folder), tasks=task, task_items=task_items
        )
        protocol.search(loaded.tokenizer)  # a text that is too short is refused before there is a study of it
        if task:
            task_loss = ChoiceLoss(loaded, task, limit=task_items)  # and so is what is no task
        study = Study.create(store, study_name, model, loaded.fingerprint, space, protocol.to_dict(), text)
        with progress_bar("prepare") as progress:
            supernet = open_supernet(loaded, space, protocol, cache, supernet_folder, progress)
        evaluator: Evaluates = open_evaluator(supernet, protocol)
        if task:
            evaluator = TaskEvaluator(evaluator, task_loss)
        with progress_bar("search") as progress:
            trials = run_search(space, evaluator, latency.value_ms, study, settings, progress)
        values_ms = latency.value_ms([trial.subnet for trial in trials])
    rows = [tables.trial_fields(trial, {objective[1]: float(ms)}) for trial, ms in zip(trials, values_ms, strict=True)]
    cost = {"evaluations": len(trials), "tokens": sum(t.quality.tokens for t in trials),
            "seconds": time.perf_counter() - started}  # fmt: skip
    emit({"study": study_name, "space": members, "trials": rows, **cost}, as_json, tables.trials(study_name, rows))


@app.command()
def query(
    study_name: StudyName,
    tpot_ms: TpotLimit = None,
    ttft_ms: TtftLimit = None,
    memory_mb: MemoryLimit = None,
    max_size_mb: Annotated[float | None, positive("Limit of the weights' size on disk, in 10^6 bytes.")] = None,
    max_parameters_ratio: Annotated[float | None, positive("Limit relative to the full model.")] = None,
    runtime_name: RuntimeName = "openvino",
    device: DeviceId = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    batch_size: BatchSize = 1,
    measure: Annotated[int, count("Finalists timed on this machine before one is returned.", least=0)] = 0,
    allow_stale: AllowStale = False,
    database: Database = DATABASE,
    as_json: Json = False,
) -> None:
    """The best subnet of a study within a budget. Exit code 1, with the nearest, where there is none."""
    from nas.budget import Budget, BudgetUnmetError
    from nas.queries import answer_query
    from nas.study import Study

    budget = Budget(
        tpot_ms,
        ttft_ms,
        None if max_size_mb is None else round(max_size_mb * 1e6),
        max_parameters_ratio,
        prompt_tokens,
        context_tokens,
        batch_size,
        None if memory_mb is None else round(memory_mb * 1e6),
    )
    with Store(database) as store, progress_bar("query") as progress:
        study = Study.load(store, study_name)
        device_id, threads = device_and_threads(store, device, threads)
        if measure and device_id != detect().id:
            raise ValueError(f"--measure times on this device, {detect().id}, got --device {device_id}; leave one out")
        try:
            answer = answer_query(
                store, study, budget, device_id, runtime_name, threads, measure, progress, allow_stale
            )
        except BudgetUnmetError as error:
            code = fail(str(error), EXIT_UNMET, {"nearest": tables.answer_fields(error.nearest)})
            raise typer.Exit(code) from error
    emit(tables.answer_fields(answer), as_json, tables.answer(answer))


for command in (
    improve_commands.refine,
    improve_commands.tune,
    subnet_commands.evaluate,
    subnet_commands.export,
    subnet_commands.verify,
):
    app.command()(command)


@app.command()
def report(
    study_name: StudyName,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    tpot_ms: TpotLimit = None,
    runtime_name: RuntimeName = "openvino",
    device: DeviceId = None,
    threads: Threads = None,
    cpus: Cpus = None,
    context_tokens: ContextTokens = 128,
    database: Database = DATABASE,
    as_json: Json = False,
) -> None:
    """Plots of a study and of the profile behind it, as one HTML file."""
    from nas.queries import report_data
    from nas.report import write_report
    from nas.study import Study

    with Store(database) as store:
        study = Study.load(store, study_name)
        device_id, threads = device_and_threads(store, device, threads)
        data = report_data(store, study, tpot_ms, device_id, runtime_name, threads, context_tokens)
    write_report(data, output)
    emit({"report": str(output)}, as_json, f"{output}: {len(data.trials)} trials")


def main() -> None:
    """Entry point: every failure that a user can cause ends in one sentence and an exit code, never a traceback."""
    try:
        code = app(standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # which typer turned into this code
    except typer.TyperException as error:
        # no message: the help was printed, for want of a command
        code = fail(error.format_message(), EXIT_BAD_INPUT) if error.format_message() else EXIT_BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        code = fail("stopped; run the same command again to go on from here", EXIT_INTERRUPTED)
    # RuntimeError is what runtimes raise for files they refuse
    except (ValueError, ImportError, RuntimeError, MemoryError) as error:
        code = fail(str(error) or "there is not memory enough; ask for less", EXIT_BAD_INPUT)
    except SafetensorError as error:
        code = fail(safetensors_error_sentence(error), EXIT_BAD_INPUT)
    except OSError as error:
        code = fail(os_error_sentence(error), EXIT_BAD_INPUT)
    sys.exit(code)
