import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from export.huggingface import write_huggingface
from nas.extraction import extract
from nas.families import LoadedModel, load_model
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from nas.tasks import ChoiceLoss, LoadedModelScorer, evaluate_tasks
from tests.nas.tiny_llama import save_tiny_llama

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    save_tiny_llama(tmp_path / "tiny")
    return load_model(str(tmp_path / "tiny"))


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """Thirty items of two to four choices; contexts of different lengths, some longer than others by far."""
    file = tmp_path / "items.jsonl"
    with file.open("w") as lines:
        for i in range(30):
            choices = [f"{WORDS[(i + j) % 10]} {j * i}" for j in range(2 + i % 3)]
            item = {"context": f"Question {i}: {' '.join(WORDS[: i % 10])}?", "choices": choices, "label": i % 2}
            lines.write(json.dumps(item) + "\n")
    return file


def _alone(folder: Path, task: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """What lm-eval says with its own model class."""
    scorer = HFLM(pretrained=str(folder), device="cpu", dtype="float32", trust_remote_code=True, batch_size=4)
    results: dict[str, Any] = simple_evaluate(model=scorer, tasks=[task], limit=limit)["results"]["items"]
    return results


def _task(file: Path) -> dict[str, Any]:
    return {
        "task": "items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }


@pytest.mark.filterwarnings("ignore")  # lm-eval's
def test_an_active_subnet_scores_as_lm_eval_scores_its_folder(loaded: LoadedModel, items: Path) -> None:
    """The folder as `lm_eval --model hf` loads it, layers of different sizes and all."""
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config))
    supernet.prepare(torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0)))
    subnet = Subnet((LayerChoice(2, 64), LayerChoice(0, 128), LayerChoice(1, 0), LayerChoice(2, 96)), 32)
    (items.parent / "exported").mkdir()
    folder = write_huggingface(extract(supernet, subnet), loaded.tokenizer, items.parent / "exported")
    wanted = _alone(folder, _task(items))
    supernet.activate(subnet)
    (found,) = evaluate_tasks(loaded, [str(items)], dtype=torch.float32).values()
    assert {name: score.value for name, score in found.items()} == {m: wanted[f"{m},none"] for m in ("acc", "acc_norm")}
    assert found["acc"].items == 30
    supernet.activate_full_model()
    (full,) = evaluate_tasks(loaded, [str(items)], dtype=torch.float32, limit=20).values()
    whole = _alone(items.parent / "tiny", _task(items), limit=20)
    assert full["acc"].value == whole["acc,none"]
    assert full["acc"].items == 20


@pytest.mark.filterwarnings("ignore")
def test_likelihoods_are_lm_evals(loaded: LoadedModel) -> None:
    tokens = loaded.tokenizer
    texts = [("One", " two three"), ("A much longer context, with many words in it", " x"), ("qzqz", "qz" * 40)]
    encoded = [((a, b), tokens.encode(a), tokens.encode(b)) for a, b in texts]
    encoded.append((("", "long"), list(range(1, 200)) * 20, [5, 6, 7]))  # longer than the model's context
    wanted = HFLM(pretrained=loaded.model, tokenizer=tokens, batch_size=1)._loglikelihood_tokens(encoded)
    seen: list[tuple[int, int]] = []
    scorer = LoadedModelScorer(loaded, torch.float32, lambda done, total, what: seen.append((done, total)))
    found = scorer._loglikelihood_tokens(encoded)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-4)
    assert seen[-1] == (4, 4)
    greedy = int(loaded.model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax())
    assert scorer._loglikelihood_tokens([(("", ""), [3, 4, 5], [greedy])])[0][1]


@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_choices_is_that_of_lm_evals_likelihoods(loaded: LoadedModel, items: Path) -> None:
    scorer = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    found = simple_evaluate(model=scorer, tasks=[_task(items)], limit=20, log_samples=True)
    losses = []
    for sample in found["samples"]["items"]:
        likelihoods = torch.tensor([likelihood for likelihood, _ in sample["filtered_resps"]])
        assert len(likelihoods) == len(sample["doc"]["choices"])
        losses.append(-float(likelihoods.log_softmax(0)[sample["doc"]["label"]]))
    assert len(losses) == 20
    loss = ChoiceLoss(loaded, [str(items)], limit=20, dtype=torch.float32)
    assert loss() == pytest.approx(sum(losses) / 20, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "got something else"),
        ('{"context": "a", "label": 0}', "the right one's index as label in .*line 2, got {"),
        ('{"context": "a", "choices": ["b", "c"], "label": 7}', "line 2, got {"),
        ('{"context": "a", "choices": ["b"], "label": 0}', "line 2, got {"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "line 2, got {"),
        (None, "got an empty file"),
    ],
)
def test_items_that_make_no_sense_are_refused(loaded: LoadedModel, tmp_path: Path, line: str | None, got: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"context": "a", "choices": ["b", "c"], "label": 1}\n' + line if line else "")
    with pytest.raises(ValueError, match=got):
        ChoiceLoss(loaded, [str(file)], limit=4)


@pytest.mark.filterwarnings("ignore")
def test_a_task_without_choices_has_no_such_loss(
    loaded: LoadedModel, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    plain = _task(items) | {"output_type": "loglikelihood", "doc_to_target": "{{context}}", "metric_list": metrics}
    monkeypatch.setattr("nas.tasks._of_file", lambda file: plain)
    with pytest.raises(ValueError, match="wanted a task of multiple choice with its accuracy, got items"):
        ChoiceLoss(loaded, [str(items)], limit=4)
