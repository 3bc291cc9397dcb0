"""Supernets of tiny models, and what they compute."""

from __future__ import annotations

from typing import Any

import torch

from nas.families import LoadedModel
from nas.space import SearchSpace
from nas.subnet import Subnet
from nas.supernet import Supernet


def prepared(
    loaded: LoadedModel, windows: torch.Tensor, *, lean: bool = False, query_heads: bool = False, **options: Any
) -> Supernet:
    """With three widths short of full, 0 among them; `options` are those of `Supernet.prepare`."""
    space = SearchSpace.from_config(loaded.config, width_fractions=(0, 0.25, 0.5, 1), query_heads=query_heads)
    supernet = Supernet(loaded, space, lean=lean)
    supernet.prepare(windows, **options)
    return supernet


@torch.no_grad()
def active_logits(supernet: Supernet, windows: torch.Tensor, subnet: Subnet) -> torch.Tensor:
    supernet.activate(subnet)
    logits: torch.Tensor = supernet.model(input_ids=windows).logits
    return logits
