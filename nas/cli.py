"""The `nas` command. Every command takes --json: one object on standard output."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from hw_profiles import RUNTIMES, Store, Workload, detect, runtime
from hw_profiles.devices import pin
from hw_profiles.runtimes import installed, names
from hw_profiles.shapes import PRECISIONS, Precision
from hw_profiles.staleness import installed_version, summarise
from nas import tables
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

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _pin(cpus: str | None) -> None:
    if cpus is not None:
        pin(cpus)


Database = Annotated[str, typer.Option(envvar="NAS_DATABASE", help="SQLite file or SQLAlchemy URL.")]
Cache = Annotated[Path, typer.Option(envvar="NAS_CACHE", help="Folder for calibration statistics and weights.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study in the database.")]
_RUNTIMES = f"{', '.join(RUNTIMES)}, which may carry a device that nas devices lists, as in openvino:GPU."
RuntimeName = Annotated[str, typer.Option("--runtime", help=f"One of {_RUNTIMES}")]

#: Takes effect when it is parsed: before any engine starts its threads, and before anything asks which device this is.
Cpus = Annotated[
    str | None, typer.Option("--cpus", callback=_pin, help="Keep to these, such as 0-3,8: a device of its own.")
]
Threads = Annotated[int | None, typer.Option(help="Threads; all cores of the device by default.")]
DeviceId = Annotated[str | None, typer.Option("--device", help="Id of a profiled device; this one by default.")]
PromptTokens = Annotated[int, typer.Option(help="Prompt length that TTFT is for.")]
ContextTokens = Annotated[int, typer.Option(help="Context length that TPOT is for.")]
BatchSize = Annotated[int, typer.Option(help="Sequences run at once; a token of each is one TPOT.")]
TpotLimit = Annotated[float | None, typer.Option(help="Limit of the time per output token.")]
ModelMoved = Annotated[
    str | None, typer.Option("--model", help="Where the study's model is, if it moved since the search.")
]
AllowStale = Annotated[
    bool, typer.Option("--allow-stale", help="Use a profile of another version of the runtime all the same.")
]
TtftLimit = Annotated[float | None, typer.Option(help="Limit of the time to the first token.")]
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="Limit of the peak memory of a process that runs the prompt and the context, in 10^6 bytes."),
]

_DATABASE = "llm-nas.db"
_CACHE = Path(".llm-nas-cache")
#: bf16 has to be asked for: few runtimes and CPUs have it, and no search chooses it.
_PROFILED: tuple[Precision, ...] = ("fp32", "int8", "int4")


@app.command()
def devices(database: Database = _DATABASE, as_json: Json = False) -> None:
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
        list[str] | None, typer.Option("--runtime", help=f"Any of {_RUNTIMES} All that are installed by default.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(PRECISIONS)}; {', '.join(_PROFILED)} by default."),
    ] = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: Annotated[list[int], typer.Option(help="Prompt lengths; any in between can be asked for.")] = [  # noqa: B006
        16,
        128,
        512,
    ],
    context_tokens: Annotated[list[int], typer.Option(help="Context lengths, likewise.")] = [0, 128, 1024],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="Sequences run at once, likewise.")] = [1],  # noqa: B006
    anchors: Annotated[
        int, typer.Option(help="Most random graphs that the predictors are fitted on; fewer where more do not help.")
    ] = 12,
    heldout: Annotated[int, typer.Option(help="Random graphs that they are judged on.")] = 8,
    repeats: Annotated[int, typer.Option(help="Graphs of the latter timed twice, for the noise floor.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds that every graph is timed in.")] = 3,
    memory_graphs: Annotated[
        int, typer.Option(help="Graphs run in processes of their own for their memory, a quarter held out; 0 for none.")
    ] = 8,
    seed: int = 0,
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
    database: Database = _DATABASE,
    as_json: Json = False,
) -> None:
    """Time decoder graphs of MODEL's shapes on this machine. Run again after an interruption to go on."""
    if measured is not None:
        from nas.profiling import import_measured

        if pack is not None:
            raise ValueError("--pack writes a file and --import reads one, got both; give one of the two")
        with Store(database) as store:
            device, results = import_measured(store, measured, model)
        emit({"device": device.id, "targets": results}, as_json, tables.timed(results), f"{device.id}  {device.title}")
        return
    if model is None:
        raise ValueError("wanted a MODEL to profile, or --import with a file of measurements, got neither")
    runtimes = list(dict.fromkeys(runtime_name or (engine.name for engine in installed())))
    precisions = [_precision(value) for value in dict.fromkeys(precision or _PROFILED)]
    prefills = [Workload("prefill", tokens, batch) for batch in batch_size for tokens in prompt_tokens]
    decodes = [Workload("decode", tokens, batch) for batch in batch_size for tokens in context_tokens]
    workloads = list(dict.fromkeys(prefills + decodes))
    counts = {"anchors": anchors, "heldout": heldout, "repeats": repeats}
    from nas.profiling import pack_targets, profile_memories, profile_targets

    if pack is not None:
        with progress_bar("pack") as progress:
            plan = pack_targets(
                pack, model, runtimes, precisions, threads, workloads,
                counts=counts, rounds=rounds, seed=seed, with_table=transfer_from is None, progress=progress,
            )  # fmt: skip
        result = {"pack": str(pack), "size_bytes": pack.stat().st_size, "graphs": len(plan.graphs),
                  "targets": ["/".join(target) for target in plan.targets]}  # fmt: skip
        emit(result, as_json, f"{pack}: {result['size_bytes']:,} bytes; on the device, beside the folder hw_profiles:\n"
             f"python -m hw_profiles run {pack.name} --output measured.json")  # fmt: skip
        return
    engines = [runtime(name) for name in runtimes]
    with Store(database) as store:
        asked = (store, model, engines, precisions, threads or detect().cores, workloads)
        with progress_bar("profile") as progress:
            results = profile_targets(
                *asked, counts=counts, rounds=rounds, seed=seed, transfer_from=transfer_from, progress=progress
            )
        with progress_bar("memory") as progress:
            profiles = profile_memories(*asked, counts=counts, seed=seed, graphs=memory_graphs, progress=progress)
    memories = [tables.memory_fields(profile) for profile in profiles]
    shown = [tables.timed(results), *([tables.memory(memories)] if memories else [])]
    emit({"device": detect().id, "targets": results, "memory": memories}, as_json, *shown)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local folder, or GGUF file.")],
    study_name: StudyName,
    runtime_name: RuntimeName = "openvino",
    evaluations: Annotated[int, typer.Option(help="Subnets evaluated on text.")] = 100,
    objective: Annotated[list[str], typer.Option(help="kl, and tpot_ms or ttft_ms.")] = ["kl", "tpot_ms"],  # noqa: B006
    budget_ms: Annotated[float | None, typer.Option(help="Latency near which a good answer is wanted most.")] = None,
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
    text: Annotated[
        list[Path], typer.Option(help="Your own text in place of ours, .txt or .jsonl: calibrates and guides.")
    ] = [],  # noqa: B006
    reform: Annotated[bool, typer.Option(help="Least-squares weights; off to see what they are worth.")] = True,
    seed: int = 0,
    allow_stale: AllowStale = False,
    trust_remote_code: bool = False,
    database: Database = _DATABASE,
    cache: Cache = _CACHE,
    as_json: Json = False,
) -> None:
    """Search MODEL's subnets for quality and latency. Run again after an interruption to go on."""
    import time

    from nas.families import load_model
    from nas.latency import LatencyModel
    from nas.protocol import open_evaluator, open_supernet, protocol_on
    from nas.search import SearchSettings
    from nas.search import search as run_search
    from nas.space import SearchSpace
    from nas.study import Study

    workloads = {
        "tpot_ms": Workload("decode", context_tokens, batch_size),
        "ttft_ms": Workload("prefill", prompt_tokens, batch_size),
    }
    if len(objective) != 2 or objective[0] != "kl" or objective[1] not in workloads:
        raise ValueError(f"objectives must be kl and one of {', '.join(workloads)}, got {', '.join(objective)}")
    settings = SearchSettings(evaluations=evaluations, seed=seed, budget_ms=budget_ms, algorithm=algorithm)
    started = time.perf_counter()
    with Store(database) as store:
        device_id, threads = _device_and_threads(store, device, threads)
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        space = SearchSpace.from_config(loaded.config, homogeneous=homogeneous)
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
        if budget_ms is not None and budget_ms < (least_ms := members["smallest"]["low_ms"]):
            sentence = f"wanted {budget_ms:g} ms, but embedding and head alone take {least_ms:.3g} ms; allow more"
            raise typer.Exit(fail(sentence, EXIT_UNMET, {"space": members}))
        protocol = protocol_on(text, reform=reform)
        protocol.search(loaded.tokenizer)  # a text that is too short is refused before there is a study of it
        study = Study.create(store, study_name, model, loaded.fingerprint, space, protocol.to_dict(), text)
        note("calibrating and reforming")
        supernet = open_supernet(loaded, space, protocol, cache)
        with progress_bar("search") as progress:
            trials = run_search(space, open_evaluator(supernet, protocol), latency.value_ms, study, settings, progress)
        values_ms = latency.value_ms([trial.subnet for trial in trials])
    rows: list[dict[str, Any]] = [
        {
            "id": trial.subnet.id,
            "bits": trial.subnet.bits,
            "role": trial.role,
            "kl": trial.quality.kl,
            "perplexity": trial.quality.perplexity,
            objective[1]: float(ms),
        }
        for trial, ms in zip(trials, values_ms, strict=True)
    ]
    cost = {"evaluations": len(trials), "tokens": sum(t.quality.tokens for t in trials),
            "seconds": time.perf_counter() - started}  # fmt: skip
    emit({"study": study_name, "space": members, "trials": rows, **cost}, as_json, tables.trials(study_name, rows))


