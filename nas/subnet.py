"""What a subnet keeps of a model: a size for each part of every layer, and bits, of all or part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal, NamedTuple

from hw_profiles.shapes import BLOCK_BITS, WIDE_BITS, Precision

#: What of a layer a subnet chooses a size for.
Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")


class FewerHeads(NamedTuple):
    """KV groups of an attention, and query heads of each of these, fewer than the model has."""

    num_key_value_heads: int
    heads_per_group: int

    def __str__(self) -> str:
        return f"{self.num_key_value_heads}x{self.heads_per_group}"


#: How much of a part is kept: KV groups with all their query heads, or with fewer, or channels. 0 skips the part.
Size = int | FewerHeads

#: Bits of a subnet of which some parts may have WIDE_BITS, and the head NARROW_HEAD_BITS.
NARROW: Precision = "int4"
NARROW_BITS = BLOCK_BITS[NARROW]
_PRECISION_OF_BITS: dict[int, Precision] = {32: "fp32", 8: "int8", 4: "int4"}


@dataclass(frozen=True, order=True)
class LayerChoice:
    """What one layer keeps; 0 skips the part.

    A part has WIDE_BITS of its own, or with 0 the subnet's bits. A KV group has `heads_per_group` query heads, or with
    0 all that the model has for it.
    """

    num_key_value_heads: int
    intermediate_size: int
    attention_bits: int = 0
    mlp_bits: int = 0
    heads_per_group: int = 0

    @classmethod
    def of_sizes(cls, attention: Size, mlp: Size, attention_bits: int = 0, mlp_bits: int = 0) -> LayerChoice:
        assert isinstance(mlp, int)
        groups, heads = attention if isinstance(attention, FewerHeads) else (attention, 0)
        return cls(groups, mlp, attention_bits, mlp_bits, heads)

    def size(self, part: Part) -> Size:
        if part == "mlp":
            return self.intermediate_size
        if self.heads_per_group:
            return FewerHeads(self.num_key_value_heads, self.heads_per_group)
        return self.num_key_value_heads

    def query_heads(self, heads_per_group: int) -> int:
        """Of all groups kept, where the model has so many for each."""
        return self.num_key_value_heads * (self.heads_per_group or heads_per_group)

    def own_bits(self, part: Part) -> int:
        return self.attention_bits if part == "attention" else self.mlp_bits


#: A layer that is not there.
SKIPPED = LayerChoice(0, 0)


@dataclass(frozen=True)
class Subnet:
    """One choice per layer and the bits of the blocks' weights: 32, 16, 8 or 4. The full model is a Subnet too.

    At 4 bits parts may have 8 of their own, and the head, which has 8 otherwise, may have 4; 16 are bf16 or fp16.
    """

    layers: tuple[LayerChoice, ...]
    bits: int
    half: Precision = "bf16"
    head_bits: int = 0

    @classmethod
    def of_parts(cls, layers: Sequence[LayerChoice], bits: int, head_bits: int = 0) -> Subnet:
        """Where all parts kept have WIDE_BITS, and so has the head, simply the subnet with those."""
        mixed = cls(tuple(layers), bits, head_bits=head_bits)
        if head_bits or any(layer.size(part) and not layer.own_bits(part) for layer in layers for part in PARTS):
            return mixed
        return mixed.at_bits(WIDE_BITS) if mixed.is_mixed else mixed

    @property
    def id(self) -> str:
        """Ten hex digits, equal for equal subnets."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    @property
    def precision(self) -> Precision:
        return self.half if self.bits == 16 else _PRECISION_OF_BITS[self.bits]

    @property
    def is_mixed(self) -> bool:
        """Whether parts or the head have bits of their own."""
        return self.head_bits > 0 or any(layer.attention_bits or layer.mlp_bits for layer in self.layers)

    @property
    def description(self) -> str:
        """Its precision, and what has bits of its own: `int4, 20 of 58 parts at 8 bits, head at 4`."""
        parts = [layer.own_bits(part) for layer in self.layers for part in PARTS if layer.size(part)]
        said: str = self.precision
        if any(parts):
            said += f", {sum(map(bool, parts))} of {len(parts)} parts at {WIDE_BITS} bits"
        return said + (f", head at {self.head_bits}" if self.head_bits else "")

    def at_bits(self, bits: int) -> Subnet:
        """The same sizes at other bits; at its own it stays as it is."""
        if bits == self.bits:
            return self
        return Subnet(tuple(replace(layer, attention_bits=0, mlp_bits=0) for layer in self.layers), bits)

    def at(self, precision: Precision) -> Subnet:
        """The same sizes at that precision; at its own it stays as it is."""
        if precision == self.precision:
            return self
        found = self.at_bits(BLOCK_BITS[precision])
        return replace(found, half=precision) if found.bits == 16 else found

    def part_precision(self, layer: int, part: Part) -> Precision:
        own = self.layers[layer].own_bits(part)
        return _PRECISION_OF_BITS[own] if own else self.precision

    def to_json(self) -> str:
        """A layer's and the head's own bits, and fewer query heads, are said only where there are some, and fp16 alone
        of halves, so that older ids stay."""
        layers = [_said(astuple(layer)) for layer in self.layers]
        half = {"half": self.half} if self.precision == "fp16" else {}
        head = {"head": self.head_bits} if self.head_bits else {}
        return json.dumps({"bits": self.bits, **half, **head, "layers": layers}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Subnet:
        fields = json.loads(text)
        layers = tuple(LayerChoice(*layer) for layer in fields["layers"])
        return cls(layers, fields["bits"], fields.get("half", "bf16"), fields.get("head", 0))


def _said(fields: tuple[int, ...]) -> list[int]:
    """Those of a LayerChoice without its bits and query heads where they are 0."""
    groups, width, attention_bits, mlp_bits, heads = fields
    if heads:
        return list(fields)
    return [groups, width, attention_bits, mlp_bits] if attention_bits or mlp_bits else [groups, width]
