"""Published ways to make a decoder smaller without training, each written from its paper, as weights of our supernet.

All of them remove a share of the blocks' parameters. Channels are those of the MLPs (rows of gate and up, columns of
down), groups are KV groups with their query heads. Statistics are those of one pass over the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.arithmetic import computing, fast_dtype
from nas.calibration import Statistics, collect
from nas.importance import keep_order
from nas.own_weights import OwnWeights
from nas.reformation import reform
from nas.subnet import PARTS, Part
from nas.supernet import Supernet

#: Weights of one part by name within its layer; empty where the part is skipped. Parts left out stay whole.
Weights = dict[str, torch.Tensor]
Pruned = list[dict[Part, Weights]]

_TOKENS_AT_ONCE = 4096
_CHUNK = 32


@dataclass(frozen=True)
class Observed:
    """Of the full model on calibration text: second moments, means of what o_proj and down_proj read, layers' changes.

    `influence[l]` is ShortGPT's block influence, 1 - mean cosine of a layer's input and output.
    """

    statistics: Statistics
    tokens: int
    means: list[dict[Part, torch.Tensor]]
    influence: list[float]

    def second_moments(self, layer: int, part: Part) -> torch.Tensor:
        found = self.statistics.layer(layer)
        return found.attention_output if part == "attention" else found.mlp_output


@torch.no_grad()
def observe(supernet: Supernet, windows: torch.Tensor, cache_dir: Path) -> Observed:
    """One more pass of token windows [N, T] through the full model beside that of `collect`, with the same products."""
    loaded = supernet.loaded
    supernet.activate(supernet.space.full(32))
    statistics = collect(loaded, windows, cache_dir)
    batches = [loaded.embed(b) for b in torch.split(windows, max(1, _TOKENS_AT_ONCE // windows.shape[1]))]
    means: list[dict[Part, torch.Tensor]] = []
    influence = []
    for index in range(supernet.space.depth):
        sums: dict[Part, torch.Tensor] = {}
        hooks = [_output(supernet, index, part).register_forward_pre_hook(_summing(sums, part)) for part in PARTS]
        with computing(fast_dtype()):
            after = [loaded.run_layer(index, batch) for batch in batches]
        for hook in hooks:
            hook.remove()
        means.append({part: total / windows.numel() for part, total in sums.items()})
        cosines = [nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(batches, after, strict=True)]
        influence.append(1 - float(torch.stack(cosines).mean()))
        batches = after
    return Observed(statistics, windows.numel(), means, influence)


def install(supernet: Supernet, pruned: Pruned) -> None:
    """Make the supernet's model compute with these weights; `restore` before anything else."""
    supernet.activate(supernet.space.full(32))
    for layer, parts in enumerate(pruned):
        for part, weights in parts.items():
            if weights:
                supernet.install(layer, part, OwnWeights(weights, dict(weights)))
            else:
                supernet.activate_part(layer, part, 0, "fp32")


def restore(supernet: Supernet, pruned: Pruned) -> None:
    """The full model again, without the biases that FLAP adds."""
    supernet.activate(supernet.space.full(32))
    for layer, parts in enumerate(pruned):
        for part, weights in parts.items():
            name = f"{supernet.output_name(part)}.bias"
            if name in weights and name not in supernet.part_weights(layer, part, supernet.full_size(part)):
                _output(supernet, layer, part).bias = None


def kept_parameters(supernet: Supernet, pruned: Pruned) -> int:
    """Of the blocks' matrices, which is what removed shares count."""
    full = supernet.full_size
    total = 0
    for layer, parts in enumerate(pruned):
        for part in PARTS:
            weights = parts.get(part, supernet.part_weights(layer, part, full(part)))
            total += sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)
    return total


Scores = Callable[[Supernet, Observed, int], torch.Tensor]


def magnitude(supernet: Supernet, observed: Observed, layer: int) -> torch.Tensor:
    """Of each channel the norm of all its weights, [channels]."""
    weights = supernet.part_weights(layer, "mlp", supernet.full_size("mlp"))
    down = f"{supernet.output_name('mlp')}.weight"
    squares = [t.square().sum(0 if name == down else 1) for name, t in weights.items() if t.dim() == 2]
    return torch.stack(squares).sum(0).sqrt()


def wanda(supernet: Supernet, observed: Observed, layer: int) -> torch.Tensor:
    """|W| |x| of Wanda (Sun et al. 2023), summed over what a channel of down_proj feeds, [channels]."""
    H = observed.second_moments(layer, "mlp")
    return _output_weight(supernet, layer, "mlp").abs().sum(0) * H.diagonal().clamp_min(0).sqrt()


def uniform(supernet: Supernet, observed: Observed, removed: float, scores: Scores, least_squares: bool) -> Pruned:
    """The same number of channels from every MLP, those of the lowest scores; attention stays whole."""
    kept = _uniform_channels(supernet, removed)
    return [
        {"mlp": _cut(supernet, observed, layer, "mlp", order[:kept], least_squares)}
        for layer, order in enumerate(scores(supernet, observed, i).argsort(descending=True) for i in _layers(supernet))
    ]


