"""Tuning a subnet against the full model, and the folder that holds what came of it.

The student is the subnet as it would be shipped, integers included: it starts with exactly the weights that the search
evaluated, and below 16 bits it is trained on the grid of their scales, so what is trained is what is shipped. Methods:

lora   an adapter of one rank over every projection, merged
nls    an adapter of several ranks (LoNAS, Shears), a random choice at each step; ranks are searched, then merged
full   the projections themselves
"""

from __future__ import annotations

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
from nas.adapters.linear import GridLinear
from nas.calibration import statistics_key
from nas.evaluate import Evaluator
from nas.own_weights import OwnLayers, OwnWeights, has_own, load_own, save_own
from nas.quality import Quality
from nas.space import PARTS, Subnet
from nas.supernet import Supernet
from nas.training import TrainingSettings, train

Method = Literal["lora", "nls", "full"]
METHODS: tuple[Method, ...] = get_args(Method)

TUNED_FILE = "tuned.json"
_STARTED_FILE = "started.json"
_ADAPTER_FOLDER = "adapter"
_CHECKPOINTS = "checkpoints"
_VERSION = 1
#: Half of what rounds to one integer, in steps of the grid, and a little less.
_CELL = 0.49


def one_of_methods(name: str) -> Method:
    for method in METHODS:
        if name == method:
            return method
    raise ValueError(f"wanted a method out of {', '.join(METHODS)}, got {name}")


@dataclass(frozen=True)
class TuneSettings:
    """`ranks` are those of an adapter to choose from, largest first; one of them with `lora`.

    `rank_evaluations` subnets of the adapter are evaluated to choose the ranks of `nls`.
    """

    method: Method = "lora"
    ranks: tuple[int, ...] = (32,)
    alpha: float = 64.0
    dropout: float = 0.0
    rank_evaluations: int = 24
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        one_of_methods(self.method)
        if self.method == "lora" and len(self.ranks) != 1:
            raise ValueError(f"lora has one rank, got {list(self.ranks)}; give one --rank, or --method nls")
        if self.method == "nls" and len(self.ranks) < 2:
            raise ValueError(f"nls chooses among ranks, got {list(self.ranks)}; give --rank several times")
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

    @property
    def title(self) -> str:
        """For people."""
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
    begun = _begin(supernet, subnet, windows, settings, folder)
    if (folder / TUNED_FILE).exists():
        tuned = adopt_tuned(supernet, folder)
        if tuned.subnet != subnet:
            raise ValueError(f"wanted subnet {subnet.id} tuned in {folder}, got {tuned.subnet.id}; name another folder")
        return tuned
    before = _before(begun, evaluator, subnet)
    student = _student(supernet, subnet)
    grids = {n: q for n, q in supernet.quantized(subnet).items() if n.startswith(f"{supernet.loaded.family.layers}.")}
    paths = [path for group in rank_groups(student, supernet.loaded.family) for path in group]
    by_path = {path: grids[f"{path}.weight"] for path in paths} if grids else {}
    adapter = None
    training = settings.training
    if settings.method == "full":
        _train_projections(student, paths, by_path)
    else:
        adapter = attach(
            student,
            supernet.loaded.family,
            settings.ranks,
            alpha=settings.alpha,
            dropout=settings.dropout,
            grids=by_path,
        )
    supernet.activate_full_model()
    result = train(
        student, supernet.loaded, windows, training, folder / _CHECKPOINTS, adapter=adapter, progress=progress
    )
    ranks: Ranks = ()
    if adapter is not None:
        ranks = adapter.maximal
        if settings.method == "nls":
            ranks = _search_ranks(supernet, subnet, student, evaluator, adapter, settings, paths, by_path, progress)
        adapter.activate(ranks)
        if not grids:
            adapter.save(ranks, folder / _ADAPTER_FOLDER)
    own = _own_layers(supernet, subnet, _trained(student, paths, by_path, adapter))
    supernet.adopt(subnet, own)
    tuned = Tuned(
        subnet,
        supernet.loaded.fingerprint,
        settings,
        before,
        evaluator.evaluate(subnet),
        result.steps,
        result.steps * training.batch * training.accumulation * windows.shape[1],
        result.seconds,
        {} if adapter is None else adapter.ranks_by_path(ranks),
    )
    save_own(folder, own)
    _write_json(folder / TUNED_FILE, {"version": _VERSION, **_fields(tuned)})
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
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
        before, after = Quality(**fields.pop("before")), Quality(**fields.pop("after"))
        return Tuned(subnet=subnet, settings=TuneSettings(**settings), before=before, after=after, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"wanted a folder that nas tune wrote whole in {folder}, got: {error}") from error


