"""Tuning a subnet against the full model, and the folder that holds what came of it.

The student is the subnet as it would be shipped, integers included: it starts with exactly the weights that the search
evaluated, and below 16 bits it is trained on the grid of their scales, so what is trained is what is shipped. Methods:

lora   an adapter of one rank over every projection, merged
nls    an adapter of several ranks (LoNAS, Shears), a random choice at each step; ranks are searched, then merged
losa   pruned and tuned by turns, with sparsities and ranks of each layer's own
full   the projections themselves
prune  nothing is trained

With a sparsity, weights are pruned before (losa: meanwhile), and what is merged stays exactly as sparse, on the
integers' grid too (SparsePEFT and QA-SparsePEFT of SQFT). `separate` leaves the adapter beside the sparse weights, as
Shears does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize_to
from hw_profiles.profile import Progress
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE
from nas.adapters.elastic import Ranks, SuperAdapter, attach, hill_climb, rank_groups
from nas.adapters.linear import ElasticLinear, GridLinear
from nas.calibration import statistics_key
from nas.evaluate import Evaluator
from nas.own_weights import OwnLayers, OwnWeights, has_own, load_own, save_own
from nas.quality import Quality
from nas.space import PARTS, Subnet
from nas.sparsity.layerwise import PruningMethod, prune
from nas.sparsity.masks import parse_pattern, sparsity_of
from nas.sparsity.rounds import LARGEST_RANK, tune_in_rounds
from nas.supernet import Supernet
from nas.training import TrainingResult, TrainingSettings, train

Method = Literal["lora", "nls", "losa", "full", "prune"]
METHODS: tuple[Method, ...] = get_args(Method)

TUNED_FILE = "tuned.json"
_STARTED_FILE = "started.json"
_ADAPTER_FOLDER = "adapter"
CHECKPOINTS = "checkpoints"
_VERSION = 1
#: That pruning sees; with windows of 256 tokens, half of what the papers take.
_PRUNING_WINDOWS = 256
#: Half of what rounds to one integer, in steps of the grid, and a little less.
_CELL = 0.49


def one_of_methods(name: str) -> Method:
    for method in METHODS:
        if name == method:
            return method
    raise ValueError(f"wanted a method out of {', '.join(METHODS)}, got {name}")


@dataclass(frozen=True)
class TuneSettings:
    """`ranks` are those of an adapter to choose from, largest first; one of them with `lora`, none with `losa`.

    `rank_evaluations` choices are evaluated to find the ranks of `nls`. `sparsity` is the share of the projections'
    weights that become 0, by `pruning`, in an N:M `pattern` or anywhere; `losa` gets there in `rounds`.
    """

    method: Method = "lora"
    ranks: tuple[int, ...] = (32,)
    alpha: float = 64.0
    dropout: float = 0.0
    rank_evaluations: int = 24
    sparsity: float = 0.0
    pattern: str = "unstructured"
    pruning: PruningMethod = "wanda"
    separate: bool = False
    rounds: int = 5
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        one_of_methods(self.method)
        if self.method == "lora" and len(self.ranks) != 1:
            raise ValueError(f"lora has one rank, got {list(self.ranks)}; give one --rank, or --method nls")
        if self.method == "nls" and len(self.ranks) < 2:
            raise ValueError(f"nls chooses among ranks, got {list(self.ranks)}; give --rank several times")
        if self.pruning not in get_args(PruningMethod):
            raise ValueError(f"wanted pruning by {' or '.join(get_args(PruningMethod))}, got {self.pruning}")
        if not 0 <= self.sparsity < 1 or self.rounds < 1:
            raise ValueError(f"wanted a sparsity from 0 to below 1 and a round at least, got {self.sparsity:g}")
        if parse_pattern(self.pattern) is not None and self.method == "losa":
            raise ValueError(f"losa prunes anywhere, got the pattern {self.pattern}; leave it out, or take lora")
        if self.method in ("losa", "prune") and not self.sparsity:
            raise ValueError(f"{self.method} makes weights sparse, got no sparsity; give one, such as 0.5")
        if self.method == "full" and (self.sparsity or self.separate):
            raise ValueError("full tunes all weights, got a sparsity or a separate adapter; take lora or nls for those")
        if not 0 <= self.dropout < 1 or self.alpha <= 0 or self.rank_evaluations < 1:
            raise ValueError(f"wanted alpha above 0, dropout below 1 and an evaluation at least, got {self}")


@dataclass(frozen=True)
class Tuned:
    """What tuning did to `subnet`: quality on the study's text before and after, and what it cost.

    `ranks` names the adapter's rank of every projection, by its path in the extracted model; empty without an adapter.
    """

    subnet: Subnet
    fingerprint: str
    settings: TuneSettings
    before: Quality
    after: Quality
    steps: int
    tokens: int
    seconds: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    #: After pruning and before tuning; None where nothing was pruned first.
    pruned: Quality | None = None
    #: Share of exact zeros in the projections as shipped.
    sparsity: float = 0.0

    @property
    def title(self) -> str:
        """For people."""
        if self.settings.method == "prune":
            return f"{self.sparsity:.0%} of its projections' weights set to 0 by {self.settings.pruning}"
        against = "against the full model" if self.settings.training.loss == "kl" else "on text"
        return f"tuned by {self.settings.method} for {self.steps} steps, {self.tokens:,} tokens, {against}"


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
    begun = begin(folder, supernet, windows, subnet.to_json(), json.dumps(asdict(settings), sort_keys=True))
    if (folder / TUNED_FILE).exists():
        tuned = adopt_tuned(supernet, folder)
        if tuned.subnet != subnet:
            raise ValueError(f"wanted subnet {subnet.id} tuned in {folder}, got {tuned.subnet.id}; name another folder")
        return tuned
    before = _before(begun, evaluator, subnet)
    student = _student(supernet, subnet)
    grids = {n: q for n, q in supernet.quantized(subnet).items() if n.startswith(f"{supernet.loaded.family.layers}.")}
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
            adapter.save(chosen, folder / _ADAPTER_FOLDER)
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
    save_own(folder, own)
    write_json(folder / TUNED_FILE, {"version": _VERSION, **_fields(tuned)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return tuned


def adopt_tuned(supernet: Supernet, folder: Path) -> Tuned:
    """Give the subnet that was tuned in `folder` its weights there; ValueError where they do not fit this model."""
    tuned = read_tuned(folder)
    if tuned.fingerprint != supernet.loaded.fingerprint:
        raise ValueError(f"wanted a subnet of {supernet.loaded.name} in {folder}, got one of another model")
    supernet.space.validate(tuned.subnet)
    depth = supernet.space.depth
    if not has_own(folder, depth):
        raise ValueError(f"wanted the weights of {depth} layers in {folder}, got fewer or damaged ones; tune again")
    own = load_own(folder, depth, tuned.subnet.bits)
    for index, parts in enumerate(own):
        wanted = {name: tensor.shape for name, tensor in _shared(supernet, tuned.subnet, index).items()}
        found = {name: tensor.shape for part in parts.values() for name, tensor in part.exact.items()}
        rounded = {name: tensor.shape for part in parts.values() for name, tensor in part.rounded.items()}
        if not wanted == found == rounded:
            raise ValueError(f"wanted the sizes of subnet {tuned.subnet.id} in layer {index} of {folder}; tune again")
    supernet.adopt(tuned.subnet, own)
    return tuned


def read_tuned(folder: Path) -> Tuned:
    """What `folder` says of itself; ValueError where it is not what `tune` wrote."""
    try:
        fields = json.loads((folder / TUNED_FILE).read_text())
        if fields.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        training = TrainingSettings(**fields["settings"].pop("training"))
        settings = {**fields.pop("settings"), "training": training}
        settings["ranks"] = tuple(settings["ranks"])
        subnet = Subnet.from_json(json.dumps(fields.pop("subnet")))
        fields |= {"before": Quality(**fields["before"]), "after": Quality(**fields["after"])}
        fields["pruned"] = None if fields["pruned"] is None else Quality(**fields["pruned"])
        return Tuned(**{**fields, "subnet": subnet, "settings": TuneSettings(**settings)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"wanted a folder that nas tune wrote whole in {folder}, got: {error}") from error


def _fields(tuned: Tuned) -> dict[str, Any]:
    return {**asdict(tuned), "subnet": json.loads(tuned.subnet.to_json()), "ranks": dict(tuned.ranks)}


def begin(folder: Path, supernet: Supernet, windows: torch.Tensor, *others: str) -> Path:
    """Note what `folder` is for, or see that it is for this; returns the note's file."""
    key = " ".join([str(_VERSION), supernet.prepared_from, statistics_key(supernet.loaded, windows), *others])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    started = folder / _STARTED_FILE
    if started.exists():
        if json.loads(started.read_text())["digest"] != digest:
            raise ValueError(
                f"{folder} holds what was tuned with another subnet, text or settings; name another, or delete it"
            )
        return started
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"wanted an empty folder to tune in, got {folder} with other files; name another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, {"digest": digest})
    return started


