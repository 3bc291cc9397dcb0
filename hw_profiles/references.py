"""The graphs that all others are timed beside, and what a graph takes when they are as fast as in their profile.

One reference tells how fast the machine is, and not for whom: when a neighbour takes the shared cache, a decoder that
lived in it loses a third and a small one, which the core's own cache holds, nothing. Of eight int8 subnets of SmolLM2,
loaded and decoded fourteen times within eight minutes in OpenVINO, the ratio to the full model differed by 6.7 %
(standard deviation) from one time to the next; told by three references as here, by 3.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import geometric_mean

import numpy as np

from hw_profiles.shapes import BlockShape, ModelShape

#: Of the full model's layers, those that each reference keeps.
DEPTHS = (1.0, 0.5, 0.25)
#: Of how unevenly the references' speeds have changed, noise is this many times what is true of graphs between them.
UNEVEN_NOISE = 0.3
_SKIPPED = BlockShape(0, 0, 0)


def reference_shapes(full: ModelShape) -> tuple[ModelShape, ...]:
    """The full model, and the same with half and a quarter of its layers, evenly spread, as far as these differ."""
    layers = len(full.blocks)
    shapes = []
    for depth in DEPTHS:
        count = max(1, round(layers * depth))
        kept = {(2 * i + 1) * layers // (2 * count) for i in range(count)}
        shape = replace(full, blocks=tuple(b if i in kept else _SKIPPED for i, b in enumerate(full.blocks)))
        if shape.attention_blocks:  # runtimes expect a KV cache
            shapes.append(shape)
    return tuple(dict.fromkeys(shapes))


def at_profile_speed(ratio: float, references_ms: Mapping[str, float], profile_ms: Mapping[str, float]) -> float:
    """Milliseconds, on a machine where the references take `profile_ms`, of a graph timed beside `references_ms`.

    `ratio` is to the geometric mean of the latter. By how much the machine has become faster or slower is interpolated
    between the references that both know, in logarithms of time and size, their differences being drawn together
    (UNEVEN_NOISE); graphs outside of their range count as its nearest end.
    """
    own_ms = ratio * geometric_mean(references_ms.values())
    known = sorted((name for name in references_ms if name in profile_ms), key=references_ms.__getitem__)
    if not known:
        return own_ms
    size = np.log([references_ms[name] for name in known])
    change = np.log([profile_ms[name] for name in known]) - size
    change = change.mean() + (change - change.mean()) / (1 + UNEVEN_NOISE)
    return own_ms * math.exp(float(np.interp(math.log(own_ms), size, change)))