def _fields(tuned: Tuned) -> dict[str, Any]:
    return {**asdict(tuned), "subnet": json.loads(tuned.subnet.to_json()), "ranks": dict(tuned.ranks)}


def _begin(supernet: Supernet, subnet: Subnet, windows: torch.Tensor, settings: TuneSettings, folder: Path) -> Path:
    """Note what `folder` is for, or see that it is for this; returns the note's file."""
    text = json.dumps(asdict(settings), sort_keys=True)
    key = f"{_VERSION} {supernet.prepared_from} {statistics_key(supernet.loaded, windows)} {subnet.to_json()} {text}"
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
    _write_json(started, {"digest": digest})
    return started


def _before(started: Path, evaluator: Evaluator, subnet: Subnet) -> Quality:
    """Quality before tuning; the first answer is kept, as a run that goes on has the weights that it began with."""
    fields = json.loads(started.read_text())
    if "before" not in fields:
        fields["before"] = asdict(evaluator.evaluate(subnet))
        _write_json(started, fields)
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


def _train_projections(student: Any, paths: list[str], grids: Mapping[str, QuantizedWeight]) -> None:
    for path in paths:
        linear = student.get_submodule(path)
        if path in grids:
            student.set_submodule(path, linear := GridLinear(linear, grids[path]))
        linear.weight.requires_grad_(True)


def _trained(
    student: Any, paths: list[str], grids: Mapping[str, QuantizedWeight], adapter: SuperAdapter | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor | QuantizedWeight]]:
    """Weights by path: exact, and as shipped."""
    weights: dict[str, tuple[torch.Tensor, torch.Tensor | QuantizedWeight]] = {}
    for path in paths:
        exact = student.get_submodule(path).weight.detach() if adapter is None else adapter.layers[path].merged_weight()
        grid = grids.get(path)
        weights[path] = (exact, exact if grid is None else quantize_to(exact, grid.scales, grid.bits))
    return weights


def _own_layers(
    supernet: Supernet, subnet: Subnet, trained: Mapping[str, tuple[torch.Tensor, torch.Tensor | QuantizedWeight]]
) -> OwnLayers:
    """What tuning did not touch, biases and norms over heads, stays the subnet's."""
    own: OwnLayers = [{} for _ in subnet.layers]
    for index, path in supernet.extracted_layers(subnet).items():
        shared = _shared(supernet, subnet, index)
        for part in PARTS:
            weights = OwnWeights({}, {})
            for name, tensor in shared.items():
                if name.partition(".")[0] != supernet.part_name(part):
                    continue
                projection = trained.get(f"{path}.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
                exact, rounded = projection or (tensor, tensor)
                weights.exact[name] = exact
                weights.rounded[name] = fake_quantize(exact, 16) if subnet.bits == 16 and exact.dim() == 2 else rounded
            if weights.exact:
                own[index][part] = weights
    return own


def _shared(supernet: Supernet, subnet: Subnet, index: int) -> dict[str, torch.Tensor]:
    """Weights of a layer's parts before tuning, without the norms in front of them, which all subnets share."""
    norms = (supernet.loaded.family.attention_norm, supernet.loaded.family.mlp_norm)
    weights = supernet.layer_weights(subnet, index)
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in norms}


def _search_ranks(
    supernet: Supernet,
    subnet: Subnet,
    student: Any,
    evaluator: Evaluator,
    adapter: SuperAdapter,
    settings: TuneSettings,
    paths: list[str],
    grids: Mapping[str, QuantizedWeight],
    progress: Progress,
) -> Ranks:
    """Those of the least KL that hill climbing finds, as they would be shipped."""
    tried = 0

    def kl(ranks: Ranks) -> float:
        nonlocal tried
        adapter.activate(ranks)
        supernet.adopt(subnet, _own_layers(supernet, subnet, _trained(student, paths, grids, adapter)))
        found = evaluator.evaluate(subnet).kl
        tried += 1
        progress(tried, settings.rank_evaluations, f"ranks with {found:.3f} nats")
        return found

    found, _ = hill_climb(adapter, kl, settings.rank_evaluations, settings.training.seed)
    return found


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(fields, indent=1) + "\n")
    partial.replace(file)
