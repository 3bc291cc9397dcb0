"""One super-adapter under all subnets: each uses the rows and columns of it that it keeps of the model.

Trained with random subnets (and random ranks, which makes it LoNAS, Munoz et al., LREC-COLING 2024), it shifts the
weights that they share: a supernet fine-tuned once, then searched per task (LLaMA-NAS, arXiv 2405.18377). Here subnets
are prefixes of keep-orders with least-squares weights, not of the channels' own order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from nas.adapters.elastic import Ranks, Sampling, SuperAdapter
from nas.subnet import PARTS, Subnet
from nas.supernet import Supernet

#: Of one layer, by name of the weight within it.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class SharedAdapter:
    """Over a prepared supernet that has a model of its own: its activation is part of every pass of training."""

    def __init__(self, supernet: Supernet, adapter: SuperAdapter, subnets: Sequence[Subnet]) -> None:
        """`adapter` is attached to `supernet.model`; `subnets`, at 32 bits, are those to train with."""
        self.supernet = supernet
        self.adapter = adapter
        self.subnets = subnets

    @property
    def model(self) -> Any:
        return self.adapter.model

    def passes(self, rng: np.random.Generator, sampling: Sampling) -> list[Callable[[], None]]:
        """The full model and a random one of the subnets; ranks as `sampling` says, anew for each."""
        sampled = self.subnets[int(rng.integers(len(self.subnets)))]
        found: list[Callable[[], None]] = []
        for subnet in (self.supernet.space.full(32), sampled):
            ranks = self.adapter.sample(rng) if sampling == "random" else self.adapter.active
            found.append(partial(self.activate, subnet, ranks))
        return found

    def activate(self, subnet: Subnet, ranks: Ranks) -> None:
        """Make the model compute `subnet` with what it keeps of the adapters."""
        self.supernet.activate(subnet)
        self.adapter.activate(ranks)
        path = self.supernet.loaded.family.layers
        for index, choice in enumerate(subnet.layers):
            for part in PARTS:
                size, full = choice.size(part), self.supernet.full_size(part)
                for name in self.supernet.projections(part):
                    layer = self.adapter.layers[f"{path}.{index}.{name}"]
                    layer.rows = layer.columns = None
                    if size and size != full:
                        reads_kept = name == self.supernet.output_name(part)
                        A, B = layer.matrices()
                        kept = self.supernet.kept_indices(index, part, size, name)
                        if reads_kept:
                            layer.columns = kept.to(A.device)
                        else:
                            layer.rows = kept.to(B.device)

    def factors(self, ranks: Ranks) -> list[Factors]:
        """A [r, in] and s B [out, r] of the full maps, by layer and name within it."""
        self.activate(self.supernet.space.full(32), ranks)
        path = self.supernet.loaded.family.layers
        found: list[Factors] = []
        for index in range(self.supernet.space.depth):
            found.append({})
            for name in (name for part in PARTS for name in self.supernet.projections(part)):
                layer = self.adapter.layers[f"{path}.{index}.{name}"]
                A, B = layer.factors()
                found[index][f"{name}.weight"] = (A.detach().clone(), B.detach() * layer.scale)
        return found


def deltas(factors: Sequence[Factors]) -> list[dict[str, torch.Tensor]]:
    """Their products [out, in]: what `Supernet.shift` takes."""
    return [{name: B @ A for name, (A, B) in layer.items()} for layer in factors]
