"""The subnets a search may choose from: per layer KV groups, query heads, MLP width, bits of all or part by part."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import Any

import numpy as np
import numpy.typing as npt

from hw_profiles.shapes import (
    BLOCK_BITS,
    NARROW_HEAD_BITS,
    QUANTIZATION_BLOCK_SIZE,
    WIDE_BITS,
    BlockShape,
    ModelShape,
)
from nas.subnet import NARROW_BITS, PARTS, SKIPPED, FewerHeads, LayerChoice, Part, Size, Subnet

#: Thin widths stand beside 0: skipping an MLP is often dear where keeping a sixteenth of it is cheap.
WIDTH_FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
GROUP_FRACTIONS = (0.0, 1 / 4, 1 / 2, 3 / 4, 1.0)
#: Of the query heads of each KV group, where these are a choice.
HEAD_FRACTIONS = (1 / 4, 1 / 2, 3 / 4)


@dataclass(frozen=True)
class SearchSpace:
    """Choices are ascending; the last of each is the full model's own size. Widths are multiples of 32.

    Query heads of each KV group kept are all that the model has, or as many as one of `head_choices`, which are fewer.
    """

    base: ModelShape
    group_choices: tuple[int, ...]
    width_choices: tuple[int, ...]
    bits_choices: tuple[int, ...] = (8, 4)
    #: All layers that a subnet keeps are of one size and the others are skipped whole: the plain architecture.
    homogeneous: bool = False
    #: Each part of a subnet of 4 bits may have 8 instead, and its head 4.
    mixed_bits: bool = False
    head_choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        block = self.base.blocks[0]
        if set(self.base.blocks) != {block}:
            raise ValueError(
                "wanted a model whose layers are all alike, got differing blocks; search its original instead"
            )
        for name, choices, full in (
            ("group_choices", self.group_choices, block.num_key_value_heads),
            ("width_choices", self.width_choices, block.intermediate_size),
        ):
            if list(choices) != sorted(set(choices)) or not choices or choices[0] < 0 or choices[-1] != full:
                raise ValueError(f"wanted {name} ascending from 0 or more to the full {full}, got {choices}")
        heads = self.heads_per_group
        if list(self.head_choices) != sorted({h for h in self.head_choices if 0 < h < heads}):
            raise ValueError(f"wanted head_choices ascending from 1 to less than {heads}, got {self.head_choices}")
        if self.homogeneous and (self.group_choices[0] or self.width_choices[0]):
            raise ValueError("wanted choices from 0 on in a homogeneous space, which skips whole layers")
        ragged = [width for width in self.width_choices if width % QUANTIZATION_BLOCK_SIZE]
        if ragged:
            raise ValueError(f"wanted widths in multiples of {QUANTIZATION_BLOCK_SIZE}, got {ragged}")
        ragged = [groups for groups in self.group_choices[:-1] if groups % (unit := _groups_at_once(self.base))]
        if ragged:
            raise ValueError(
                f"wanted group_choices in multiples of {unit}, whose heads together have a multiple of "
                f"{QUANTIZATION_BLOCK_SIZE} dimensions, got {ragged}"
            )
        if not self.bits_choices or not set(self.bits_choices) <= set(BLOCK_BITS.values()):
            raise ValueError(f"wanted bits_choices out of {sorted(set(BLOCK_BITS.values()))}, got {self.bits_choices}")
        if self.mixed_bits and (self.homogeneous or not {NARROW_BITS, WIDE_BITS} <= set(self.bits_choices)):
            raise ValueError(
                f"wanted mixed_bits with {NARROW_BITS} and {WIDE_BITS} in bits_choices and layers that may differ, got "
                f"{self.bits_choices}{' and alike layers' if self.homogeneous else ''}"
            )

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        group_fractions: Sequence[float] = GROUP_FRACTIONS,
        width_fractions: Sequence[float] = WIDTH_FRACTIONS,
        bits_choices: Sequence[int] = (8, 4),
        homogeneous: bool = False,
        mixed_bits: bool = False,
        query_heads: bool = False,
    ) -> SearchSpace:
        """The space of a Hugging Face decoder config: fractions of its KV heads and of its MLP width, rounded.

        With `query_heads` also of those of each KV group; ValueError where it has one.
        """
        base = model_shape(config)
        block = base.blocks[0]
        unit = _groups_at_once(base)
        groups = {round(block.num_key_value_heads * f / unit) * unit for f in group_fractions if f < 1}
        groups.add(block.num_key_value_heads)
        unit = QUANTIZATION_BLOCK_SIZE
        widths = {round(block.intermediate_size * fraction / unit) * unit for fraction in width_fractions}
        whole = _heads_per_group(base)
        if query_heads and whole == 1:
            raise ValueError("wanted several query heads per KV group to choose from, got one; leave them as they are")
        heads = {round(whole * fraction) for fraction in HEAD_FRACTIONS if query_heads} - {0, whole}
        return cls(
            base,
            tuple(sorted(groups)),
            tuple(sorted(widths)),
            tuple(bits_choices),
            homogeneous,
            mixed_bits,
            tuple(sorted(heads)),
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads of a KV group of the full model."""
        return _heads_per_group(self.base)

    def order_shape(self, part: Part) -> tuple[int, int]:
        """[units, each] of a part's keep-order: channels, or KV groups, told apart by head where some may be kept."""
        if part == "mlp":
            return self.width_choices[-1], 1
        return self.group_choices[-1], self.heads_per_group if self.head_choices else 1

    def sizes(self, part: Part) -> tuple[Size, ...]:
        """Choices for a part, smallest first, the full one last."""
        return self.width_choices if part == "mlp" else self._attention_sizes

    @cached_property
    def _attention_sizes(self) -> tuple[Size, ...]:
        """Of whose fewer heads the output map reads a whole number of quantisation blocks."""
        fewer = (FewerHeads(*found) for found in product(self.group_choices, self.head_choices) if found[0])
        ragged = QUANTIZATION_BLOCK_SIZE // math.gcd(QUANTIZATION_BLOCK_SIZE, self.base.head_dim)
        whole = [size for size in fewer if math.prod(size) % ragged == 0]
        return tuple(sorted([*self.group_choices, *whole], key=self._projected))

    def _projected(self, size: Size) -> tuple[int, int]:
        """Heads of all projections of an attention, and how many of them are KV groups."""
        groups, heads = size if isinstance(size, FewerHeads) else (size, self.heads_per_group)
        return groups * (1 + heads), groups

    def full(self, bits: int = 32) -> Subnet:
        return Subnet((LayerChoice(self.group_choices[-1], self.width_choices[-1]),) * self.depth, bits)

    @property
    def smallest(self) -> Subnet:
        """The least of every choice, bits included."""
        bits, head_bits = self.bits_options[-1] if self.mixed_bits else (min(self.bits_choices), 0)
        attention, mlp = (self.sizes(part)[0] for part in PARTS)
        return Subnet((LayerChoice.of_sizes(attention, mlp),) * self.depth, bits, head_bits=head_bits)

    @property
    def middle(self) -> Subnet:
        """The middle of every choice: how the space is spread. With mixed bits attention has 8, the MLPs 4."""
        attention, mlp = (choices[len(choices) // 2] for choices in map(self.sizes, PARTS))
        layer = LayerChoice.of_sizes(attention, mlp)
        if self.mixed_bits:
            return Subnet.of_parts((_widened(layer, attention=True, mlp=False),) * self.depth, NARROW_BITS)
        return Subnet((layer,) * self.depth, sorted(self.bits_choices)[len(self.bits_choices) // 2])

    @property
    def depth(self) -> int:
        return len(self.base.blocks)

    @property
    def bits_options(self) -> list[tuple[int, int]]:
        """Of the blocks and, where they are its own, of the head."""
        return [(bits, 0) for bits in self.bits_choices] + [(NARROW_BITS, NARROW_HEAD_BITS)] * self.mixed_bits

    @property
    def size(self) -> int:
        """How many subnets there are."""
        if self.homogeneous:
            shared = math.prod(len(self.sizes(part)) - 1 for part in PARTS)
            return int(shared * (2**self.depth - 1) + 1) * len(self.bits_choices)
        choices = [len(self.sizes(part)) for part in PARTS]
        of_one_bits: int = math.prod(choices) ** self.depth
        if not self.mixed_bits:
            return of_one_bits * len(self.bits_choices)
        kept = (sum(map(bool, self.sizes(part))) for part in PARTS)
        both: int = math.prod(all_ + wide for all_, wide in zip(choices, kept, strict=True)) ** self.depth
        return 2 * both + of_one_bits * (len(self.bits_choices) - 2)

    def sample(
        self, rng: np.random.Generator, density: tuple[float, float] = (0.2, 1.0), spread: float = 0.25
    ) -> Subnet:
        """A random subnet around a density d drawn from `density`: keeping f has the weight exp(-|f - d| / spread).

        Independent uniform choices would put nearly all subnets close to the same size. Where layers are alike, the
        density is the product of how many are kept and of how much each keeps. With mixed bits a subnet of 4 bits has 8
        in any share of its parts, and every second a narrow head.
        """
        target = rng.uniform(*density)

        def draw(part: Part, count: int) -> list[Size]:
            choices = [size for size in self.sizes(part) if size or not self.homogeneous]
            kept = np.array(choices if part == "mlp" else [self._projected(size)[0] for size in choices])
            weights = np.exp(-np.abs(kept / kept[-1] - target) / spread)
            return [choices[i] for i in rng.choice(len(choices), count, p=weights / weights.sum())]

        if self.homogeneous:
            share = rng.uniform(target, 1)
            target /= share
            kept = rng.permutation(self.depth) < max(1, round(share * self.depth))
            size = LayerChoice.of_sizes(draw("attention", 1)[0], draw("mlp", 1)[0])
            layers = [size if keep else SKIPPED for keep in kept]
        else:
            sizes = zip(draw("attention", self.depth), draw("mlp", self.depth), strict=True)
            layers = [LayerChoice.of_sizes(attention, mlp) for attention, mlp in sizes]
        bits = self.bits_choices[int(rng.integers(len(self.bits_choices)))]
        if self.mixed_bits and bits == NARROW_BITS:
            wide = rng.random((self.depth, 2)) < rng.random()
            layers = [_widened(layer, *row) for layer, row in zip(layers, wide.tolist(), strict=True)]
        heads = [head_bits for of_blocks, head_bits in self.bits_options if of_blocks == bits]
        return Subnet.of_parts(layers, bits, heads[int(rng.integers(len(heads)))])

    def validate(self, subnet: Subnet) -> None:
        """ValueError where depth or a size is not one of the choices, or bits below 16 are not searched."""
        if len(subnet.layers) != self.depth:
            raise ValueError(f"wanted a subnet of {self.depth} layers, got {len(subnet.layers)}")
        allowed = (32, 16, *self.bits_choices)
        if subnet.bits not in allowed:
            raise ValueError(f"wanted bits out of {allowed}, got {subnet.bits}")
        if subnet.is_mixed and not (self.mixed_bits and subnet.bits == NARROW_BITS):
            raise ValueError(f"wanted bits of parts and head in a space of mixed bits alone, got some at {subnet.bits}")
        if subnet.head_bits not in (0, NARROW_HEAD_BITS):
            raise ValueError(f"wanted head_bits of 0 or {NARROW_HEAD_BITS}, got {subnet.head_bits}")
        for index, layer in enumerate(subnet.layers):
            if layer not in self._blocks:
                heads = f", heads_per_group out of {(0, *self.head_choices)}" if self.head_choices else ""
                raise ValueError(
                    f"wanted num_key_value_heads out of {self.group_choices}{heads} and intermediate_size out of "
                    f"{self.width_choices}, got {layer} in layer {index}"
                )
        sizes = set(subnet.layers) - {SKIPPED}
        if self.homogeneous and (
            len(sizes) > 1 or any(0 in (s.num_key_value_heads, s.intermediate_size) for s in sizes)
        ):
            raise ValueError(f"wanted layers of one size, others skipped whole, got {len(sizes)} sizes or half a layer")

    def __contains__(self, subnet: object) -> bool:
        if not isinstance(subnet, Subnet) or subnet.bits not in self.bits_choices:
            return False
        try:
            self.validate(subnet)
        except ValueError:
            return False
        return True

    def encode(self, subnet: Subnet) -> npt.NDArray[np.int64]:
        """Indices of choices, int64 [genes_per_layer * depth + 1]: `sizes` of each layer's parts, then `bits_options`.

        With mixed bits a layer has two more: whether its attention and its MLP have WIDE_BITS of their own.
        """
        self.validate(subnet)
        if subnet.bits not in self.bits_choices:
            raise ValueError(f"wanted bits out of {self.bits_choices} to encode a subnet, got {subnet.bits}")
        genes = chain.from_iterable(self._genes[layer] for layer in subnet.layers)
        return np.array([*genes, self.bits_options.index((subnet.bits, subnet.head_bits))], dtype=np.int64)

    def decode(self, genes: npt.NDArray[np.integer[Any]]) -> Subnet:
        """The subnet of indices such as `encode` gives; ValueError where one is out of range.

        In a homogeneous space layers that keep both parts share their mean size, and the others are skipped. Parts have
        bits of their own in a subnet of 4 bits alone.
        """
        sizes = self.gene_sizes
        if genes.shape != sizes.shape or (genes < 0).any() or (genes >= sizes).any():
            raise ValueError(f"wanted {len(sizes)} indices of 0 or more below {sizes}, got {genes}")
        chosen = genes[:-1].reshape(-1, self.genes_per_layer)
        if self.homogeneous:
            kept = (chosen > 0).all(axis=1)
            shared = np.rint(chosen[kept].mean(axis=0)) if kept.any() else np.zeros(2)
            chosen = np.outer(kept, shared).astype(np.int64)
        bits, head_bits = self.bits_options[int(genes[-1])]
        attention, mlp = map(self.sizes, PARTS)
        layers = [LayerChoice.of_sizes(attention[a], mlp[m]) for a, m, *_ in chosen.tolist()]
        if self.mixed_bits and bits == NARROW_BITS:
            layers = [_widened(layer, *row) for layer, row in zip(layers, chosen[:, 2:].tolist(), strict=True)]
        return Subnet.of_parts(layers, bits, head_bits)

    @property
    def genes_per_layer(self) -> int:
        return 4 if self.mixed_bits else 2

    @property
    def gene_sizes(self) -> npt.NDArray[np.int64]:
        """How many choices each index of `encode` has, int64 [genes_per_layer * depth + 1]."""
        per_layer = [*(len(self.sizes(part)) for part in PARTS), 2, 2][: self.genes_per_layer]
        return np.array(per_layer * self.depth + [len(self.bits_options)], dtype=np.int64)

    def has_fewer_heads(self, shape: ModelShape) -> bool:
        """Whether some KV group has fewer query heads than the full model's."""
        heads = self.heads_per_group
        return any(block.num_attention_heads < heads * block.num_key_value_heads for block in shape.blocks)

    def block(self, layer: LayerChoice) -> BlockShape:
        heads, groups = layer.query_heads(self.heads_per_group), layer.num_key_value_heads
        return BlockShape(heads, groups, layer.intermediate_size, layer.attention_bits, layer.mlp_bits)

    @cached_property
    def _blocks(self) -> dict[LayerChoice, BlockShape]:
        """A search asks for the shapes of thousands of subnets."""
        layers = {
            _widened(LayerChoice.of_sizes(attention, mlp), *wide)
            for attention, mlp in product(*map(self.sizes, PARTS))
            for wide in product((False, True) if self.mixed_bits else (False,), repeat=2)
        }
        return {layer: self.block(layer) for layer in sorted(layers)}

    @cached_property
    def _genes(self) -> dict[LayerChoice, tuple[int, ...]]:
        return {
            layer: (
                *(self.sizes(part).index(layer.size(part)) for part in PARTS),
                *((layer.attention_bits > 0, layer.mlp_bits > 0) if self.mixed_bits else ()),
            )
            for layer in self._blocks
        }

    def block_choices(self) -> list[BlockShape]:
        """Every distinct layer of the space at one of its bits, smallest first: what a device profile has to cover."""
        return [block for layer, block in self._blocks.items() if not (layer.attention_bits or layer.mlp_bits)]

    def model_shape(self, subnet: Subnet) -> ModelShape:
        self.validate(subnet)
        blocks = tuple(self._blocks[layer] for layer in subnet.layers)
        return replace(self.base, blocks=blocks, head_bits=subnet.head_bits)

    def to_json(self) -> str:
        """As earlier versions wrote it, unless it is of a later kind: studies are found by it."""
        fields = asdict(self) | {"base": json.loads(self.base.to_json())}
        for later in ("homogeneous", "mixed_bits", "head_choices"):
            if not fields[later]:
                del fields[later]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        fields = json.loads(text)
        base = ModelShape.from_json(json.dumps(fields["base"]))
        groups, widths, bits = (tuple(fields[name]) for name in ("group_choices", "width_choices", "bits_choices"))
        homogeneous, mixed_bits = (fields.get(name, False) for name in ("homogeneous", "mixed_bits"))
        return cls(base, groups, widths, bits, homogeneous, mixed_bits, tuple(fields.get("head_choices", ())))


def _widened(layer: LayerChoice, attention: bool, mlp: bool) -> LayerChoice:
    """With WIDE_BITS in those of its parts that it has."""
    return replace(
        layer,
        attention_bits=WIDE_BITS if attention and layer.num_key_value_heads else 0,
        mlp_bits=WIDE_BITS if mlp and layer.intermediate_size else 0,
    )


def _groups_at_once(base: ModelShape) -> int:
    """The least KV groups that the output map of attention reads a whole number of quantisation blocks from."""
    return QUANTIZATION_BLOCK_SIZE // math.gcd(QUANTIZATION_BLOCK_SIZE, _heads_per_group(base) * base.head_dim)


def _heads_per_group(base: ModelShape) -> int:
    block = base.blocks[0]
    return block.num_attention_heads // block.num_key_value_heads


def model_shape(config: Any) -> ModelShape:
    """The ModelShape of a Hugging Face decoder config whose layers are all alike."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    block = BlockShape(heads, groups, config.intermediate_size)
    return ModelShape.from_config(config, (block,) * config.num_hidden_layers)
