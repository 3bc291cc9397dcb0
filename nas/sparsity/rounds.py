"""Pruning and tuning by turns (LoSA, Huang et al., arXiv 2502.14816): a little sparser, tuned, and sparser again.

In each of T rounds the adapter is merged for a moment; what layers share says how sparse each becomes, the weights as
merged say which of them go, and how far each layer's output then is from the dense one's says what rank its adapter
has. Masks only grow, and the adapter is masked by them, so that it merges with the sparsity kept exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hw_profiles.profile import Progress, part_of
from nas.adapters.elastic import SuperAdapter
from nas.families import Family, LoadedModel
from nas.sparsity.layerwise import PruningMethod, embedded, prune, run
from nas.sparsity.losa import block_losses, layer_sparsities, model_redundancy, reconstruction_ranks, schedule
from nas.training import TrainingResult, TrainingSettings, train

#: Windows that redundancies and losses are taken from; those that prune are more.
COMPARED_WINDOWS = 64
#: Mean rank of the first round and of the last; the largest that a layer may have.
MEAN_RANKS = (6.0, 10.0)
LARGEST_RANK = 16


@dataclass(frozen=True)
class RoundsResult:
    """`masks` by path, `sparsities` and `ranks` of every layer of the last round."""

    masks: dict[str, torch.Tensor]
    sparsities: list[float]
    ranks: list[int]
    training: TrainingResult


def tune_in_rounds(
    adapter: SuperAdapter,
    dense: Any,
    teacher: LoadedModel,
    windows: torch.Tensor,
    calibration: torch.Tensor,
    sparsity: float,
    rounds: int,
    method: PruningMethod,
    settings: TrainingSettings,
    folder: Path,
    layers: Sequence[int] | None = None,
    progress: Progress = lambda done, total, what: None,
) -> RoundsResult:
    """Prune the model under `adapter` to `sparsity` and tune it, in place; steps and minutes are those of all rounds.

    `adapter` is of rank LARGEST_RANK over a copy of `dense`, which is left alone. Token windows [N, T]: `windows` to
    train on, `calibration` to prune by; `layers` as in `train`. Finished rounds are kept in `folder`, and a run that
    finds some goes on.
    """
    if adapter.choices[0] < LARGEST_RANK:
        raise ValueError(f"wanted an adapter of rank {LARGEST_RANK}, got {adapter.choices[0]}; smaller ones saturate")
    family, student = teacher.family, adapter.model.get_base_model()
    merged = _copy_of(dense)
    of_round = replace(
        settings,
        steps=max(1, settings.steps // rounds),
        max_minutes=None if settings.max_minutes is None else settings.max_minutes / rounds,
    )
    masks = {path: torch.ones_like(_base(adapter, path), dtype=torch.bool) for path in adapter.layers}
    given: list[float] | None = None
    ranks: list[int] = []
    results: list[TrainingResult] = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, mean in enumerate(schedule(sparsity, rounds), 1):
        kept = folder / f"round-{number}.safetensors"
        if kept.exists():
            masks, given, ranks, result = _load(adapter, kept)
            _constrain(adapter, family, masks, ranks, None)
        else:
            tell = part_of(progress, number - 1, rounds, f"round {number}")
            _merge_into(merged, adapter)
            compared = calibration[:COMPARED_WINDOWS]
            given = layer_sparsities(model_redundancy(merged, family, compared, tell), mean, at_least=given)
            masks = prune(merged, family, calibration, given, method=method, masks=masks, progress=tell)
            losses = block_losses(_outputs(dense, family, compared), _outputs(merged, family, compared))
            share = (number - 1) / max(1, rounds - 1)
            ranks = reconstruction_ranks(losses, MEAN_RANKS[0] + share * (MEAN_RANKS[1] - MEAN_RANKS[0]))
            _constrain(adapter, family, masks, ranks, {path: merged.get_submodule(path).weight for path in masks})
            checkpoints = folder / f"round-{number}"
            result = train(
                student, teacher, windows, of_round, checkpoints, layers=layers, adapter=adapter, progress=tell
            )
            _save(adapter, kept, masks, given, ranks, result)
            shutil.rmtree(checkpoints, ignore_errors=True)
        results.append(result)
    total = TrainingResult(sum(result.steps for result in results), sum(result.seconds for result in results))
    return RoundsResult(masks, list(given or ()), ranks, total)


def _constrain(
    adapter: SuperAdapter,
    family: Family,
    masks: dict[str, torch.Tensor],
    ranks: list[int],
    pruned: dict[str, torch.Tensor] | None,
) -> None:
    """New masks and ranks; with `pruned`, the base becomes what makes the merged weights these."""
    adapter.activate(tuple(ranks[_layer_of(paths[0], family)] for paths in adapter.groups))
    for path, layer in adapter.layers.items():
        layer.mask = masks[path]
        if pruned is not None:
            with torch.no_grad():
                layer.get_base_layer().weight.copy_((pruned[path] - layer.delta()) * masks[path])


def _layer_of(path: str, family: Family) -> int:
    return int(path.removeprefix(f"{family.layers}.").partition(".")[0])


def _base(adapter: SuperAdapter, path: str) -> torch.Tensor:
    weight: torch.Tensor = adapter.layers[path].get_base_layer().weight
    return weight


def _copy_of(model: Any) -> Any:
    """With weights of its own."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.requires_grad_(False).eval()


def _merge_into(model: Any, adapter: SuperAdapter) -> None:
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            model.get_submodule(path).weight.copy_(layer.merged_weight())


@torch.no_grad()
def _outputs(model: Any, family: Family, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each layer leaves in the residual stream, [tokens, C]."""
    decoder = LoadedModel(model, None, "", "", family)
    batches = embedded(decoder, windows)
    for index in range(len(decoder.layers)):
        batches = run(decoder, index, batches)
        yield torch.cat([batch.flatten(0, 1) for batch in batches])


def _save(
    adapter: SuperAdapter,
    file: Path,
    masks: dict[str, torch.Tensor],
    given: list[float],
    ranks: list[int],
    result: TrainingResult,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in adapter.layers.items():
        A, B = layer.matrices()
        tensors |= {f"{path}|A": A.detach(), f"{path}|B": B.detach(), f"{path}|base": _base(adapter, path).detach()}
        tensors[f"{path}|mask"] = masks[path]
    said = {"sparsities": given, "ranks": ranks, "steps": result.steps, "seconds": result.seconds}
    partial = file.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"round": json.dumps(said)})
    partial.replace(file)


def _load(adapter: SuperAdapter, file: Path) -> tuple[dict[str, torch.Tensor], list[float], list[int], TrainingResult]:
    """Put a finished round's weights back; ValueError where the file is damaged."""
    masks = {}
    try:
        with safe_open(file, "pt") as tensors, torch.no_grad():
            said = json.loads(tensors.metadata()["round"])
            for path, layer in adapter.layers.items():
                A, B = layer.matrices()
                for name, own in (("A", A), ("B", B), ("base", _base(adapter, path))):
                    own.copy_(tensors.get_tensor(f"{path}|{name}"))
                masks[path] = tensors.get_tensor(f"{path}|mask")
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"wanted a finished round in {file}, got: {error}; delete it to have it done again") from error
    return masks, said["sparsities"], said["ranks"], TrainingResult(said["steps"], said["seconds"])
