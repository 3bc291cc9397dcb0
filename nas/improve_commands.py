"""The commands that make something better of a subnet: sizes exchanged, weights trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hw_profiles import Store
from nas import tables
from nas.options import (
    CACHE,
    DATABASE,
    AllowStale,
    BatchSize,
    Cache,
    ContextTokens,
    Cpus,
    Database,
    DeviceId,
    Json,
    ModelMoved,
    PrecisionName,
    PromptTokens,
    RuntimeName,
    Seed,
    StudyName,
    SupernetFolder,
    Threads,
    count,
    device_and_threads,
    objectives,
    one_of_precisions,
    positive,
)
from nas.subnet_commands import open_subnet
from nas.terminal import emit, progress_bar

if TYPE_CHECKING:  # they bring torch
    from nas.quality import Quality
    from nas.subnet import Subnet

#: In place of a subnet's id, to `nas tune`.
ALL_SUBNETS = "all"


def refine(
    study_name: StudyName,
    subnet: Annotated[str, typer.Option(help="Id of a trial: the answer of nas query.")],
    rounds: Annotated[int, count("Exchanges, each fitted; less where one finds nothing better.")] = 1,
    objective: Annotated[str, typer.Option(help="tpot_ms or ttft_ms: what must not grow.")] = "tpot_ms",
    runtime_name: RuntimeName = "openvino",
    device: DeviceId = None,
    threads: Threads = None,
    cpus: Cpus = None,
    prompt_tokens: PromptTokens = 128,
    context_tokens: ContextTokens = 128,
    batch_size: BatchSize = 1,
    supernet_folder: SupernetFolder = None,
    allow_stale: AllowStale = False,
    model: ModelMoved = None,
    trust_remote_code: bool = False,
    database: Database = DATABASE,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Better sizes for a subnet at the same predicted latency, told by its fitted weights. Prints the new subnet's id.

    Run again after an interruption to go on.
    """
    from nas.latency import LatencyModel
    from nas.protocol import fit_winner, open_evaluator, open_study
    from nas.queries import find_subnet
    from nas.refinement import check_refinable
    from nas.refinement import refine as run_refine
    from nas.study import Study, Trial

    workloads = objectives(prompt_tokens, context_tokens, batch_size)
    if objective not in workloads:
        raise ValueError(f"--objective must be one of {', '.join(workloads)}, got {objective}")
    with Store(database) as store:
        study = Study.load(store, study_name)
        check_refinable(study)
        chosen = find_subnet(study, subnet, None)
        device_id, threads = device_and_threads(store, device, threads)
        latency = LatencyModel.fit(
            store, device_id, runtime_name, threads, study.space, workloads[objective], allow_stale=allow_stale
        )
        with progress_bar("prepare") as progress:
            supernet, protocol = open_study(
                study, model, cache, tuned=supernet_folder, trust_remote_code=trust_remote_code, progress=progress
            )
        evaluator = open_evaluator(supernet, protocol)
        shared: dict[Subnet, Quality] = {}
        with progress_bar("refine") as progress:

            def fit(other: Subnet) -> None:
                shared[other] = evaluator.evaluate(other)  # not yet fitted: as the search sees its trials
                fit_winner(supernet, other, protocol, cache, progress)

            found = run_refine(
                evaluator,
                chosen,
                latency.value_ms,
                fit,
                rounds=rounds,
                stored=study.scores(),
                store=study.add_score,
                progress=progress,
            )
        if found.subnet != chosen:
            study.add(Trial(found.subnet, shared[found.subnet], "refined"))
        fields = tables.refined_fields(chosen, found, *latency.value_ms([chosen, found.subnet]))
    emit(fields, as_json, tables.refined(fields))


