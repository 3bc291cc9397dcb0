"""Tuning all subnets of a supernet at once, and the folder that shifts a supernet to what came of it."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hw_profiles.profile import Progress
from nas.adapters.elastic import attach
from nas.adapters.shared import Factors, SharedAdapter, deltas
from nas.calibration import load_layer, save_layer
from nas.evaluate import Evaluator
from nas.subnet import Subnet
from nas.supernet import Supernet
from nas.training import train
from nas.tuned import CHECKPOINTS, TuneSettings, begin, write_json

SHIFT_FILE = "supernet.json"
_VERSION = 1
#: Subnets whose KL is told, before and after: from the pool, evenly over its order.
_JUDGED = 6


@dataclass(frozen=True)
class TunedSupernet:
    """`kl` of some subnets, by id, before and after; `digest` of the weights names the shift."""

    fingerprint: str
    prepared_from: str
    digest: str
    kl: dict[str, tuple[float, float]]
    steps: int
    tokens: int
    seconds: float


def tune_supernet(
    supernet: Supernet,
    subnets: Sequence[Subnet],
    windows: torch.Tensor,
    evaluator: Evaluator,
    settings: TuneSettings,
    folder: Path,
    progress: Progress = lambda done, total, what: None,
) -> TunedSupernet:
    """Train one adapter under the full model and `subnets`, drawn at random, and shift `supernet` by it.

    Token windows [N, T]. With method `nls` ranks are drawn at each step, too, and of the largest, middle and smallest
    ranks those with the least KL on the judged subnets are taken. Goes on, or returns what is there, as
    `nas.recovery.tune`.
    """
    if settings.method not in ("lora", "nls") or settings.sparsity or settings.separate:
        raise ValueError(f"all subnets together are tuned by lora or nls without sparsity, got {settings.method}")
    if settings.training.sampling == "sandwich":
        raise ValueError("all subnets together are tuned at random ranks or the largest, got sandwich; leave it out")
    if settings.rank_search == "evolution":
        raise ValueError("of all subnets the largest, middle or smallest ranks are taken, got evolution; leave it out")
    if not subnets:
        raise ValueError("wanted subnets to tune, got none; search first")
    pool = list(dict.fromkeys(subnet.at_bits(32) for subnet in subnets))
    said = json.dumps([asdict(settings), [subnet.id for subnet in pool]], sort_keys=True)
    begin(folder, supernet, windows, "supernet", said)
    if (folder / SHIFT_FILE).exists():
        return shift_by(supernet, folder)
    judged = pool[:: max(1, len(pool) // _JUDGED)][:_JUDGED]
    before = [evaluator.evaluate(subnet).kl for subnet in judged]
    supernet.activate_full_model()
    # a model of its own beside the teacher; what was prepared is shared
    other = supernet.over(copy.deepcopy(supernet.model))
    adapter = attach(
        other.model, supernet.loaded.family, settings.ranks, alpha=settings.alpha, dropout=settings.dropout,
        seed=settings.training.seed,
    )  # fmt: skip
    shared = SharedAdapter(other, adapter, pool)
    result = train(
        other.model, supernet.loaded, windows, settings.training, folder / CHECKPOINTS, adapter=shared,
        progress=progress,
    )  # fmt: skip
    choices = [adapter.maximal, adapter.heuristic, adapter.minimal] if settings.method == "nls" else [adapter.maximal]
    found = []
    for ranks in dict.fromkeys(choices):
        factors = shared.factors(ranks)
        with supernet.shifted(deltas(factors), "a trial"):
            found.append((factors, [evaluator.evaluate(subnet).kl for subnet in judged]))
    factors, after = min(found, key=lambda pair: sum(pair[1]))
    for index, layer in enumerate(factors):
        tensors = {f"{name}|{which}": t for name, pair in layer.items() for which, t in zip("AB", pair, strict=True)}
        save_layer(folder, index, {name: tensor.contiguous() for name, tensor in tensors.items()})
    tuned = TunedSupernet(
        supernet.loaded.fingerprint,
        supernet.prepared_from,
        _digest(folder, supernet.space.depth),
        {subnet.id: (b, a) for subnet, b, a in zip(judged, before, after, strict=True)},
        result.steps,
        result.steps * settings.training.batch * settings.training.accumulation * windows.shape[1],
        result.seconds,
    )
    write_json(folder / SHIFT_FILE, {"version": _VERSION, **asdict(tuned)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return shift_by(supernet, folder)


def shift_by(supernet: Supernet, folder: Path) -> TunedSupernet:
    """Shift a prepared supernet by what `folder` holds; ValueError where that is damaged or of another supernet."""
    tuned = read_tuned_supernet(folder)
    if (tuned.fingerprint, tuned.prepared_from) != (supernet.loaded.fingerprint, supernet.prepared_from):
        raise ValueError(f"wanted a supernet tuned from this model, space and text in {folder}, got one from others")
    wanted = {name: t.shape for name, t in supernet.full_maps(0).items()}
    factors: list[Factors] = []
    for index in range(supernet.space.depth):
        tensors = load_layer(folder, index, {f"{name}|{which}" for name in wanted for which in "AB"})
        factors.append({name: (tensors[f"{name}|A"], tensors[f"{name}|B"]) for name in wanted})
        for name, (A, B) in factors[index].items():
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or (B.shape[0], A.shape[1]) != wanted[name]:
                raise ValueError(f"wanted the sizes of {name} in layer {index} of {folder}, got others; tune again")
    if _digest(folder, supernet.space.depth) != tuned.digest:
        raise ValueError(f"wanted the weights that {SHIFT_FILE} names in {folder}, got others; tune again")
    supernet.shift(deltas(factors), tuned.digest)
    return tuned


def read_tuned_supernet(folder: Path) -> TunedSupernet:
    """What `folder` says of itself; ValueError where it is not what `tune_supernet` wrote."""
    try:
        fields = json.loads((folder / SHIFT_FILE).read_text())
        if fields.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        fields["kl"] = {name: (float(before), float(after)) for name, (before, after) in fields["kl"].items()}
        return TunedSupernet(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"wanted a supernet that nas tune wrote whole in {folder}, got: {error}") from error


def _digest(folder: Path, depth: int) -> str:
    digest = hashlib.sha256()
    for index in range(depth):
        digest.update((folder / f"layer_{index:03d}.safetensors").read_bytes())
    return digest.hexdigest()[:16]
