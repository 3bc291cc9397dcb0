"""The commands about one subnet as it is: judged, written and proven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hw_profiles import Store, Workload, detect
from nas import tables
from nas.options import (
    CACHE,
    DATABASE,
    Cache,
    ContextTokens,
    Cpus,
    Database,
    Fit,
    Json,
    MemoryLimit,
    ModelMoved,
    PrecisionName,
    PromptTokens,
    StudyName,
    SubnetName,
    SupernetFolder,
    Threads,
    TpotLimit,
    TtftLimit,
    TunedFolder,
    count,
    one_of_precisions,
)
from nas.terminal import EXIT_UNMET, emit, note, os_error_sentence, progress_bar

if TYPE_CHECKING:  # they bring torch
    from nas.protocol import EvaluationProtocol
    from nas.study import Study
    from nas.subnet import Subnet
    from nas.supernet import Supernet


def evaluate(
    study_name: StudyName,
    subnet: SubnetName,
    task: Annotated[
        list[str],
        typer.Option(help="Name of an lm-eval task, or a .jsonl file of context, choices and label; several if given."),
    ] = [],  # noqa: B006
    limit: Annotated[int | None, count("Items of each task; all by default.")] = None,
    precision: PrecisionName = None,
    fit: Fit = True,
    tuned: TunedFolder = None,
    supernet_folder: SupernetFolder = None,
    model: ModelMoved = None,
    trust_remote_code: bool = False,
    database: Database = DATABASE,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Judge a subnet beside the full model: on text that nothing was chosen by, and on tasks (extra `tasks`)."""
    from nas.artefacts import text_quality
    from nas.protocol import test_windows as unseen_windows
    from nas.queries import find_subnet
    from nas.study import Study

    with Store(database) as store:
        study = Study.load(store, study_name)
        chosen = find_subnet(study, subnet, None if precision is None else one_of_precisions(precision))
    supernet, _, _ = open_subnet(study, chosen, model, cache, tuned, supernet_folder, fit, trust_remote_code)
    quality = text_quality(supernet, chosen, unseen_windows(supernet.loaded.tokenizer, 4, 512))
    scores = {}
    if task:
        from nas.tasks import evaluate_tasks

        supernet.activate(chosen)
        with progress_bar(chosen.id) as progress:
            scores[chosen.id] = evaluate_tasks(supernet.loaded, task, limit=limit, progress=progress)
        supernet.activate_full_model()
        with progress_bar("full model") as progress:
            scores["full"] = evaluate_tasks(supernet.loaded, task, limit=limit, progress=progress)
    fields = tables.judged_fields(chosen, quality, scores.get(chosen.id, {}), scores.get("full", {}))
    emit(fields, as_json, tables.judged(fields))


