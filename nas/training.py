"""Training a subnet against the full model, through transformers' Trainer: checkpoints, resume, a limit of time.

The same code runs on a GPU, where there is one. Shapes: windows int64 [N, T].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from hw_profiles.profile import Progress
from nas.adapters.elastic import Sampling
from nas.arithmetic import fast_dtype
from nas.distillation import half_of_each, kl_to_teacher, next_token_loss
from nas.families import LoadedModel

#: kl: to the full model's distribution of the next token. text: the likelihood of the text itself. both: their mean.
Loss = Literal["kl", "text", "both"]


class Elastic(Protocol):
    """Adapters, of which a step trains one choice or several."""

    @property
    def model(self) -> Any:
        """What holds them, and nothing else that is trained."""
        ...

    def passes(self, rng: np.random.Generator, sampling: Sampling) -> list[Callable[[], None]]:
        """What activates the choice of each pass of a step."""
        ...


@dataclass(frozen=True)
class TrainingSettings:
    """A step takes `batch` windows, `accumulation` times. It ends after `steps`, or `max_minutes` if that is sooner.

    The learning rate rises over the first 5 % of that and falls along a cosine to 0. Where the full model is asked at
    all, by `kl` or `both`, `block_weight` times the mean of 1 - cos between what student and full model hold behind
    each layer is part of the loss, as in Puzzle (arXiv 2411.19146).
    """

    steps: int = 400
    max_minutes: float | None = None
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    loss: Loss = "kl"
    block_weight: float = 0.0
    sampling: Sampling = "active"
    seed: int = 0
    #: Seconds between checkpoints.
    checkpoint_s: float = 120.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulation) < 1 or not 0 < self.learning_rate < 1:
            raise ValueError(
                "steps, batch and accumulation must be at least 1 and the learning rate between 0 and 1, got "
                f"{self.steps}, {self.batch}, {self.accumulation} and {self.learning_rate:g}"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"--max-minutes must be above 0, got {self.max_minutes:g}")
        for value, known in ((self.loss, get_args(Loss)), (self.sampling, get_args(Sampling))):
            if value not in known:
                raise ValueError(f"wanted one of {', '.join(known)}, got {value}")
        if not 0 <= self.block_weight < math.inf or (self.block_weight and self.loss == "text"):
            raise ValueError(
                f"wanted a block weight of 0 or more, and 0 where the loss is text, got {self.block_weight:g} with "
                f"{self.loss}"
            )


@dataclass(frozen=True)
class TrainingResult:
    """What it took, restarts included."""

    steps: int
    seconds: float


def train(
    student: Any,
    teacher: LoadedModel,
    windows: torch.Tensor,
    settings: TrainingSettings,
    folder: Path,
    *,
    layers: Sequence[int] | None = None,
    adapter: Elastic | None = None,
    progress: Progress = lambda done, total, what: None,
) -> TrainingResult:
    """Train what of `student` requires gradients, in place; with `adapter`, `student` is the model under it.

    `layers` are the teacher's for each of the student's, where it has not all of them. Checkpoints go to `folder`, and
    a run that finds one there goes on from it. `teacher.model` must compute the full model. On return both are on the
    CPU.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        save_strategy="no",  # the clock says when
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    clock = _Clock(settings, progress)
    trained = student if adapter is None else adapter.model
    pairs = _layer_pairs(student, teacher, layers)
    trainer = _Distillation(trained, student, teacher, windows, settings, clock, adapter, pairs, arguments)
    teacher.model.to(trainer.args.device, torch.float32)  # large ones come as they were stored
    try:
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        teacher.model.to("cpu")
        student.to("cpu").eval()
    return TrainingResult(trainer.state.global_step, clock.seconds)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest that was written whole: the Trainer writes its own state last."""
    whole = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _layer_pairs(student: Any, teacher: LoadedModel, layers: Sequence[int] | None) -> list[tuple[nn.Module, nn.Module]]:
    """Layers of the student, each with the teacher's after which the residual stream should be the same."""
    own, whole = list(student.get_submodule(teacher.family.layers)), teacher.layers
    return [(layer, whole[index]) for layer, index in zip(own, layers or range(len(own)), strict=True)]


