"""Tuning a subnet against the full model.

The student is the subnet as it would be shipped, integers included: it starts with exactly the weights that the search
evaluated, and below 16 bits it is trained on the grid of their scales, so what is trained is what is shipped.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.quantize import QuantizedWeight, dequantize, fake_quantize, is_rounded, quantize_to
from hw_profiles.profile import Progress
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE
from nas.adapters.elastic import Ranks, SuperAdapter, attach, rank_groups
from nas.adapters.linear import ElasticLinear, GridLinear
from nas.adapters.rank_search import evolve, hill_climb
from nas.evaluate import Evaluator
from nas.extraction import extract, extracted_layers, rounded_matrices
from nas.own_weights import OwnLayers, OwnWeights
from nas.quality import Quality
from nas.sparsity.layerwise import prune
from nas.sparsity.masks import parse_pattern, sparsity_of
from nas.sparsity.rounds import LARGEST_RANK, tune_in_rounds
from nas.subnet import PARTS, Subnet
from nas.supernet import Supernet
from nas.training import TrainingResult, train
from nas.tuned import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    TUNED_FILE,
    Tuned,
    TuneSettings,
    adopt_tuned,
    begin,
    keep,
    part_weights,
    read_started,
    write_json,
)

#: That pruning sees, as many as in the papers; theirs are longer.
_PRUNING_WINDOWS = 128
#: Half of what rounds to one integer, in steps of the grid, and a little less.
_CELL = 0.49


def tune(
    supernet: Supernet,
    subnet: Subnet,
    windows: torch.Tensor,
    evaluator: Evaluator,
    settings: TuneSettings,
    folder: Path,
    progress: Progress = lambda done, total, what: None,
) -> Tuned:
    """Train `subnet` on token windows [N, T] and give it the weights; `folder` holds them, and all it takes to go on.

    Called again with the same arguments it goes on from the last checkpoint, or returns what is there. ValueError where
    `folder` holds something else.
    """
    if settings.dropout and subnet.bits < 16:
        raise ValueError(f"dropout goes with weights that are not rounded, got {subnet.precision}; leave it out")
    begun = begin(folder, supernet, windows, subnet.to_json(), json.dumps(asdict(settings), sort_keys=True))
    if (folder / TUNED_FILE).exists():
        tuned = adopt_tuned(supernet, folder)
        if tuned.subnet != subnet:
            raise ValueError(f"wanted subnet {subnet.id} tuned in {folder}, got {tuned.subnet.id}; name another folder")
        return tuned
    before = _before(begun, evaluator, subnet)
    student = _student(supernet, subnet)
    grids = {
        n: q for n, q in rounded_matrices(supernet, subnet).items() if n.startswith(f"{supernet.loaded.family.layers}.")
    }
    paths = [path for group in rank_groups(student, supernet.loaded.family) for path in group]
    job = _Job(supernet, subnet, student, paths, {path: grids[f"{path}.weight"] for path in paths} if grids else {})
    pruned = None
    if settings.sparsity and settings.method != "losa":
        job.prune(windows, settings, progress)
        supernet.adopt(subnet, job.own_layers(None))
        pruned = evaluator.evaluate(subnet)
    supernet.activate_full_model()
    adapter, result = job.train(windows, settings, folder, progress)
    ranks: dict[str, int] = {}
    if adapter is not None:
        chosen = adapter.active
        if settings.method == "nls":
            chosen = job.search_ranks(evaluator, adapter, settings, progress)
        adapter.activate(chosen)
        ranks = adapter.ranks_by_path(chosen)
        if settings.separate or not (job.grids or job.masks):
            adapter.save(chosen, folder / ADAPTER_FOLDER)
    own = job.own_layers(adapter)
    supernet.adopt(subnet, own)
    after = evaluator.evaluate(subnet)
    if settings.separate:  # until here merged, to be judged
        supernet.adopt(subnet, own := job.own_layers(None))
    tuned = Tuned(
        subnet,
        supernet.loaded.fingerprint,
        settings,
        before,
        after,
        result.steps,
        result.steps * settings.training.batch * settings.training.accumulation * windows.shape[1],
        result.seconds,
        ranks,
        pruned,
        job.check_sparsity(own),
    )
    keep(tuned, own, folder)
    return tuned


def _before(started: Path, evaluator: Evaluator, subnet: Subnet) -> Quality:
    """Quality before tuning, as noted when it began; ValueError where it began with other weights."""
    fields = read_started(started)
    now = evaluator.evaluate(subnet)
    if "before" not in fields:
        write_json(started, {**fields, "before": asdict(now)})
        return now
    try:
        before = Quality(**fields["before"])
        differs = not math.isclose(before.kl, now.kl, rel_tol=1e-3, abs_tol=1e-9)
    except TypeError as error:
        raise ValueError(f"{started} does not hold the quality that nas tune noted; name another folder") from error
    if differs:
        raise ValueError(f"{started.parent} holds what began with other weights of {subnet.id}; name another folder")
    return before


def _student(supernet: Supernet, subnet: Subnet) -> Any:
    """The extracted model with the weights that the supernet evaluates, or such as round to them on their grid."""
    student = extract(supernet, subnet)
    state = student.state_dict()
    if subnet.bits == 16:
        matrices = {name: tensor for name, tensor in state.items() if is_rounded(name, tensor)}
        rounded = {name: fake_quantize(tensor, subnet.precision) for name, tensor in matrices.items()}
    else:
        layers = f"{supernet.loaded.family.layers}."
        rounded = {
            name: _within_cells(state[name], quantized) if name.startswith(layers) else dequantize(quantized)
            for name, quantized in rounded_matrices(supernet, subnet).items()
        }
    student.load_state_dict(rounded, strict=False)
    return student


def _within_cells(exact: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """What is nearest to the unrounded weights and still rounds to these integers.

    From the integers' own values no small step would change any of them, and training would not begin.
    """
    scales = quantized.scales.float().repeat_interleave(QUANTIZATION_BLOCK_SIZE, 1)
    steps = exact / torch.where(scales == 0, torch.ones_like(scales), scales)
    integers = quantized.integers.float()
    return steps.clamp(integers - _CELL, integers + _CELL) * scales


@dataclass
class _Job:
    """The student of one subnet: its projections by path, the grids they are shipped on, and which of them are kept."""

    supernet: Supernet
    subnet: Subnet
    student: Any
    paths: list[str]
    grids: dict[str, QuantizedWeight]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    separate: bool = False

    def prune(self, windows: torch.Tensor, settings: TuneSettings, progress: Progress) -> None:
        """Zeros stay zeros on the grid, which is the same: its integers go, too."""
        self.masks = prune(
            self.student,
            self.supernet.loaded.family,
            windows[:_PRUNING_WINDOWS],
            settings.sparsity,
            method=settings.pruning,
            pattern=parse_pattern(settings.pattern),
            progress=progress,
        )

    def train(
        self, windows: torch.Tensor, settings: TuneSettings, folder: Path, progress: Progress
    ) -> tuple[SuperAdapter | None, TrainingResult]:
        if settings.method == "prune":
            return None, TrainingResult(0, 0.0)
        teacher, checkpoints = self.supernet.loaded, folder / CHECKPOINTS
        layers = list(extracted_layers(self.supernet, self.subnet))
        if settings.method == "full":
            for path in self.paths:
                linear = self.student.get_submodule(path)
                if path in self.grids:
                    self.student.set_submodule(path, linear := GridLinear(linear, self.grids[path]))
                linear.weight.requires_grad_(True)
            return None, train(
                self.student, teacher, windows, settings.training, checkpoints, layers=layers, progress=progress
            )
        if settings.separate:
            self._freeze_base()
        dense = copy.deepcopy(self.student) if settings.method == "losa" else None
        adapter = attach(
            self.student,
            teacher.family,
            settings.ranks if dense is None else (LARGEST_RANK,),
            alpha=settings.alpha,
            dropout=settings.dropout,
            masks=None if settings.separate else self.masks,
            grids=None if settings.separate else self.grids,
            seed=settings.training.seed,
        )
        if dense is None:
            result = train(
                self.student, teacher, windows, settings.training, checkpoints,
                layers=layers, adapter=adapter, progress=progress,
            )  # fmt: skip
            return adapter, result
        rounds = tune_in_rounds(
            adapter,
            dense,
            teacher,
            windows,
            windows[:_PRUNING_WINDOWS],
            settings.sparsity,
            settings.rounds,
            settings.pruning,
            settings.training,
            checkpoints,
            layers,
            progress,
        )
        self.masks = rounds.masks
        return adapter, rounds.training

    def _freeze_base(self) -> None:
        """A separate adapter is added to the weights as shipped, and its sum is never rounded."""
        for path, grid in self.grids.items():
            weight = self.student.get_submodule(path).weight
            weight.copy_(dequantize(quantize_to(weight, grid.scales, grid.bits)))
        self.separate = True

    def search_ranks(
        self, evaluator: Evaluator, adapter: SuperAdapter, settings: TuneSettings, progress: Progress
    ) -> Ranks:
        """Those of the least KL that are found, as they would be shipped."""
        tried = 0

        def kl(ranks: Ranks) -> float:
            nonlocal tried
            adapter.activate(ranks)
            self.supernet.adopt(self.subnet, self.own_layers(adapter))
            found = evaluator.evaluate(self.subnet).kl
            tried += 1
            progress(tried, settings.rank_evaluations, f"ranks with {found:.3f} nats")
            return found

        search = evolve if settings.rank_search == "evolution" else hill_climb
        found, _ = search(adapter, kl, settings.rank_evaluations, settings.training.seed)
        return found

    def own_layers(self, adapter: SuperAdapter | None) -> OwnLayers:
        """The weights as they are now, those of `adapter` merged; what tuning does not touch stays the subnet's."""
        own: OwnLayers = [{} for _ in self.subnet.layers]
        for index, layer_path in extracted_layers(self.supernet, self.subnet).items():
            shared = part_weights(self.supernet, self.subnet, index)
            for part in PARTS:
                weights = OwnWeights({}, {})
                for name, tensor in shared.items():
                    if name.partition(".")[0] != self.supernet.part_name(part):
                        continue
                    path = f"{layer_path}.{name.removesuffix('.weight')}"
                    exact = self._weight(path, adapter) if path in self.paths and name.endswith(".weight") else tensor
                    weights.exact[name] = exact
                    weights.rounded[name] = self._shipped(path, exact, adapter) if exact is not tensor else tensor
                if weights.exact:
                    own[index][part] = weights
        return own

    def _weight(self, path: str, adapter: SuperAdapter | None) -> torch.Tensor:
        """[out, in] before it is rounded."""
        if adapter is not None:
            return adapter.layers[path].merged_weight()
        module = self.student.get_submodule(path)
        base = module.get_base_layer() if isinstance(module, ElasticLinear) else module
        weight: torch.Tensor = base.weight.detach().clone()
        return weight

    def _shipped(self, path: str, exact: torch.Tensor, adapter: SuperAdapter | None) -> torch.Tensor | QuantizedWeight:
        """As the runtime computes with it; the sum with a separate adapter is never rounded."""
        if adapter is not None and self.separate:
            return exact
        if grid := self.grids.get(path):
            return quantize_to(exact, grid.scales, grid.bits)
        return fake_quantize(exact, self.subnet.precision)

    def check_sparsity(self, own: OwnLayers) -> float:
        """The share of zeros shipped; RuntimeError where one that was pruned came back."""
        shipped = {}
        for index, layer_path in extracted_layers(self.supernet, self.subnet).items():
            for weights in own[index].values():
                for name, tensor in weights.rounded.items():
                    found = tensor.integers if isinstance(tensor, QuantizedWeight) else tensor
                    shipped[f"{layer_path}.{name.removesuffix('.weight')}"] = found
        for path, mask in self.masks.items():
            if bool((shipped[path][~mask] != 0).any()):
                raise RuntimeError(f"pruned weights of {path} came back")
        return sparsity_of([shipped[path] for path in self.paths])