@app.command()
def query(
    study_name: StudyName,
    tpot_ms: TpotLimit = None,
    ttft_ms: TtftLimit = None,
    memory_mb: MemoryLimit = None,
    max_size_mb: Annotated[
        float | None, typer.Option(help="Limit of the weights' size on disk, in 10^6 bytes.")
    ] = None,
    max_parameters_ratio: Annotated[float | None, typer.Option(help="Limit relative to the full model.")] = None,
    runtime_name: RuntimeName = "openvino",
    device: DeviceId = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    batch_size: BatchSize = 1,
    measure: Annotated[int, typer.Option(help="Finalists timed on this machine before one is returned.")] = 0,
    allow_stale: AllowStale = False,
    database: Database = _DATABASE,
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
        device_id, threads = _device_and_threads(store, device, threads)
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


@app.command()
def tune(
    study_name: StudyName,
    subnet: Annotated[str, typer.Option(help="Id of a trial, or `full`.")],
    output: Annotated[Path, typer.Option(help="Folder for the tuned weights, which nas export takes with --tuned.")],
    method: Annotated[
        str,
        typer.Option(
            help="lora; nls: ranks drawn at each step, then searched; losa: pruned and tuned by turns; full: the "
            "projections themselves; prune: no training."
        ),
    ] = "lora",
    sparsity: Annotated[float, typer.Option(help="Share of the projections' weights set to 0, and kept there.")] = 0.0,
    pattern: Annotated[str, typer.Option(help="Where: unstructured, or N:M as in 2:4.")] = "unstructured",
    pruning: Annotated[str, typer.Option(help="By wanda or sparsegpt.")] = "wanda",
    separate: Annotated[
        bool, typer.Option(help="Leave the adapter beside the weights, a folder that stock PEFT loads.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="losa: turns.")] = 5,
    rank: Annotated[
        list[int] | None, typer.Option(help="Of the adapter, 32 by default; several for nls: 32, 24 and 16.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Of the adapter; twice the largest rank by default.")] = None,
    dropout: Annotated[float, typer.Option(help="Of the adapter's input.")] = 0.0,
    loss: Annotated[str, typer.Option(help="kl: to the full model; text: likelihood of the text itself.")] = "kl",
    sandwich: Annotated[
        bool, typer.Option(help="nls: largest, smallest and random ranks at each step, not a random choice alone.")
    ] = False,
    rank_evaluations: Annotated[int, typer.Option(help="nls: choices of ranks evaluated in the end.")] = 24,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 400,
    max_minutes: Annotated[float | None, typer.Option(help="Stop then, if that is sooner.")] = None,
    batch: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Such batches a step.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its largest; 0.001 for adapters and 0.0001 for full by default.")
    ] = None,
    text: Annotated[
        list[Path], typer.Option(help="Text to tune on, .txt or .jsonl; what calibrated the study by default.")
    ] = [],  # noqa: B006
    precision: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}; the subnet's own by default.")
    ] = None,
    fit: Annotated[bool, typer.Option(help="Begin with weights fitted in sequence, as nas export does.")] = True,
    seed: int = 0,
    model: ModelMoved = None,
    trust_remote_code: bool = False,
    database: Database = _DATABASE,
    cache: Cache = _CACHE,
    as_json: Json = False,
) -> None:
    """Win back quality: train a subnet against the full model. Run again after an interruption to go on."""
    from nas.protocol import fit_winner, open_evaluator, open_study
    from nas.queries import find_subnet
    from nas.recovery import TuneSettings, one_of_methods
    from nas.recovery import tune as run_tune
    from nas.study import Study
    from nas.text import all_windows
    from nas.training import TrainingSettings

    method = one_of_methods(method)
    ranks = tuple(rank or ((32, 24, 16) if method == "nls" else (32,)))
    settings = TuneSettings(
        method=method,
        ranks=ranks,
        alpha=alpha or 2.0 * max(ranks),
        dropout=dropout,
        rank_evaluations=rank_evaluations,
        sparsity=sparsity,
        pattern=pattern,
        pruning=pruning,  # type: ignore[arg-type]  # checked by it
        separate=separate,
        rounds=rounds,
        training=TrainingSettings(
            steps=steps,
            max_minutes=max_minutes,
            batch=batch,
            accumulation=accumulation,
            learning_rate=learning_rate or (1e-4 if method == "full" else 1e-3),
            loss=loss,  # type: ignore[arg-type]  # checked by it
            sampling="sandwich" if sandwich else "random" if method == "nls" else "largest",
            seed=seed,
        ),
    )
    with Store(database) as store:
        study = Study.load(store, study_name)
        chosen = find_subnet(study, subnet, None if precision is None else _precision(precision))
    supernet, protocol = open_study(study, model, cache, trust_remote_code=trust_remote_code)
    tokenizer = supernet.loaded.tokenizer
    windows = all_windows(tokenizer, text, tokens) if text else protocol.tuning(tokenizer, tokens)
    if fit and protocol.reform:
        with progress_bar("fit") as progress:
            fit_winner(supernet, chosen, protocol, cache, progress)
    with progress_bar("tune") as progress:
        tuned = run_tune(supernet, chosen, windows, open_evaluator(supernet, protocol), settings, output, progress)
    emit(tables.tuned_fields(tuned, output), as_json, tables.tuned(tuned, output))


