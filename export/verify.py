"""Prove an exported folder: its logits against the active supernet's, its own generator, its size, its latency.

Nothing here needs the study or the original model: the folder carries the text and the logits to compare with.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from export.artefact import ArtefactError, Format, Manifest, Parity, model_bytes, read_manifest
from export.builders import BUILDERS, RUNTIME_OF_FORMAT
from export.generation import MAX_TOKENS, generate, not_working, open_session
from hw_profiles.measurement import median_error
from hw_profiles.memory import Footprint, measure_memory
from hw_profiles.profile import Progress
from hw_profiles.references import at_profile_speed
from hw_profiles.runtimes import Runtime, Session, runtime
from hw_profiles.shapes import ModelShape, Precision, Workload
from hw_profiles.timing import Timing, measure, pooled, tokens_needed

#: Largest difference of logits allowed at fp32, and largest mean KL in nats with quantised weights.
MAX_LOGIT_DIFFERENCE = 1e-3
MAX_MEAN_KL = 1e-3
#: Timings of as many rounds each, at most, before noise decides on a limit.
MOST_TIMINGS = 3


@dataclass(frozen=True)
class LogitAgreement:
    """Over `positions` tokens of real text: the largest difference of any logit, and the mean KL in nats."""

    max_logit_difference: float
    mean_kl: float
    positions: int


@dataclass(frozen=True)
class ProfiledReferences:
    """The graphs that those of a profile of this device were timed beside, and by workload and id what they took."""

    shapes: tuple[ModelShape, ...]
    latencies_ms: Mapping[Workload, Mapping[str, float]]


@dataclass(frozen=True)
class Verification:
    """`exact` is the agreement when the runtime computes in fp32, where with the shipped file it does not.

    `timings` are beside `references`, by their ids, where there were any, else beside the first folder.
    """

    directory: Path
    manifest: Manifest
    size_bytes: int
    shipped: LogitAgreement
    exact: LogitAgreement
    timings: dict[Workload, Timing]
    generated: str
    references: ProfiledReferences | None = None
    #: Of a process that did nothing but load the folder and run the workload; empty where it was not measured.
    footprints: Mapping[Workload, Footprint] = field(default_factory=dict)

    def judged_ms(self, workload: Workload) -> tuple[float, float]:
        """What a limit is held against, and its standard error: at the profile's speed where that is known."""
        timing, at_profile_speed_ms = self.timings[workload], self.at_profile_speed_ms(workload)
        if at_profile_speed_ms is None:
            return timing.median_ms, median_error(timing.spread_ms, timing.repeats)
        error = median_error(timing.spread_ratio, timing.repeats) / timing.ratio
        return at_profile_speed_ms, at_profile_speed_ms * error

    def at_profile_speed_ms(self, workload: Workload) -> float | None:
        """What the folder takes on a machine that is as fast as when it was profiled; None where no profile knows.

        Between a profile and now a shared machine may have become half as fast, and the references with it.
        """
        if self.references is None or workload not in self.references.latencies_ms:
            return None
        timing = self.timings[workload]
        return at_profile_speed(timing.ratio, timing.references_ms, self.references.latencies_ms[workload])

    @property
    def peak_memory_bytes(self) -> int | None:
        """Of a process that runs all of the workloads; None where it was not measured."""
        return max((footprint.peak_bytes for footprint in self.footprints.values()), default=None)

    @property
    def parity_holds(self) -> bool:
        """The file holds the numbers that the supernet evaluated."""
        # llama.cpp looks GELU up in a table of half precision, whatever the weights
        looked_up = self.manifest.format == "gguf" and self.manifest.shape.hidden_act.startswith("gelu")
        if self.manifest.precision == "fp32" and not looked_up:
            return self.exact.max_logit_difference <= MAX_LOGIT_DIFFERENCE
        return self.exact.mean_kl <= MAX_MEAN_KL


