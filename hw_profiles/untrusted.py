"""JSON that came from another machine: every field is checked before anything uses it.

Each refusal is a ValueError of one sentence: which field, what was wanted, what was found, what to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, get_args

from hw_profiles.runtimes import RUNTIMES, is_runtime_name
from hw_profiles.shapes import HIDDEN_ACTS, NARROW_HEAD_BITS, WIDE_BITS, BlockShape, ModelShape, Phase, Workload

#: More than any decoder or board has, and little enough that no product of two overflows.
MAX_BLOCKS = 1024
MAX_BLOCK_SIZE = 2**20
MAX_HEADS = 2**14
MAX_VOCAB_SIZE = 2**24
MAX_TOKENS = 2**20
MAX_BATCH_SIZE = 2**10
#: Over all sequences; what a cache of so many takes is up to the model.
MAX_POSITIONS = 2**21
MAX_THREADS = 2**12
MAX_ROUNDS = 1000
MAX_CAP = 1e6

_PHASES: tuple[Phase, ...] = get_args(Phase)
_Choice = TypeVar("_Choice", bound=str)


class Fields:
    """One JSON object. Each method takes a field out and checks it; `end` refuses those that nobody took."""

    def __init__(self, value: object, where: str, remedy: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a JSON object, got {_short(value)}; {remedy}")
        self.where = where
        self.remedy = remedy
        self._fields: dict[str, object] = dict(value)

    @classmethod
    def parse(cls, content: bytes, file: str, remedy: str) -> Fields:
        """The one object in a file. Keys given twice, NaN and infinity, which JSON does not know, are refused."""
        try:
            text = content.decode("utf-8")
            value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply to be ours; {remedy}") from None
        except ValueError as error:
            raise ValueError(f"{file} must be JSON, got something else ({error}); {remedy}") from error
        return cls(value, file, remedy)

    def header(self, kind: str, version: int) -> None:
        """Check the fields `format` and `version`, which every file of ours begins with."""
        self.choice("format", [kind])
        found = self.take("version")
        if type(found) is not int or found != version:
            raise ValueError(
                f"{self.where} must have format version {version}, got {_short(found)}; use the same llm-nas on both "
                "machines"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def take(self, name: str) -> object:
        if name not in self._fields:
            raise ValueError(f"{self.where} must have the field {name}, got none; {self.remedy}")
        return self._fields.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """None where the field is null."""
        if self._fields.get(name, ...) is None:
            self.take(name)
            return None
        return self.integer(name, low, high)

    def number(self, name: str, low: float, high: float) -> float:
        value = self.take(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        """None where the field is null."""
        if self._fields.get(name, ...) is None:
            self.take(name)
            return None
        return self.number(name, low, high)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def switch(self, name: str) -> bool:
        """False where the field is absent."""
        return name in self and self.boolean(name)

    def text(self, name: str, longest: int) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not value.isprintable() or len(value) > longest:
            raise self.wrong(name, f"at most {longest} printable characters", value)
        return value

    def choice(self, name: str, choices: Sequence[_Choice]) -> _Choice:
        value = self.take(name)
        for choice in choices:
            if value == choice:
                return choice
        raise self.wrong(name, f"one of {', '.join(choices)}", value)

    def values(self, name: str, fewest: int, most: int) -> list[object]:
        value = self.take(name)
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            raise self.wrong(name, f"a list of {fewest} to {most} entries", value)
        return value

    def integers(self, name: str, count: int, low: int, high: int) -> tuple[int, ...]:
        """As many as said, or none; none where the field is absent."""
        values = self.values(name, 0, count) if name in self else []
        if len(values) not in (0, count):
            raise self.wrong(name, f"a list of {count} entries, or empty", values)
        whole = []
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise self.wrong(name, f"whole numbers from {low} to {high}", value)
            whole.append(value)
        return tuple(whole)

    def objects(self, name: str, fewest: int, most: int) -> list[Fields]:
        values = self.values(name, fewest, most)
        return [Fields(value, f"{self.where}: {name}[{i}]", self.remedy) for i, value in enumerate(values)]

    def nested(self, name: str) -> Fields:
        return Fields(self.take(name), f"{self.where}: {name}", self.remedy)

    def end(self) -> None:
        if self._fields:
            raise ValueError(
                f"{self.where} must have no other fields than the known ones, got {_short(min(self._fields))}; "
                f"{self.remedy}"
            )

    def wrong(self, name: str, wanted: str, value: object) -> ValueError:
        return ValueError(f"{self.where}: {name} must be {wanted}, got {_short(value)}; {self.remedy}")


def model_shape(fields: Fields) -> ModelShape:
    blocks = tuple(_block(block) for block in fields.objects("blocks", 1, MAX_BLOCKS))
    shape = ModelShape(
        hidden_size=fields.integer("hidden_size", 1, MAX_BLOCK_SIZE),
        head_dim=fields.integer("head_dim", 1, MAX_BLOCK_SIZE),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB_SIZE),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        blocks=blocks,
        attention_bias=fields.switch("attention_bias"),
        qk_norm=fields.switch("qk_norm"),
        post_norms=fields.switch("post_norms"),
        scaled_embedding=fields.switch("scaled_embedding"),
        hidden_act=fields.choice("hidden_act", HIDDEN_ACTS) if "hidden_act" in fields else "silu",
        windows=fields.integers("windows", len(blocks), 0, MAX_TOKENS),
        layer_norm=fields.switch("layer_norm"),
        gated_mlp=fields.boolean("gated_mlp") if "gated_mlp" in fields else True,
        output_bias=fields.switch("output_bias"),
        mlp_bias=fields.switch("mlp_bias"),
        parallel_residual=fields.switch("parallel_residual"),
        learned_positions=fields.integer("learned_positions", 0, MAX_TOKENS) if "learned_positions" in fields else 0,
        attn_logit_softcapping=_cap(fields, "attn_logit_softcapping"),
        final_logit_softcapping=_cap(fields, "final_logit_softcapping"),
        head_bits=_head_bits(fields),
    )
    fields.end()
    return shape


def _head_bits(fields: Fields) -> int:
    bits = fields.integer("head_bits", 0, NARROW_HEAD_BITS) if "head_bits" in fields else 0
    if bits not in (0, NARROW_HEAD_BITS):
        raise fields.wrong("head_bits", f"0 or {NARROW_HEAD_BITS}", bits)
    return bits


def _cap(fields: Fields, name: str) -> float:
    return fields.number(name, 0, MAX_CAP) if name in fields else 0.0


def _block(fields: Fields) -> BlockShape:
    heads = fields.integer("num_attention_heads", 0, MAX_HEADS)
    groups = fields.integer("num_key_value_heads", 0, MAX_HEADS)
    width = fields.integer("intermediate_size", 0, MAX_BLOCK_SIZE)
    bits = (fields.integer(name, 0, WIDE_BITS) if name in fields else 0 for name in ("attention_bits", "mlp_bits"))
    try:
        block = BlockShape(heads, groups, width, *bits)
        fields.end()
        return block
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}; {fields.remedy}") from error


def workload(fields: Fields) -> Workload:
    """Takes the fields of a Workload out of an object that may have others."""
    phase = fields.choice("phase", _PHASES)
    tokens = fields.integer("tokens", 1 if phase == "prefill" else 0, MAX_TOKENS)
    most = min(MAX_BATCH_SIZE, MAX_POSITIONS // max(tokens, 1))
    return Workload(phase, tokens, fields.integer("batch_size", 1, most))


def runtime_name(fields: Fields) -> str:
    """Takes the field `runtime`: the device that it names need not be one of this machine."""
    name = fields.text("runtime", 50)
    if not is_runtime_name(name):
        raise fields.wrong(
            "runtime", f"one of {', '.join(RUNTIMES)}, which may carry a device as in openvino:GPU", name
        )
    return name


def same_model(shape: ModelShape, reference: ModelShape, fields: Fields) -> None:
    """Refuse a shape that is not the reference with other blocks, or other bits of the head."""
    same = replace(shape, blocks=reference.blocks, head_bits=reference.head_bits)
    if same != reference or len(shape.blocks) != len(reference.blocks):
        raise ValueError(
            f"{fields.where} must be the reference model with other blocks, got another model; {fields.remedy}"
        )


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {_short(twice)} is there twice")
    return fields


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _short(value: object) -> str:
    """A value as JSON, for a message: never long, never more than one line."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