def tune(
    study_name: StudyName,
    subnet: Annotated[str, typer.Option(help="Id of a trial, `full`, or `all`: what all subnets of the study share.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the tuned weights: nas export takes it with --tuned, of `all` --supernet.")
    ],
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
    rounds: Annotated[int, count("losa: turns.")] = 5,
    rank: Annotated[
        list[int] | None, count("Of the adapter, 32 by default; of nls 32, 24 and 16; losa finds its own.")
    ] = None,
    alpha: Annotated[float | None, positive("Of the adapter; twice the largest rank by default.")] = None,
    dropout: Annotated[float, typer.Option(help="Of the adapter's input.")] = 0.0,
    loss: Annotated[
        str, typer.Option(help="kl: to the full model; text: likelihood of the text itself; both: their mean.")
    ] = "kl",
    block_weight: Annotated[
        float,
        typer.Option(help="Of the distance from the full model behind each layer, in the loss beside kl or both."),
    ] = 0.0,
    sandwich: Annotated[
        bool, typer.Option(help="nls: largest, smallest and random ranks at each step, not a random choice alone.")
    ] = False,
    rank_search: Annotated[
        str,
        typer.Option(help="nls: hill-climb, or evolution, for ranks of no more parameters than the middle one has."),
    ] = "hill-climb",
    rank_evaluations: Annotated[int, count("nls: choices of ranks evaluated in the end.")] = 24,
    steps: Annotated[int, count("Steps of the optimiser.")] = 400,
    max_minutes: Annotated[float | None, positive("Stop then, if that is sooner.")] = None,
    batch: Annotated[int, count("Windows at once.")] = 8,
    accumulation: Annotated[int, count("Such batches a step.")] = 1,
    tokens: Annotated[int, count("Tokens of a window.", least=2)] = 256,
    learning_rate: Annotated[
        float | None, positive("Its largest; 0.001 for adapters and 0.0001 for full by default.")
    ] = None,
    text: Annotated[
        list[Path],
        typer.Option(help="Text to tune on, as of nas search; ours, or what calibrated the study, by default."),
    ] = [],  # noqa: B006
    precision: PrecisionName = None,
    fit: Annotated[bool, typer.Option(help="Begin with weights fitted in sequence, as nas export does.")] = True,
    supernet_folder: SupernetFolder = None,
    seed: Seed = 0,
    model: ModelMoved = None,
    trust_remote_code: bool = False,
    database: Database = DATABASE,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Win back quality: train a subnet against the full model. Run again after an interruption to go on."""
    from nas.protocol import open_evaluator
    from nas.queries import find_subnet
    from nas.recovery import tune as run_tune
    from nas.study import Study
    from nas.text import all_windows
    from nas.text_sets import as_files
    from nas.training import TrainingSettings
    from nas.tuned import TuneSettings, one_of_methods

    method = one_of_methods(method)
    ranks = tuple(rank or {"nls": (32, 24, 16), "losa": (16,)}.get(method, (32,)))
    settings = TuneSettings(
        method=method,
        ranks=ranks,
        alpha=2.0 * max(ranks) if alpha is None else alpha,
        dropout=dropout,
        rank_search=rank_search,  # type: ignore[arg-type]  # checked by it
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
            learning_rate=(1e-4 if method == "full" else 1e-3) if learning_rate is None else learning_rate,
            loss=loss,  # type: ignore[arg-type]  # checked by it
            block_weight=block_weight,
            sampling="sandwich" if sandwich else "random" if method == "nls" else "active",
            seed=seed,
        ),
    )
    with Store(database) as store:
        study = Study.load(store, study_name)
        together = subnet == ALL_SUBNETS
        asked = None if precision is None else one_of_precisions(precision)
        chosen = find_subnet(study, "full" if together else subnet, asked)
        subnets = [trial.subnet for trial in study.trials()] if together else []
    supernet, protocol, _ = open_subnet(
        study, chosen, model, cache, None, supernet_folder, fit and not together, trust_remote_code
    )
    tokenizer = supernet.loaded.tokenizer
    windows = all_windows(tokenizer, as_files(text, cache), tokens) if text else protocol.tuning(tokenizer, tokens)
    if together:
        from nas.supernet_tuning import tune_supernet

        with progress_bar("tune") as progress:
            evaluator = open_evaluator(supernet, protocol)
            shifted = tune_supernet(supernet, subnets, windows, evaluator, settings, output, progress)
        emit(tables.tuned_supernet_fields(shifted, output), as_json, tables.tuned_supernet(shifted, output))
        return
    with progress_bar("tune") as progress:
        tuned = run_tune(supernet, chosen, windows, open_evaluator(supernet, protocol), settings, output, progress)
    emit(tables.tuned_fields(tuned, output), as_json, tables.tuned(tuned, output))