def verify(
    directories: Sequence[Path],
    *,
    threads: int,
    workloads: Sequence[Workload],
    prompt: str = "The capital of France is",
    new_tokens: int = 40,
    rounds: int = 10,
    seed: int = 0,
    references: Mapping[tuple[Format, Precision], ProfiledReferences] = MappingProxyType({}),
    memory_of: Collection[Path] = (),
    limits_ms: Mapping[tuple[Path, Workload], float] = MappingProxyType({}),
    progress: Progress = lambda done, total, what: None,
) -> list[Verification]:
    """Check each folder, then time them all interleaved, so that their latencies compare.

    Where one of `limits_ms` lies within two standard errors of a folder's latency they are timed again, as many rounds,
    up to MOST_TIMINGS times in all, loaded anew each time: what pages the weights land on is part of the noise.
    Folders of the format and precision of one of `references` are timed beside its graphs, written for the occasion;
    those in `memory_of` run in processes of their own as well, for their peak memory.
    Raises ArtefactError for a folder that is damaged or that its runtime cannot load, and ValueError for one in
    `memory_of` that torch runs, whose own memory would hide that of the model.
    """
    manifests = [read_manifest(directory) for directory in directories]
    max_tokens = max(MAX_TOKENS, tokens_needed(workloads))

    def load() -> dict[str, Session]:
        return {
            str(directory): open_session(directory, manifest.format, threads, max_tokens)
            for directory, manifest in zip(directories, manifests, strict=True)
        }

    sessions, stages = load(), len(directories) + MOST_TIMINGS
    checked: list[tuple[LogitAgreement, LogitAgreement, str]] = []
    for directory, manifest in zip(directories, manifests, strict=True):
        progress(len(checked), stages, f"parity of {directory.name}")
        parity = Parity.load(directory)
        if parity.logits.shape[-1] != manifest.shape.vocab_size:
            raise ArtefactError(
                f"{directory} has parity data for {parity.logits.shape[-1]:,} tokens of vocabulary where the model has "
                f"{manifest.shape.vocab_size:,}; export again"
            )
        shipped = logit_agreement(sessions[str(directory)], parity)
        exact = shipped
        if manifest.format == "onnx" and manifest.precision != "fp32":
            exact = _agreement_with_fp32_activations(directory, threads, parity)
        elif manifest.format == "openvino" and manifest.precision == "bf16":
            exact = _agreement_in_fp32(directory, threads, parity)
        elif manifest.format == "gguf":
            exact = _agreement_of_fp32_copy(directory, threads, parity)
        generated = generate(directory, manifest.format, threads, prompt, new_tokens)
        checked.append((shipped, exact, generated))
    footprints = {
        directory: _footprints(directory, manifest, threads, workloads) if directory in memory_of else {}
        for directory, manifest in zip(directories, manifests, strict=True)
    }
    beside = [references.get((manifest.format, manifest.precision)) for manifest in manifests]
    names = [str(directory) for directory in directories]
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        written, references_of = _write_references(names, manifests, beside, Path(scratch))
        batches: list[dict[tuple[str, Workload], Timing]] = []
        while True:
            progress(len(directories) + len(batches), stages, "timing")
            if batches:
                sessions.clear()  # before there are two of each
                sessions |= load()
            sessions |= {name: graph.engine.load(graph.path, threads, max_tokens) for name, graph in written.items()}
            timings = measure(
                sessions,
                references_of,
                workloads,
                vocab_size=min(manifest.shape.vocab_size for manifest in manifests),
                rounds=rounds,
                seed=seed + len(batches),
            )
            batches.append({key: _by_shape(timing, written) for key, timing in timings.items()})
            results = [
                Verification(
                    directory=directory,
                    manifest=manifest,
                    size_bytes=model_bytes(manifest),
                    shipped=shipped,
                    exact=exact,
                    timings={work: pooled([batch[str(directory), work] for batch in batches]) for work in workloads},
                    generated=generated,
                    references=profiled,
                    footprints=footprints[directory],
                )
                for directory, manifest, profiled, (shipped, exact, generated) in zip(
                    directories, manifests, beside, checked, strict=True
                )
            ]
            if len(batches) == MOST_TIMINGS or not any(_is_close(result, limits_ms) for result in results):
                return results


def _is_close(result: Verification, limits_ms: Mapping[tuple[Path, Workload], float]) -> bool:
    """Whether noise could decide on one of its limits."""
    for (directory, workload), limit_ms in limits_ms.items():
        if directory == result.directory:
            latency_ms, error_ms = result.judged_ms(workload)
            if abs(latency_ms - limit_ms) < 2 * error_ms:
                return True
    return False


def _footprints(
    directory: Path, manifest: Manifest, threads: int, workloads: Sequence[Workload]
) -> dict[Workload, Footprint]:
    if manifest.format not in RUNTIME_OF_FORMAT:
        raise ValueError(
            f"memory is measured of {' and '.join(RUNTIME_OF_FORMAT)} folders, got {directory}, which is "
            f"{manifest.format}; verify it without a limit of memory"
        )
    name, vocab_size = RUNTIME_OF_FORMAT[manifest.format], manifest.shape.vocab_size
    return {work: measure_memory(name, directory, threads, work, vocab_size) for work in workloads}


@dataclass(frozen=True)
class _Written:
    """A graph of a profile, to be loaded beside the folders."""

    shape_id: str
    engine: Runtime
    path: Path


