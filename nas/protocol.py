"""How quality is measured: which text calibrates, which guides the search, which is only reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hw_profiles.profile import Progress
from nas.arithmetic import fast_dtype_name
from nas.evaluate import Evaluator
from nas.families import LoadedModel, load_model
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.study import Study, StudyError
from nas.subnet import Subnet
from nas.supernet import Supernet
from nas.text import (
    CALIBRATION_FILES,
    SEARCH_FILES,
    TEST_FILES,
    TUNING_FILES,
    all_windows,
    file_windows,
    shares,
    text_digest,
)


@dataclass(frozen=True)
class EvaluationProtocol:
    """Windows of tokens: `calibration` for orders and weights, `search` for the KL of trials.

    Scores of single parts, of which there are many and which only rank, take the first `score_windows` of `search`.
    Both look at every `search_stride`-th position.
    A study holds trials of one protocol only, so all that changes a trial's figures is in `to_dict`. Where the two are
    the same files, as with a user's own text, the search takes what follows the calibration.
    """

    calibration_windows: int = 128
    calibration_tokens: int = 256
    search_windows: int = 8
    search_tokens: int = 256
    search_stride: int = 2
    score_windows: int = 2
    reform: bool = True
    calibration_files: Sequence[Path] = CALIBRATION_FILES
    search_files: Sequence[Path] = SEARCH_FILES
    #: Digest of what all subnets were tuned by, see `nas.supernet_tuning`; empty where they were not.
    tuned: str = ""
    #: What trials are judged by in place of KL: names of lm-eval's tasks, or files of items; and items of each.
    tasks: Sequence[str] = ()
    task_items: int = 0

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        for name in ("calibration_files", "search_files"):
            fields[name] = [text_digest(Path(file)) for file in fields[name]]
        fields["tasks"] = [text_digest(Path(task)) if task.endswith(".jsonl") else task for task in self.tasks]
        # studies from before there were any have none
        if not self.tuned:
            del fields["tuned"]
        if not self.tasks:
            del fields["tasks"], fields["task_items"]
        return {**fields, "dtype": fast_dtype_name()}

    def calibration(self, tokenizer: Any) -> torch.Tensor:
        return file_windows(tokenizer, self.calibration_files, self.calibration_windows, self.calibration_tokens)

    def tuning(self, tokenizer: Any, tokens: int) -> torch.Tensor:
        """Windows [N, `tokens`] that the search does not see: all of ours, or those of a user's text that calibrate."""
        if tuple(self.search_files) == tuple(self.calibration_files):
            # of each file as much as calibrates: what follows is the search's
            of_files = shares(self.calibration_windows, len(self.calibration_files))
            counts = [windows * self.calibration_tokens // tokens for windows in of_files]
            parts = [
                file_windows(tokenizer, [file], count, tokens)
                for file, count in zip(self.calibration_files, counts, strict=True)
                if count
            ]
            if not parts:
                most = max(of_files) * self.calibration_tokens
                raise ValueError(f"wanted windows of at most {most} tokens of the study's text, got {tokens}; ask less")
            return torch.cat(parts)
        return all_windows(tokenizer, TUNING_FILES, tokens)

    def search(self, tokenizer: Any) -> torch.Tensor:
        shared = tuple(self.search_files) == tuple(self.calibration_files)
        after = (self.calibration_windows, self.calibration_tokens) if shared else (0, 0)
        return file_windows(tokenizer, self.search_files, self.search_windows, self.search_tokens, after=after)


def protocol_on(
    text: Sequence[Path], *, reform: bool = True, tuned: str = "", tasks: Sequence[str] = (), task_items: int = 0
) -> EvaluationProtocol:
    """The protocol on a user's own files, or on those of `data/` where there are none."""
    protocol = EvaluationProtocol(reform=reform, tuned=tuned, tasks=tasks, task_items=task_items)
    if not text:
        return protocol
    files = tuple(file.resolve() for file in text)
    return replace(protocol, calibration_files=files, search_files=files)


def test_windows(tokenizer: Any, windows: int, tokens: int) -> torch.Tensor:
    """Text that neither calibration nor search sees, [windows, tokens]."""
    return file_windows(tokenizer, TEST_FILES, windows, tokens)


def open_supernet(
    loaded: LoadedModel,
    space: SearchSpace,
    protocol: EvaluationProtocol,
    cache_dir: Path | None,
    tuned: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Supernet:
    """The prepared supernet of a loaded model, from the cache where it was made before.

    `tuned` is the folder that all its subnets were tuned in, if `protocol.tuned` names one.
    """
    supernet = Supernet(loaded, space)
    windows = protocol.calibration(loaded.tokenizer)
    supernet.prepare(windows, reform=protocol.reform, cache_dir=cache_dir, progress=progress)
    if tuned is not None:
        from nas.supernet_tuning import shift_by

        shift_by(supernet, tuned)
    return supernet


def open_study(
    study: Study,
    model: str | None,
    cache_dir: Path | None,
    *,
    tuned: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Supernet, EvaluationProtocol]:
    """The prepared supernet that a study's trials were made of, of the model at `model` if it has moved.

    Raises StudyError where that is another model, the study's text has changed, or it was not made of the supernet in
    the folder `tuned`.
    """
    digest = tuned_digest(tuned)
    if digest != study.protocol.get("tuned", ""):
        made = "a tuned supernet" if study.protocol.get("tuned") else "one that is not tuned"
        raise StudyError(f"study {study.name!r} was made of {made}, got --supernet {tuned}; name what it was made of")
    source = model or study.model
    try:
        loaded = load_model(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if model is not None:
            raise
        raise StudyError(f"{error}; give --model where study {study.name!r} has its model now") from error
    if loaded.fingerprint != study.fingerprint:
        raise StudyError(f"{source} is not the model that study {study.name!r} was made of; give --model")
    protocol = protocol_on(study.text, reform=bool(study.protocol["reform"]), tuned=digest)
    if study.text and protocol.to_dict()["calibration_files"] != study.protocol["calibration_files"]:
        raise StudyError(
            f"the text of study {study.name!r} has changed since its search; search again as another study"
        )
    return open_supernet(loaded, study.space, protocol, cache_dir, tuned, progress), protocol


def tuned_digest(tuned: Path | None) -> str:
    """What names a folder of `nas.supernet_tuning` in a protocol."""
    if tuned is None:
        return ""
    from nas.supernet_tuning import read_tuned_supernet

    return read_tuned_supernet(tuned).digest


def open_evaluator(supernet: Supernet, protocol: EvaluationProtocol) -> Evaluator:
    windows = protocol.search(supernet.loaded.tokenizer)
    return Evaluator(supernet, windows, score_windows=protocol.score_windows, stride=protocol.search_stride)


def fit_winner(
    supernet: Supernet,
    subnet: Subnet,
    protocol: EvaluationProtocol,
    cache_dir: Path | None,
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Weights of its own for a subnet that is to be shipped, from the text that the supernet was calibrated on."""
    windows = protocol.calibration(supernet.loaded.tokenizer)
    fit_in_sequence(supernet, subnet, windows, cache_dir=cache_dir, progress=progress)
