"""How a subnet is to be tuned, what came of it, and the folder that holds both.

Methods:

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

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from nas.adapters.rank_search import RankSearch
from nas.calibration import statistics_key
from nas.own_weights import OwnLayers, has_own, load_own, save_own
from nas.quality import Quality
from nas.sparsity.layerwise import PruningMethod
from nas.sparsity.masks import check_sparsity, parse_pattern
from nas.subnet import PARTS, Subnet
from nas.supernet import Supernet
from nas.training import TrainingSettings

Method = Literal["lora", "nls", "losa", "full", "prune"]
METHODS: tuple[Method, ...] = get_args(Method)

TUNED_FILE = "tuned.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS = "checkpoints"
_STARTED_FILE = "started.json"
_VERSION = 1


def one_of_methods(name: str) -> Method:
    for method in METHODS:
        if name == method:
            return method
    raise ValueError(f"wanted a method out of {', '.join(METHODS)}, got {name}")


@dataclass(frozen=True)
class TuneSettings:
    """`ranks` are those of an adapter to choose from, largest first; one of them with `lora`, none with `losa`.

    `rank_evaluations` choices are evaluated by `rank_search` to find the ranks of `nls`. `sparsity` is the share of the
    projections' weights that become 0, by `pruning`, in an N:M `pattern` or anywhere; `losa` gets there in `rounds`.
    """

    method: Method = "lora"
    ranks: tuple[int, ...] = (32,)
    alpha: float = 64.0
    dropout: float = 0.0
    rank_search: RankSearch = "hill-climb"
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
        if list(self.ranks) != sorted(set(self.ranks), reverse=True) or min(self.ranks, default=1) < 1:
            raise ValueError(f"wanted ranks that differ, above 0 and largest first, got {list(self.ranks)}")
        if self.training.sampling == "sandwich" and self.method != "nls":
            raise ValueError(f"wanted nls, which has ranks to sandwich, got {self.method}; leave the sandwich out")
        for what, name, known in (("pruning", self.pruning, PruningMethod), ("ranks", self.rank_search, RankSearch)):
            if name not in get_args(known):
                raise ValueError(f"wanted {what} by {' or '.join(get_args(known))}, got {name}")
        if self.rank_search != "hill-climb" and self.method != "nls":
            raise ValueError(f"wanted nls, whose ranks are searched, got {self.method}; leave the rank search out")
        if not 0 <= self.sparsity < 1 or self.rounds < 1:
            raise ValueError(f"wanted a sparsity from 0 to below 1 and a round at least, got {self.sparsity:g}")
        pattern = parse_pattern(self.pattern)
        if pattern is not None and self.method != "losa":
            check_sparsity(self.sparsity, pattern, inputs=pattern[1])
        if pattern is not None and self.method == "losa":
            raise ValueError(f"losa prunes anywhere, got the pattern {self.pattern}; leave it out, or take lora")
        if self.method in ("losa", "prune") and not self.sparsity:
            raise ValueError(f"{self.method} makes weights sparse, got no sparsity; give one, such as 0.5")
        if self.method == "full" and self.sparsity:
            raise ValueError("full tunes all weights, got a sparsity; take lora or nls for that")
        if self.separate and self.method not in ("lora", "nls"):
            raise ValueError(f"{self.method} leaves no adapter beside the weights; take lora or nls for a separate one")
        if not 0 <= self.dropout < 1 or not 0 < self.alpha < math.inf or self.rank_evaluations < 1:
            raise ValueError(
                f"wanted alpha above 0, a dropout from 0 to below 1 and an evaluation at least, got {self.alpha:g}, "
                f"{self.dropout:g} and {self.rank_evaluations}"
            )


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
        towards = {"kl": "against the full model", "text": "on text", "both": "against the full model and on text"}
        aim = towards[self.settings.training.loss]
        return f"tuned by {self.settings.method} for {self.steps} steps, {self.tokens:,} tokens, {aim}"


def begin(folder: Path, supernet: Supernet, windows: torch.Tensor, *others: str) -> Path:
    """Note what `folder` is for, or see that it is for this; returns the note's file."""
    key = " ".join([str(_VERSION), supernet.prepared_from, statistics_key(supernet.loaded, windows), *others])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    started = folder / _STARTED_FILE
    if started.exists():
        if read_started(started)["digest"] != digest:
            raise ValueError(
                f"{folder} holds what was tuned with another subnet, text or settings; name another, or delete it"
            )
        return started
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"wanted an empty folder to tune in, got {folder} with other files; name another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, {"digest": digest})
    return started


def read_started(started: Path) -> dict[str, Any]:
    """What `begin` noted, and whoever tunes since; ValueError for a file that is another's, or damaged."""
    try:
        fields = json.loads(started.read_text())
        fields["digest"]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"wanted what nas tune noted in {started}, got something else; name another folder") from error
    return fields  # type: ignore[no-any-return]


def keep(tuned: Tuned, own: OwnLayers, folder: Path) -> None:
    """Write what a finished run made, and drop what it no longer needs to go on."""
    save_own(folder, own)
    write_json(folder / TUNED_FILE, {"version": _VERSION, **_fields(tuned)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def adopt_tuned(supernet: Supernet, folder: Path) -> Tuned:
    """Give the subnet that was tuned in `folder` its weights there; ValueError where they do not fit this model."""
    tuned = read_tuned(folder)
    if tuned.fingerprint != supernet.loaded.fingerprint:
        raise ValueError(f"wanted a subnet of {supernet.loaded.name} in {folder}, got one of another model")
    supernet.space.validate(tuned.subnet)
    depth = supernet.space.depth
    if not has_own(folder, depth):
        raise ValueError(f"wanted the weights of {depth} layers in {folder}, got fewer or damaged ones; tune again")
    own = load_own(folder, tuned.subnet)
    for index, parts in enumerate(own):
        wanted = {name: tensor.shape for name, tensor in part_weights(supernet, tuned.subnet, index).items()}
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


def part_weights(supernet: Supernet, subnet: Subnet, index: int) -> dict[str, torch.Tensor]:
    """Weights of a layer's parts before tuning, without the norms around them, which all subnets share."""
    norms = {name for part in PARTS for name in supernet.loaded.family.norms(part)}
    weights = supernet.layer_weights(subnet, index)
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in norms}


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(fields, indent=1) + "\n")
    partial.replace(file)