def _dtype() -> torch.dtype:
    """Of matrix products."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return fast_dtype()


class _Clock(TrainerCallback, ExportableState):
    """Knows how far the run is, by steps or by time, over restarts; asks for checkpoints and for the end."""

    def __init__(self, settings: TrainingSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.step = 0
        self.loss = math.nan
        self._before_s = 0.0
        self._started = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before_s + time.monotonic() - self._started

    @property
    def fraction(self) -> float:
        """Of the run that is over."""
        limit = self.settings.max_minutes
        by_time = 0.0 if limit is None else self.seconds / (60 * limit)
        return min(1.0, max(self.step / self.settings.steps, by_time))

    def learning_rate_factor(self, step: int) -> float:
        """Of the step behind `step` others: what holds at its middle, so that none is lost at either end."""
        limit = self.settings.max_minutes
        by_time = 0.0 if limit is None else self.seconds / (60 * limit) * (step + 0.5) / max(step, 1)
        fraction = min(1.0, max((step + 0.5) / self.settings.steps, by_time))
        return min(fraction / 0.05, 1.0) * (1 + math.cos(math.pi * fraction)) / 2

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__)
        self._before_s = kept["attributes"]["seconds"] if state.global_step and kept else 0.0
        self.step = state.global_step
        self._started = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        control.should_training_stop = self.fraction >= 1
        now = time.monotonic()
        if now - self._saved > self.settings.checkpoint_s and not control.should_training_stop:
            control.should_save = True
            self._saved = now
        total = max(self.step, round(self.step / self.fraction))
        self.progress(self.step, total, f"{self.settings.loss} {self.loss:.3f} nats")


class _Distillation(Trainer):
    def __init__(
        self,
        trained: nn.Module,
        student: Any,
        teacher: LoadedModel,
        windows: torch.Tensor,
        settings: TrainingSettings,
        clock: _Clock,
        adapter: Elastic | None,
        layers: Sequence[tuple[nn.Module, nn.Module]],
        arguments: TrainingArguments,
    ) -> None:
        # a Dataset is anything with a length and items
        rows: Any = [{"input_ids": window} for window in windows]
        super().__init__(model=trained, args=arguments, train_dataset=rows, callbacks=[clock])
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = False  # a mean over the batch
        self.student, self.teacher, self.settings, self.clock, self.adapter = student, teacher, settings, clock, adapter
        self._decoder = teacher.family.layers.rpartition(".")[0]
        # behind the last the head reads, which is compared as it is
        compared = layers[:-1] if settings.block_weight else ()
        self._own_layers = [own for own, _ in compared]
        self._whole_layers = [whole for _, whole in compared]
        #: The step, and which of its batches: an epoch's last step may have fewer.
        self._pass = (-1, 0)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, self.clock.learning_rate_factor
        )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = inputs["input_ids"]
        target, target_head = None, self.teacher.head.weight
        with _heard(self._whole_layers) as wanted:
            if self.settings.loss != "text":
                with torch.no_grad():
                    target = self._read(self.teacher.model, tokens)
        losses, distances = [], []
        for activate in (passes := self._passes()):
            activate()
            with _heard(self._own_layers) as found:
                hidden = self._read(self.student, tokens)
            losses.append(self._loss(hidden, tokens, target, target_head))
            if found:
                distances.append(_mean_distance(found, wanted))
            if target is None:  # the others learn from the first: distillation in place
                target, target_head = hidden.detach(), self._head
        passes[0]()  # a checkpoint holds what is active
        loss = torch.stack(losses).mean()
        self.clock.loss = float(loss.detach())
        return loss + self.settings.block_weight * torch.stack(distances).mean() if distances else loss

    def _passes(self) -> list[Callable[[], None]]:
        """Of this step: a function of the seed and the step alone, so that a resumed run draws the same."""
        if self.adapter is None:
            return [lambda: None]
        step = self.state.global_step
        self._pass = (step, self._pass[1] + 1 if self._pass[0] == step else 0)
        drawn = step * self.settings.accumulation + self._pass[1]
        return self.adapter.passes(np.random.default_rng((self.settings.seed, drawn)), self.settings.sampling)

    def _loss(
        self, hidden: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor | None, target_head: torch.Tensor
    ) -> torch.Tensor:
        """Of what the student's head reads, [N, T, D]; `target` is what the teacher's reads."""
        how = _dtype(), self.teacher.logit_cap
        if target is not None and self.settings.loss != "both":
            return kl_to_teacher(hidden.flatten(0, 1), self._head, target.flatten(0, 1), target_head, *how)
        read, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()  # nothing follows the last position
        if target is None:
            return next_token_loss(read, self._head, targets, *how)
        return half_of_each(read, self._head, target[:, :-1].flatten(0, 1), target_head, targets, *how)

    @property
    def _head(self) -> torch.Tensor:
        weight: torch.Tensor = self.student.get_submodule(self.teacher.family.head).weight
        return weight

    def _read(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads, [N, T, D]."""
        decoder = model.get_submodule(self._decoder)
        # not by the Trainer, which would cast what comes out of the whole model
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=_dtype() == torch.bfloat16):
            hidden: torch.Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


@contextmanager
def _heard(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What each of `layers` gives within, [N, T, D], in the order in which they run."""
    heard: list[torch.Tensor] = []

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        heard.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(listen) for layer in layers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _mean_distance(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of residual streams [N, T, D]: the mean of 1 - cos over layers and tokens."""
    distances = [
        1 - nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean()
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return torch.stack(distances).mean()
