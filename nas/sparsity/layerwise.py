"""Pruning a whole decoder, layer by layer: each layer reads what the pruned ones before it give.

As Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) do it: the moments of what all projections of a layer read
are gathered with that layer still dense, then all are pruned, then the layer runs again for the next one's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from hw_profiles.profile import Progress
from nas.arithmetic import computing, fast_dtype
from nas.calibration import second_moments
from nas.families import Family, LoadedModel
from nas.sparsity.masks import Pattern, check_sparsity, sparsegpt, wanda

PruningMethod = Literal["wanda", "sparsegpt"]
_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def prune(
    model: Any,
    family: Family,
    windows: torch.Tensor,
    sparsity: float | Sequence[float],
    *,
    method: PruningMethod = "wanda",
    pattern: Pattern | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, torch.Tensor]:
    """Prune all projections of `model`'s layers in place, on token windows [N, T]; masks by path in the model.

    `model` is a decoder of `family` or what `Supernet.extract` makes of one: parts that a layer lacks are left out.
    Weights are overwritten, also where others share their memory, as a Supernet over the same model does. `sparsity` is
    for all layers or one for each; with a pattern N:M it must be 1 - N / M. What `masks` of an earlier pruning leaves
    out stays zero and counts.

    Raises ValueError, before anything is changed, where arguments do not fit the model or each other.
    """
    decoder = LoadedModel(model, None, "", "", family)
    layers = decoder.layers
    sparsities = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(layers)
    masks = masks or {}
    _check(windows, len(layers), sparsities, method)
    linears = [_linears(layer, family, f"{family.layers}.{index}") for index, layer in enumerate(layers)]
    for of_layer, wanted in zip(linears, sparsities, strict=True):
        for linear in of_layer.values():
            check_sparsity(wanted, pattern, linear.in_features)
    _check_masks(masks, {path: linear for of_layer in linears for path, linear in of_layer.items()})
    batches = embedded(decoder, windows)
    pruned: dict[str, torch.Tensor] = {}
    for index, of_layer in enumerate(linears):
        progress(index, len(layers), f"pruning layer {index}")
        readers = _readers(family, f"{family.layers}.{index}")
        H = _moments(decoder, index, {readers[path]: of_layer[readers[path]] for path in of_layer}, batches)
        for path, linear in of_layer.items():
            weight, known = linear.weight, masks.get(path)
            if method == "sparsegpt":
                new, pruned[path] = sparsegpt(weight, H[readers[path]], sparsities[index], pattern, mask=known)
            else:
                pruned[path] = wanda(weight, H[readers[path]], sparsities[index], pattern, mask=known)
                new = weight * pruned[path]
            weight.copy_(new)
        batches = run(decoder, index, batches)
    return pruned


def embedded(decoder: LoadedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """The states [n, T, hidden] that enter layer 0, in batches."""
    return [decoder.embed(batch) for batch in torch.split(windows, max(1, _TOKENS_AT_ONCE // windows.shape[1]))]


def run(decoder: LoadedModel, index: int, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The states that leave layer `index` as it is now."""
    with computing(fast_dtype()):
        return [decoder.run_layer(index, batch) for batch in batches]


def _readers(family: Family, layer: str) -> dict[str, str]:
    """For each projection of the layer at path `layer` the first of those that read the same input."""
    return {f"{layer}.{name}": f"{layer}.{group[0]}" for group in family.read_together for name in group}


def _linears(layer: nn.Module, family: Family, path: str) -> dict[str, nn.Linear]:
    """The projections that the layer at `path` has, by path in the model; ValueError where one is wrapped."""
    modules = {f"{path}.{name}": module for name, module in layer.named_modules()}
    found = {}
    for projection in _readers(family, path):
        module = modules.get(projection)
        if isinstance(module, nn.Linear):
            found[projection] = module
        elif module is not None:
            kind = type(module).__name__
            raise ValueError(f"wanted a plain linear map at {projection}, got {kind}; merge its adapter first")
    return found


def _moments(
    decoder: LoadedModel, index: int, linears: Mapping[str, nn.Linear], batches: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """H [in, in] of what each of `linears`, all of layer `index`, reads."""
    sums: dict[str, torch.Tensor] = {}

    def summing(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            H = second_moments(x)
            sums[path] = sums[path] + H if path in sums else H

        return hook

    hooks = [linear.register_forward_pre_hook(summing(path)) for path, linear in linears.items()]
    try:
        run(decoder, index, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _check(windows: torch.Tensor, layers: int, sparsities: Sequence[float], method: str) -> None:
    if method not in get_args(PruningMethod):
        raise ValueError(f"wanted a method out of {', '.join(get_args(PruningMethod))}, got {method!r}; choose one")
    if windows.dim() != 2 or not windows.numel():
        raise ValueError(f"wanted token windows [N, T], got {tuple(windows.shape)}; give one window at least")
    if len(sparsities) != layers:
        raise ValueError(f"wanted a sparsity for each of {layers} layers, got {len(sparsities)}; or give one for all")


def _check_masks(masks: Mapping[str, torch.Tensor], linears: Mapping[str, nn.Linear]) -> None:
    for path, mask in masks.items():
        if path not in linears:
            raise ValueError(f"wanted masks of this model's projections, got one for {path}; leave it out")
        wanted = linears[path].weight.shape
        if mask.shape != wanted or mask.dtype != torch.bool:
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"wanted a bool mask {tuple(wanted)} for {path}, got {got}; give this model's own")
