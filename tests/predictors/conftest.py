"""SmolLM2-135M's dimensions with random blocks, and a made-up device that charges for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hw_profiles.shapes import BlockShape, ModelShape

GROUPS = (0, 1, 2, 3)
WIDTHS = (0, 96, 192, 384, 768, 1152, 1536)
LAYERS = 30

Sampler = Callable[..., list[ModelShape]]
Device = Callable[..., np.ndarray]


def smollm2(blocks: list[tuple[int, int]]) -> ModelShape:
    """Blocks as (KV groups, intermediate size), three query heads a group."""
    return ModelShape(576, 64, 49152, True, tuple(BlockShape(3 * groups, groups, width) for groups, width in blocks))


@pytest.fixture
def full() -> ModelShape:
    return smollm2([(3, 1536)] * LAYERS)


@pytest.fixture
def sample_shapes() -> Sampler:
    def sample(count: int, seed: int) -> list[ModelShape]:
        """Each model favours some choices over others, so that sums over layers spread widely."""
        generator = np.random.default_rng(seed)
        models = []
        for _ in range(count):
            groups = generator.choice(GROUPS, LAYERS, p=generator.dirichlet(np.ones(len(GROUPS))))
            widths = generator.choice(WIDTHS, LAYERS, p=generator.dirichlet(np.ones(len(WIDTHS))))
            models.append(smollm2(list(zip(groups.tolist(), widths.tolist(), strict=True))))
        return models

    return sample


@pytest.fixture
def device() -> Device:
    def latency_ms(
        shapes: list[ModelShape], seed: int = 0, noise: float = 0.01, cache_penalty: float = 0.0
    ) -> np.ndarray:
        """Costs per layer, group and width in steps of 64; `cache_penalty` slows models of many KV groups."""
        total = np.array(
            [
                2.0
                + sum(
                    0.05 * (b.num_attention_heads > 0)
                    + 0.03 * b.num_key_value_heads
                    + 0.04 * (b.intermediate_size > 0)
                    + 2e-4 * 64 * -(-b.intermediate_size // 64)
                    for b in shape.blocks
                )
                for shape in shapes
            ]
        )
        beyond = np.array([sum(block.num_key_value_heads for block in shape.blocks) > 45 for shape in shapes])
        measured = total * (1 + cache_penalty * beyond)
        return measured * np.exp(noise * np.random.default_rng(seed).standard_normal(len(shapes)))

    return latency_ms