def _before(started: Path, evaluator: Evaluator, subnet: Subnet) -> Quality:
    """Quality before tuning; the first answer is kept, as a run that goes on has the weights that it began with."""
    fields = json.loads(started.read_text())
    if "before" not in fields:
        fields["before"] = asdict(evaluator.evaluate(subnet))
        write_json(started, fields)
    return Quality(**fields["before"])


def _student(supernet: Supernet, subnet: Subnet) -> Any:
    """The extracted model with the weights that the supernet evaluates, or such as round to them on their grid."""
    student = supernet.extract(subnet)
    state = student.state_dict()
    if subnet.bits == 16:
        rounded = {name: fake_quantize(tensor, 16) for name, tensor in state.items() if tensor.dim() == 2}
    else:
        layers = f"{supernet.loaded.family.layers}."
        rounded = {
            name: _within_cells(state[name], quantized) if name.startswith(layers) else dequantize(quantized)
            for name, quantized in supernet.quantized(subnet).items()
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
            return None, TrainingResult(0, 0.0, ())
        teacher, checkpoints = self.supernet.loaded, folder / CHECKPOINTS
        if settings.method == "full":
            for path in self.paths:
                linear = self.student.get_submodule(path)
                if path in self.grids:
                    self.student.set_submodule(path, linear := GridLinear(linear, self.grids[path]))
                linear.weight.requires_grad_(True)
            return None, train(self.student, teacher, windows, settings.training, checkpoints, progress=progress)
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
        )
        if dense is None:
            result = train(
                self.student, teacher, windows, settings.training, checkpoints, adapter=adapter, progress=progress
            )
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
        """Those of the least KL that hill climbing finds, as they would be shipped."""
        tried = 0

        def kl(ranks: Ranks) -> float:
            nonlocal tried
            adapter.activate(ranks)
            self.supernet.adopt(self.subnet, self.own_layers(adapter))
            found = evaluator.evaluate(self.subnet).kl
            tried += 1
            progress(tried, settings.rank_evaluations, f"ranks with {found:.3f} nats")
            return found

        found, _ = hill_climb(adapter, kl, settings.rank_evaluations, settings.training.seed)
        return found

    def own_layers(self, adapter: SuperAdapter | None) -> OwnLayers:
        """The weights as they are now, those of `adapter` merged; what tuning does not touch stays the subnet's."""
        own: OwnLayers = [{} for _ in self.subnet.layers]
        for index, layer_path in self.supernet.extracted_layers(self.subnet).items():
            shared = _shared(self.supernet, self.subnet, index)
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
        return fake_quantize(exact, self.subnet.bits)

    def check_sparsity(self, own: OwnLayers) -> float:
        """The share of zeros shipped; RuntimeError where one that was pruned came back."""
        shipped = {}
        for index, layer_path in self.supernet.extracted_layers(self.subnet).items():
            for weights in own[index].values():
                for name, tensor in weights.rounded.items():
                    found = tensor.integers if isinstance(tensor, QuantizedWeight) else tensor
                    shipped[f"{layer_path}.{name.removesuffix('.weight')}"] = found
        for path, mask in self.masks.items():
            if bool((shipped[path][~mask] != 0).any()):
                raise RuntimeError(f"pruned weights of {path} came back")
        return sparsity_of([shipped[path] for path in self.paths])


def _shared(supernet: Supernet, subnet: Subnet, index: int) -> dict[str, torch.Tensor]:
    """Weights of a layer's parts before tuning, without the norms in front of them, which all subnets share."""
    norms = (supernet.loaded.family.attention_norm, supernet.loaded.family.mlp_norm)
    weights = supernet.layer_weights(subnet, index)
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in norms}


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(fields, indent=1) + "\n")
    partial.replace(file)
