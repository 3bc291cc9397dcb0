"""Super-adapters: LoRA at the largest rank, of which every smaller one is a prefix (NLS).

Maps that read the same input share a rank: a group. A choice of ranks is a tuple of one rank for each group, in the
order of `SuperAdapter.groups`, and what comes out is an ordinary PEFT adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from export.quantize import QuantizedWeight
from nas.adapters.linear import ElasticLinear
from nas.families import Family

#: Of each group of ranks one is in use.
Ranks = tuple[int, ...]
#: What becomes of them at a step of training. active: those in use stay so. sandwich: the largest, the smallest and a
#: random choice together (Yu et al., arXiv 2003.11142).
Sampling = Literal["active", "random", "sandwich"]


@dataclass(frozen=True)
class SuperAdapter:
    """Adapters of every projection of a decoder's layers; `choices` are the ranks to choose from, largest first."""

    model: PeftModel
    layers: Mapping[str, ElasticLinear]
    #: Paths of the maps that share a rank, layer by layer.
    groups: Sequence[tuple[str, ...]]
    choices: Sequence[int]
    alpha: float

    @property
    def maximal(self) -> Ranks:
        return (self.choices[0],) * len(self.groups)

    @property
    def minimal(self) -> Ranks:
        return (self.choices[-1],) * len(self.groups)

    @property
    def heuristic(self) -> Ranks:
        """The middle of the choices everywhere, the larger of two: what NLS takes without a search."""
        return (self.choices[(len(self.choices) - 1) // 2],) * len(self.groups)

    def passes(self, rng: np.random.Generator, sampling: Sampling) -> list[Callable[[], None]]:
        """What activates the ranks of each pass of a training step; see `Sampling`."""
        if sampling == "active":
            return [lambda: None]
        sampled = partial(self.activate, self.sample(rng))
        if sampling == "random":
            return [sampled]
        return [partial(self.activate, self.maximal), partial(self.activate, self.minimal), sampled]

    def sample(self, rng: np.random.Generator) -> Ranks:
        """Each group's rank drawn alone, evenly."""
        return tuple(int(rank) for rank in rng.choice(self.choices, len(self.groups)))

    @property
    def active(self) -> Ranks:
        return tuple(self.layers[paths[0]].active_rank or self.choices[0] for paths in self.groups)

    def activate(self, ranks: Ranks) -> None:
        for paths, rank in zip(self.groups, ranks, strict=True):
            for path in paths:
                self.layers[path].active_rank = rank

    def ranks_by_path(self, ranks: Ranks) -> dict[str, int]:
        return {path: rank for paths, rank in zip(self.groups, ranks, strict=True) for path in paths}

    @cached_property
    def parameters_per_rank(self) -> npt.NDArray[np.int64]:
        """Numbers that one more rank adds to A and B, by group."""
        bases = [[self.layers[path].get_base_layer() for path in paths] for paths in self.groups]
        return np.array([sum(base.in_features + base.out_features for base in group) for group in bases])

    def parameters(self, ranks: Ranks) -> int:
        """Numbers in A and B of these ranks."""
        return int(np.dot(ranks, self.parameters_per_rank))

    def save(self, ranks: Ranks, folder: Path) -> None:
        """The sub-adapter of `ranks` as a standard PEFT adapter, which `PeftModel.from_pretrained` loads.

        s = alpha / R stays that of the super-adapter, so a smaller rank r has alpha r / R.
        """
        by_path, largest = self.ranks_by_path(ranks), self.choices[0]
        config = _lora_config(list(by_path), largest, self.alpha)
        config.rank_pattern = {path: rank for path, rank in by_path.items() if rank != largest}
        config.alpha_pattern = {path: self.alpha * rank / largest for path, rank in config.rank_pattern.items()}
        config.inference_mode = True
        tensors = {}
        for path, rank in by_path.items():
            A, B = (matrix.detach() for matrix in self.layers[path].matrices())
            tensors[f"base_model.model.{path}.lora_A.weight"] = A[:rank].contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = B[:, :rank].contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def attach(
    model: Any,
    family: Family,
    choices: Sequence[int],
    *,
    alpha: float,
    dropout: float = 0.0,
    masks: Mapping[str, torch.Tensor] | None = None,
    grids: Mapping[str, QuantizedWeight] | None = None,
    seed: int = 0,
) -> SuperAdapter:
    """Put adapters over all projections of `model`'s layers; A is drawn, B starts at 0, so nothing changes yet.

    `masks` bool [out, in] and `grids` are by the projections' paths in `model`; paths they lack have none.
    """
    if not choices or min(choices) < 1 or list(choices) != sorted(set(choices), reverse=True):
        raise ValueError(f"ranks must be different, above 0 and largest first, got {list(choices)}")
    groups = rank_groups(model, family)
    paths = [path for group in groups for path in group]
    config = _lora_config(paths, choices[0], alpha, dropout)
    config._register_custom_module({nn.Linear: ElasticLinear})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore", FutureWarning)  # of names in transformers that PEFT still uses
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    layers = {path: model.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        layer.constrain((masks or {}).get(path), (grids or {}).get(path))
    adapter = SuperAdapter(peft_model, layers, groups, tuple(choices), alpha)
    adapter.activate(adapter.maximal)
    return adapter


def rank_groups(model: Any, family: Family) -> list[tuple[str, ...]]:
    """Paths of the projections of every layer, those together that read the same; parts that are not there are not."""
    groups: list[tuple[str, ...]] = []
    for index in range(len(model.get_submodule(family.layers))):
        layer = model.get_submodule(f"{family.layers}.{index}")
        for group in family.read_together:
            if hasattr(layer, group[0].partition(".")[0]):
                groups.append(tuple(f"{family.layers}.{index}.{name}" for name in group))
    return groups


def _lora_config(paths: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(paths), bias="none", task_type="CAUSAL_LM"
    )