@app.command()
def export(
    study_name: StudyName,
    subnet: Annotated[str, typer.Option(help="Id of a trial, or `full`.")],
    output: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    format_: Annotated[
        list[str], typer.Option("--format", help="Of several, each gets a folder of its name in --output.")
    ] = ["openvino"],  # noqa: B006
    precision: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}; the subnet's own by default.")
    ] = None,
    fit: Annotated[
        bool, typer.Option(help="Fit the subnet's weights in sequence, so that layers make up for those before them.")
    ] = True,
    tuned: Annotated[Path | None, typer.Option(help="Folder of nas tune: the weights that it gave the subnet.")] = None,
    model: ModelMoved = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    trust_remote_code: bool = False,
    database: Database = _DATABASE,
    cache: Cache = _CACHE,
    as_json: Json = False,
) -> None:
    """Write a subnet as a folder that stock runtimes load."""
    from export.artefact import FORMATS
    from nas.artefacts import export_subnet, text_quality
    from nas.protocol import fit_winner, open_study
    from nas.protocol import test_windows as unseen_windows
    from nas.queries import find_subnet, predictions_for
    from nas.recovery import adopt_tuned
    from nas.study import Study

    formats = [known for known in FORMATS if known in format_]
    if unknown := set(format_) - set(FORMATS):
        raise ValueError(f"--format must be among {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")
    here = detect()
    with Store(database) as store:
        study = Study.load(store, study_name)
        chosen = find_subnet(study, subnet, None if precision is None else _precision(precision))
        workloads = [Workload("prefill", prompt_tokens), Workload("decode", context_tokens)]
        predictions = {
            name: predictions_for(store, study.space, chosen, name, here.id, threads or here.cores, workloads)
            for name in formats
        }
    supernet, protocol = open_study(study, model, cache, trust_remote_code=trust_remote_code)
    tuning = None
    if tuned is not None:
        found = adopt_tuned(supernet, tuned)
        if found.subnet != chosen:
            raise ValueError(f"wanted subnet {chosen.id} at {chosen.precision} in {tuned}, got another; see nas tune")
        tuning = found.title
    elif fit and protocol.reform:
        with progress_bar("fit") as progress:
            fit_winner(supernet, chosen, protocol, cache, progress)
    windows = unseen_windows(supernet.loaded.tokenizer, 4, 512)
    quality = text_quality(supernet, chosen, windows)
    folders = {name: output if len(formats) == 1 else output / name for name in formats}
    for name, folder in folders.items():
        export_subnet(supernet, chosen, name, folder, windows, predictions[name], quality, tuning)
    result = {"subnet": chosen.id, "precision": chosen.precision, "folders": {n: str(f) for n, f in folders.items()}}
    emit(result, as_json, *(f"{folder}: {chosen.id} at {chosen.precision}" for folder in folders.values()))


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(help="Folders that nas export wrote.")],
    beside: Annotated[list[Path], typer.Option(help="Folders timed in the same run but not judged.")] = [],  # noqa: B006
    tpot_ms: TpotLimit = None,
    ttft_ms: TtftLimit = None,
    memory_mb: MemoryLimit = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt: Annotated[str, typer.Option(help="What 40 tokens are generated after.")] = "The capital of France is",
    rounds: Annotated[
        int, typer.Option(help="Rounds that every folder is timed in; up to three times as many for a close budget.")
    ] = 10,
    study_name: Annotated[
        str | None, typer.Option("--study", help="Hold limits against the milliseconds of this study's profile.")
    ] = None,
    database: Database = _DATABASE,
    as_json: Json = False,
) -> None:
    """Compare folders with the supernet they came from and time them. Exit code 1 where parity or a budget fails.

    With --study limits are held against what a folder takes beside the profile's own reference, times what that took
    in the profile: the machine may be faster or slower now, as the limits' milliseconds are those of the profile.
    """
    from export import read_manifest
    from export import verify as run_verify
    from nas.card import record_verification

    decode, prefill = Workload("decode", context_tokens), Workload("prefill", prompt_tokens)
    limits_ms = {work: ms for work, ms in ((prefill, ttft_ms), (decode, tpot_ms)) if ms is not None}
    threads = threads or detect().cores
    references = {}
    if study_name is not None:
        from nas.profiling import profiled_references
        from nas.study import Study

        wanted = {(manifest.format, manifest.precision) for manifest in map(read_manifest, [*directories, *beside])}
        with Store(database) as store:
            base = Study.load(store, study_name).space.base
            references = profiled_references(store, base, wanted, threads, list(limits_ms))
    checked = run_verify(
        [*directories, *beside],
        threads=threads,
        workloads=[prefill, decode],
        prompt=prompt,
        rounds=rounds,
        references=references,
        memory_of=directories if memory_mb is not None else (),
        limits_ms={(folder, work): limit_ms for folder in directories for work, limit_ms in limits_ms.items()},
    )
    max_memory_bytes = None if memory_mb is None else round(memory_mb * 1e6)
    rows = [
        tables.verification_fields(result, prefill, decode, limits_ms, max_memory_bytes)
        if result.directory in directories
        else tables.verification_fields(result, prefill, decode, {}, None)
        for result in checked
    ]
    generated = [f"{row['directory']}: {row['generated']!r}" for row in rows]
    emit({"folders": rows}, as_json, tables.verifications(rows), *generated)
    for row in rows:
        if Path(row["directory"]) in directories:
            try:
                record_verification(Path(row["directory"]), row, detect(), threads)
            except OSError as error:
                note(f"{row['directory']}: not written into its card ({os_error_sentence(error)})")
    if not all(row["parity_holds"] and row["within_budget"] for row in rows):
        raise typer.Exit(EXIT_UNMET)


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
    database: Database = _DATABASE,
    as_json: Json = False,
) -> None:
    """Plots of a study and of the profile behind it, as one HTML file."""
    from nas.queries import report_data
    from nas.report import write_report
    from nas.study import Study

    with Store(database) as store:
        study = Study.load(store, study_name)
        device_id, threads = _device_and_threads(store, device, threads)
        data = report_data(store, study, tpot_ms, device_id, runtime_name, threads, context_tokens)
    write_report(data, output)
    emit({"report": str(output)}, as_json, f"{output}: {len(data.trials)} trials")


def _device_and_threads(store: Store, device_id: str | None, threads: int | None) -> tuple[str, int]:
    """This device and all cores of the device by default; ValueError for one that the store does not know."""
    here = detect()
    known = {device.id: device for device in [*store.devices(), here]}
    device = known.get(device_id or here.id)
    if device is None:
        raise ValueError(f"no device {device_id!r} in {store.where} (there: {', '.join(known)}); see nas devices")
    return device.id, threads or device.cores


def _precision(value: str) -> Precision:
    for precision in PRECISIONS:
        if value == precision:
            return precision
    raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {value!r}")


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
    except (ValueError, ImportError, RuntimeError) as error:  # the last is what runtimes raise for files they refuse
        code = fail(str(error), EXIT_BAD_INPUT)
    except SafetensorError as error:
        code = fail(safetensors_error_sentence(error), EXIT_BAD_INPUT)
    except OSError as error:
        code = fail(os_error_sentence(error), EXIT_BAD_INPUT)
    sys.exit(code)