def _write_references(
    names: Sequence[str],
    manifests: Sequence[Manifest],
    references: Sequence[ProfiledReferences | None],
    scratch: Path,
) -> tuple[dict[str, _Written], dict[str, tuple[str, ...]]]:
    """Graphs to load beside the sessions `names`, and for each of both those to time it beside: the first, if any."""
    written: dict[str, _Written] = {}
    references_of: dict[str, tuple[str, ...]] = dict.fromkeys(names, (names[0],))
    for name, manifest, profiled in zip(names, manifests, references, strict=True):
        if profiled is None:
            continue
        engine, kind = runtime(RUNTIME_OF_FORMAT[manifest.format]), f"{manifest.format}-{manifest.precision}"
        keys = {f"{kind}/{shape.id}": shape for shape in profiled.shapes}
        for key, shape in keys.items():
            if key not in written:
                (scratch / key).mkdir(parents=True)
                path = BUILDERS[engine.name](shape, manifest.precision, scratch / key)
                written[key] = _Written(shape.id, engine, path)
            references_of[key] = tuple(keys)
        references_of[name] = tuple(keys)
    return written, references_of


def _by_shape(timing: Timing, written: Mapping[str, _Written]) -> Timing:
    """With the latencies of references by their shape's id, where they were written."""
    by_shape = {written[k].shape_id if k in written else k: ms for k, ms in timing.references_ms.items()}
    return replace(timing, references_ms=by_shape)


def logit_agreement(session: Session, parity: Parity, token_by_token: bool = True) -> LogitAgreement:
    """Feed each window's prompt at once and the rest token by token, and compare the logits on the way.

    Otherwise the rest goes from one position compared to the next, for kernels that are slow whatever they are fed.
    """
    wanted = {int(position): k for k, position in enumerate(parity.positions)}
    after_prompt = int(parity.positions[-1]) + 1 - parity.prompt_tokens
    steps = [1] * after_prompt if token_by_token else parity.positions.diff().tolist()
    differences, kls = [], []
    for window, reference in zip(parity.token_ids.numpy(), parity.logits, strict=True):
        session.reset()
        fed = 0
        for count in [parity.prompt_tokens, *steps]:
            logits = torch.from_numpy(session.step(window[None, fed : fed + count])[0]).float()
            fed += count
            if fed - 1 in wanted:
                expected = reference[wanted[fed - 1]]
                differences.append((logits - expected).abs().max().item())
                log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
                kls.append(float((log_p.exp() * (log_p - log_q)).sum()))
    # unlike max(), numpy's maximum keeps what is not a number, which then holds no parity
    return LogitAgreement(float(np.max(differences)), float(np.maximum(np.mean(kls), 0.0)), len(kls))


def _agreement_with_fp32_activations(directory: Path, threads: int, parity: Parity) -> LogitAgreement:
    """Agreement of the same ONNX weights when MatMulNBits leaves the activations alone."""
    import onnx

    from export.onnx import DATA_FILE, MODEL_FILE

    model = onnx.load(directory / MODEL_FILE, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        onnx.save(model, Path(scratch, MODEL_FILE))
        shutil.copy(directory / DATA_FILE, scratch)
        session = runtime("onnxruntime").load(Path(scratch), threads, MAX_TOKENS)
        return logit_agreement(session, parity, token_by_token=False)


def _agreement_in_fp32(directory: Path, threads: int, parity: Parity) -> LogitAgreement:
    """Agreement of the same OpenVINO weights when nothing is computed in bf16."""
    import openvino as ov

    from hw_profiles.runtimes.openvino import MODEL_FILE, OpenVinoSession, compile_properties

    compiled = ov.Core().compile_model(directory / MODEL_FILE, "CPU", compile_properties(threads))
    return logit_agreement(OpenVinoSession(compiled, MAX_TOKENS), parity)


def _agreement_of_fp32_copy(directory: Path, threads: int, parity: Parity) -> LogitAgreement:
    """Agreement of the same GGUF weights when llama.cpp rounds neither activations nor its cache."""
    from export.gguf import MODEL_FILE, write_fp32_copy
    from hw_profiles.runtimes.llamacpp import LlamaCppRuntime

    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        try:
            copy = write_fp32_copy(directory / MODEL_FILE, Path(scratch, MODEL_FILE))
        except (ValueError, LookupError, ArithmeticError, NotImplementedError) as error:  # what gguf raises
            raise not_working(directory, "read back", error) from error
        session = LlamaCppRuntime().load_exact(copy, threads, MAX_TOKENS)
        return logit_agreement(session, parity, token_by_token=False)
