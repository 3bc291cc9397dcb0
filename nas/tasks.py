"""Zero-shot tasks of a subnet through lm-eval: its tasks, prompts and metrics, our forward pass.

lm-eval's own model for transformers makes logits of every position of a padded batch. Here the head reads only the
positions that are scored, which for multiple choice is one in five to ten, in the precision that the rest of the
product evaluates in.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hw_profiles.profile import Progress
from hw_profiles.shapes import Precision
from nas.arithmetic import computing, fast_dtype
from nas.distillation import capped
from nas.families import LoadedModel
from nas.quality import Quality
from nas.search import Evaluates
from nas.subnet import Part, Size, Subnet

try:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(f"--task needs lm-eval ({error}); pip install 'llm-nas[tasks]'") from error

_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """Of one metric of a task, such as acc; `stderr` is None where lm-eval gives none."""

    value: float
    stderr: float | None
    items: int


class LoadedModelScorer(HFLM):
    """What lm-eval asks for likelihoods: the loaded model as it is now, so whichever subnet is active."""

    def __init__(self, loaded: LoadedModel, dtype: torch.dtype | None = None, progress: Progress | None = None) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
        self.loaded = loaded
        self.dtype = dtype or fast_dtype()
        self.progress = progress or (lambda done, total, what: None)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each continuation given its context, both as tokens: log-likelihood, and whether greedy decoding says it.

        What is longer than the model's context loses its beginning, as in lm-eval's own.
        """
        fed = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(fed[i]))
        done = 0
        while done < len(order):
            longest = max(1, len(fed[order[done]]))
            batch = order[done : done + max(1, _TOKENS_AT_ONCE // longest)]
            for i, scored in zip(batch, self._score([(fed[i], requests[i][2]) for i in batch]), strict=True):
                found[i] = scored
            done += len(batch)
            self.progress(done, len(order), "scoring answers")
        return found

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of (tokens fed, continuation), the longest first; causal, so that padding on the right changes nothing."""
        tokens = torch.zeros(len(batch), max(1, len(batch[0][0])), dtype=torch.int64)
        for row, (fed, _) in zip(tokens, batch, strict=True):
            row[: len(fed)] = torch.tensor(fed)
        loaded = self.loaded
        with computing(self.dtype):
            hidden = loaded.embed(tokens)
            for index in range(len(loaded.layers)):
                hidden = loaded.run_layer(index, hidden)
            normed = loaded.final_norm(hidden).to(self.dtype)
        read = [rows[len(fed) - len(said) : len(fed)] for rows, (fed, said) in zip(normed, batch, strict=True)]
        targets = torch.tensor([token for _, said in batch for token in said])
        likelihoods, greedy = [], []
        head = loaded.head.weight.to(self.dtype).T
        positions = torch.cat(read)
        for first in range(0, len(positions), _LOGITS_AT_ONCE):
            rows = slice(first, first + _LOGITS_AT_ONCE)
            logits = capped((positions[rows] @ head).float(), loaded.logit_cap)
            likelihoods.append(logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == targets[rows])
        lengths = [len(said) for _, said in batch]
        split = zip(torch.split(torch.cat(likelihoods), lengths), torch.split(torch.cat(greedy), lengths), strict=True)
        return [(float(likelihood.sum()), bool(is_greedy.all())) for likelihood, is_greedy in split]


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Score]]:
    """Scores by task and metric of the model as it is now, without examples; on the first `limit` items of each.

    A task is a name that lm-eval knows, or a .jsonl file of multiple-choice items, one object a line: `context`,
    `choices` and `label`, the right one's index; scored is " " + choice after the context. ValueError for a task that
    is neither.
    """
    manager, wanted = _asked_for(tasks)
    scorer = LoadedModelScorer(loaded, dtype, progress)
    found = simple_evaluate(model=scorer, tasks=wanted, task_manager=manager, limit=limit, log_samples=False)
    return {name: _scores(results) for name, results in found["results"].items()}


class ChoiceLoss:
    """Cross-entropy of the right choices among all of their items, in nats, mean over the items of all tasks.

    What the probabilities are taken of is what accuracy compares, each choice's summed log-likelihood, so it falls as
    accuracy rises, and does not move in steps of an item. Of the model as it is when it is called.
    """

    def __init__(
        self, loaded: LoadedModel, tasks: Sequence[str], *, limit: int, dtype: torch.dtype | None = None
    ) -> None:
        """On the first `limit` items of each task; ValueError as `evaluate_tasks`, or for one without choices."""
        manager, wanted = _asked_for(tasks)
        self._scorer = LoadedModelScorer(loaded, dtype)
        self._requests: list[Instance] = []
        #: Of each item, how many choices there are and which of them count as right.
        self._items: list[tuple[int, list[int]]] = []
        for name, task in manager.load(wanted)["tasks"].items():
            metrics = task.aggregation()
            if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in metrics or "acc_mutual_info" in metrics:
                raise ValueError(f"wanted a task of multiple choice with its accuracy, got {name}; take another")
            task.build_all_requests(limit=limit)
            by_item: dict[int, list[Instance]] = {}
            for request in task.instances:
                by_item.setdefault(request.doc_id, []).append(request)
            for requests in by_item.values():
                self._items.append((len(requests), _right_choices(task, requests)))
                self._requests += requests
        #: Read at every call.
        self.tokens = sum(len(self._scorer.tok_encode("".join(request.args))) for request in self._requests)

    def __call__(self) -> float:
        found = self._scorer.loglikelihood(self._requests, disable_tqdm=True)
        likelihoods = torch.tensor([likelihood for likelihood, _ in found], dtype=torch.float64)
        of_items = torch.split(likelihoods, [count for count, _ in self._items])
        losses = [
            choices.logsumexp(0) - choices[right].logsumexp(0)
            for choices, (_, right) in zip(of_items, self._items, strict=True)
        ]
        return float(torch.stack(losses).mean())


def _right_choices(task: Task, requests: Sequence[Instance]) -> list[int]:
    """Which ones, if they were the likeliest, lm-eval would count as right: labels have many forms, it knows all."""

    def counts(chosen: int) -> bool:
        found = [(-1.0 if i == chosen else -1e9, False) for i in range(len(requests))]
        return bool(task.process_results(requests[0].doc, found)["acc"])

    return [chosen for chosen in range(len(requests)) if counts(chosen)]


class TaskEvaluator:
    """Judges subnets by a task beside the KL that `evaluator` finds; single parts, which only rank, by KL alone."""

    def __init__(self, evaluator: Evaluates, loss: ChoiceLoss) -> None:
        self.evaluator = evaluator
        self.loss = loss

    def evaluate(self, subnet: Subnet) -> Quality:
        start = time.perf_counter()
        found = self.evaluator.evaluate(subnet)  # leaves it active
        loss = self.loss()
        tokens, seconds = found.tokens + self.loss.tokens, time.perf_counter() - start
        return replace(found, task_loss=loss, tokens=tokens, seconds=seconds)

    def block_kl(self, layer: int, part: Part, choice: Size, precision: Precision) -> float:
        return self.evaluator.block_kl(layer, part, choice, precision)

    def narrow_head_kl(self) -> float:
        return self.evaluator.narrow_head_kl()

    def reformation_error(self, layer: int, part: Part, choice: Size) -> float:
        return self.evaluator.reformation_error(layer, part, choice)


def _asked_for(tasks: Sequence[str]) -> tuple[TaskManager, list[str | dict[str, Any]]]:
    """What `TaskManager.load` takes."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells every default that it takes
    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=any(not task.endswith(".jsonl") for task in tasks))
    return manager, [_of_file(Path(task)) if task.endswith(".jsonl") else _known(task, manager) for task in tasks]


def _of_file(file: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task whose items are in `file`."""
    if not file.is_file():
        raise ValueError(f"wanted a file of multiple-choice items, but there is no {file}; check the path")
    _check_items(file)
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": f"{file.parent.name}_{file.stem}" if file.parent.name else file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": metrics,
    }


def _check_items(file: Path) -> None:
    """ValueError for the first line that is no item."""
    lines = [(n, line) for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"wanted a JSON object in {file}, line {number}, got something else ({error})") from error
        match item:
            case {"context": str(), "choices": [_, _, *_] as choices, "label": int(label)} if all(
                isinstance(choice, str) and choice for choice in choices
            ) and 0 <= label < len(choices):
                continue
        raise ValueError(
            f"wanted an object with context, two choices or more, and the right one's index as label in {file}, line "
            f"{number}, got {line[:80]}"
        )
    if not lines:
        raise ValueError(f"wanted items, an object a line, in {file}, got an empty file")


def _known(task: str, manager: TaskManager) -> str:
    if task not in manager.all_tasks:
        raise ValueError(
            f"wanted a task that lm-eval knows, or a .jsonl file of items, got {task}; see lm-eval ls tasks"
        )
    return task


def _scores(results: dict[str, Any]) -> dict[str, Score]:
    """lm-eval's flat keys, "acc,none" and "acc_stderr,none"."""
    scores = {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{filtered}")
            known = stderr if isinstance(stderr, float) else None
            scores[metric] = Score(float(value), known, int(results["sample_len"]))
    return scores