def export(
    study_name: StudyName,
    subnet: SubnetName,
    output: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    format_: Annotated[
        list[str],
        typer.Option("--format", help="openvino, onnx, gguf or huggingface; of several, each in a folder of --output."),
    ] = ["openvino"],  # noqa: B006
    precision: PrecisionName = None,
    fit: Fit = True,
    tuned: TunedFolder = None,
    supernet_folder: SupernetFolder = None,
    model: ModelMoved = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    trust_remote_code: bool = False,
    database: Database = DATABASE,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Write a subnet as a folder that stock runtimes load."""
    from export.artefact import FORMATS, check_replaceable
    from export.onnx import check_precision
    from export.openvino import check_heads
    from nas.artefacts import export_subnet, text_quality
    from nas.protocol import test_windows as unseen_windows
    from nas.queries import find_subnet, predictions_for
    from nas.study import Study

    formats = [known for known in FORMATS if known in format_]
    if unknown := set(format_) - set(FORMATS):
        raise ValueError(f"--format must be among {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")
    here = detect()
    with Store(database) as store:
        study = Study.load(store, study_name)
        chosen = find_subnet(study, subnet, None if precision is None else one_of_precisions(precision))
        workloads = [Workload("prefill", prompt_tokens), Workload("decode", context_tokens)]
        predictions = {
            name: predictions_for(store, study.space, chosen, name, here.id, threads or here.cores, workloads)
            for name in formats
        }
    folders = {name: output if len(formats) == 1 else output / name for name in formats}
    for folder in folders.values():  # before the work
        check_replaceable(folder)
    if "onnx" in formats:
        check_precision(chosen.precision)
    if "openvino" in formats:
        check_heads(study.space.model_shape(chosen).blocks)
    supernet, _, tuning = open_subnet(study, chosen, model, cache, tuned, supernet_folder, fit, trust_remote_code)
    windows = unseen_windows(supernet.loaded.tokenizer, 4, 512)
    quality = text_quality(supernet, chosen, windows)
    for name, folder in folders.items():
        export_subnet(supernet, chosen, name, folder, windows, predictions[name], quality, tuning)
    result = {"subnet": chosen.id, "precision": chosen.precision, "folders": {n: str(f) for n, f in folders.items()}}
    emit(result, as_json, *(f"{folder}: {chosen.id} at {chosen.description}" for folder in folders.values()))


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
        int, count("Rounds that every folder is timed in; up to three times as many for a close budget.")
    ] = 10,
    study_name: Annotated[
        str | None, typer.Option("--study", help="Hold limits against the milliseconds of this study's profile.")
    ] = None,
    database: Database = DATABASE,
    as_json: Json = False,
) -> None:
    """Compare folders with the supernet they came from and time them. Exit code 1 where parity or a budget fails.

    With --study limits are held against what a folder takes beside the profile's own references, at the speed they had
    in the profile: the machine may be faster or slower now, as the limits' milliseconds are those of the profile.
    """
    from export import read_manifest
    from export import verify as run_verify
    from nas.card import record_verification

    if not prompt.strip():
        raise ValueError("wanted a --prompt to generate after, got none; give a few words")
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
    with progress_bar("verify") as progress:
        checked = run_verify(
            [*directories, *beside],
            threads=threads,
            workloads=[prefill, decode],
            prompt=prompt,
            rounds=rounds,
            references=references,
            memory_of=directories if memory_mb is not None else (),
            limits_ms={(folder, work): limit_ms for folder in directories for work, limit_ms in limits_ms.items()},
            progress=progress,
        )
    max_memory_bytes = None if memory_mb is None else round(memory_mb * 1e6)
    rows = [
        tables.verification_fields(result, prefill, decode, limits_ms, max_memory_bytes)
        if result.directory in directories
        else tables.verification_fields(result, prefill, decode, {}, None)
        for result in checked
    ]
    for row in rows:  # before it is said: whoever reads may have gone
        if Path(row["directory"]) in directories:
            try:
                record_verification(Path(row["directory"]), row, detect(), threads)
            except OSError as error:
                note(f"{row['directory']}: not written into its card ({os_error_sentence(error)})")
    generated = [f"{row['directory']}: {row['generated']!r}" for row in rows]
    emit({"folders": rows}, as_json, tables.verifications(rows), *generated)
    if not all(row["parity_holds"] and row["within_budget"] for row in rows):
        raise typer.Exit(EXIT_UNMET)


def open_subnet(
    study: Study,
    chosen: Subnet,
    model: str | None,
    cache: Path,
    tuned: Path | None,
    supernet_folder: Path | None,
    fit: bool,
    trust_remote_code: bool,
) -> tuple[Supernet, EvaluationProtocol, str | None]:
    """The study's supernet, in which `chosen` has its weights from `tuned` or fitted in sequence; how it was tuned."""
    from nas.protocol import fit_winner, open_study

    with progress_bar("prepare") as progress:
        supernet, protocol = open_study(
            study, model, cache, tuned=supernet_folder, trust_remote_code=trust_remote_code, progress=progress
        )
    if tuned is not None:
        from nas.tuned import adopt_tuned

        found = adopt_tuned(supernet, tuned)
        if found.subnet != chosen:
            raise ValueError(f"wanted subnet {chosen.id} at {chosen.precision} in {tuned}, got another; see nas tune")
        return supernet, protocol, found.title
    if fit and protocol.reform:
        with progress_bar("fit") as progress:
            fit_winner(supernet, chosen, protocol, cache, progress)
    return supernet, protocol, None