def surgeon(supernet: Supernet, observed: Observed, layer: int) -> torch.Tensor:
    """Ranks by the optimal brain surgeon's backward elimination, the most important channel highest, [channels]."""
    order = keep_order(
        _output_weight(supernet, layer, "mlp"), observed.second_moments(layer, "mlp"), group=1, chunk=_CHUNK
    )
    ranks = torch.empty(len(order))
    ranks[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return ranks


def flap(supernet: Supernet, observed: Observed, removed: float) -> Pruned:
    """FLAP (An et al. 2023, arXiv 2312.11983): fluctuation scores, standardised in each part, pruned over all layers.

    What a removed input carried on average becomes a bias. Heads go by KV group, each weighed with its parameters.
    """
    scores: dict[tuple[int, Part], torch.Tensor] = {}  # the larger, the longer kept
    for layer in _layers(supernet):
        for part in PARTS:
            mean = observed.means[layer][part]
            variance = observed.second_moments(layer, part).diagonal() / observed.tokens - mean.square()
            fluctuation = variance.clamp_min(0) * _output_weight(supernet, layer, part).square().sum(0)
            standard = (fluctuation - fluctuation.mean()) / fluctuation.std()
            scores[layer, part] = standard.view(supernet.full_size(part), -1).mean(1)
    cost = {part: _parameters(supernet, part) // supernet.full_size(part) for part in PARTS}
    budget = (1 - removed) * sum(_parameters(supernet, part) for part in PARTS) * supernet.space.depth
    units = sorted(
        ((float(score), layer, part, unit) for (layer, part), of in scores.items() for unit, score in enumerate(of)),
        reverse=True,
    )
    kept: dict[tuple[int, Part], list[int]] = {key: [] for key in scores}
    for _, layer, part, unit in units:
        if budget < cost[part]:
            break
        budget -= cost[part]
        kept[layer, part].append(unit)
    pruned: Pruned = []
    for layer in _layers(supernet):
        pruned.append({})
        for part in PARTS:
            order = torch.tensor(sorted(kept[layer, part]), dtype=torch.int64)
            weights = _cut(supernet, observed, layer, part, order, False) if len(order) else {}
            if weights:
                gone = torch.ones(len(observed.means[layer][part]))
                gone[_inputs(supernet, part, order)] = 0
                weights[f"{supernet.output_name(part)}.bias"] = _output_weight(supernet, layer, part) @ (
                    observed.means[layer][part] * gone
                )
            pruned[layer][part] = weights
    return pruned


def shortgpt(supernet: Supernet, observed: Observed, removed: float) -> Pruned:
    """ShortGPT (Men et al. 2024): the layers of least influence are dropped whole."""
    count = round(removed * supernet.space.depth)
    dropped = sorted(_layers(supernet), key=lambda layer: observed.influence[layer])[:count]
    return [{"attention": {}, "mlp": {}} if layer in dropped else {} for layer in _layers(supernet)]


def _cut(
    supernet: Supernet, observed: Observed, layer: int, part: Part, kept: torch.Tensor, least_squares: bool
) -> Weights:
    """The part with the units `kept` alone; with `least_squares` its output map fitted to them."""
    output = f"{supernet.output_name(part)}.weight"
    size = supernet.full_size(part)
    weights: Weights = {}
    for name, tensor in supernet.part_weights(layer, part, size).items():
        if name != output:
            weights[name] = tensor[_inputs(supernet, part, kept, tensor.shape[0] // size)]
            continue
        columns = _inputs(supernet, part, kept)
        if least_squares:
            rest = torch.ones(tensor.shape[1], dtype=torch.bool)
            rest[columns] = False
            order = torch.cat([columns, rest.nonzero().flatten()])
            H = observed.second_moments(layer, part)
            weights[name] = reform(tensor, H, order, [len(columns)])[len(columns)].weight
        else:
            weights[name] = tensor[:, columns]
    return weights


def _inputs(supernet: Supernet, part: Part, kept: torch.Tensor, unit: int | None = None) -> torch.Tensor:
    """Indices of the units' rows, or of the output map's columns."""
    unit = unit or _output_weight(supernet, 0, part).shape[1] // supernet.full_size(part)
    return (kept.unsqueeze(1) * unit + torch.arange(unit)).flatten()


def _uniform_channels(supernet: Supernet, removed: float) -> int:
    mlp = _parameters(supernet, "mlp")
    return round((1 - removed * (mlp + _parameters(supernet, "attention")) / mlp) * supernet.full_size("mlp"))


def _parameters(supernet: Supernet, part: Part) -> int:
    weights = supernet.part_weights(0, part, supernet.full_size(part))
    return sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)


def _layers(supernet: Supernet) -> range:
    return range(supernet.space.depth)


def _output(supernet: Supernet, layer: int, part: Part) -> Any:
    return supernet.loaded.layers[layer].get_submodule(supernet.output_name(part))


def _output_weight(supernet: Supernet, layer: int, part: Part) -> torch.Tensor:
    return supernet.part_weights(layer, part, supernet.full_size(part))[f"{supernet.output_name(part)}.weight"]


def _summing(sums: dict[Part, torch.Tensor], part: Part) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        total = inputs[0].flatten(0, -2).float().sum(0)
        sums[part] = sums[part] + total if part in sums else total

    return hook
