"""The vocabulary every package shares: what a decoder looks like, and what it is asked to do.

Shape letters: B batch, S tokens fed in one step, P tokens already in the KV cache, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Phase = Literal["prefill", "decode"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]

HiddenAct = Literal["silu", "gelu_pytorch_tanh", "gelu", "relu"]

PHASES: tuple[Phase, ...] = get_args(Phase)
HIDDEN_ACTS: tuple[HiddenAct, ...] = get_args(HiddenAct)
#: Of the weights; at bf16 the arithmetic is bf16 as well, at the others fp32 or what the runtime makes of it.
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Weights in quantised matrices share one fp16 scale per this many inputs (the block of GGUF's Q4_0 and Q8_0).
QUANTIZATION_BLOCK_SIZE = 32
#: Bits of the decoder blocks' weights at each precision.
BLOCK_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
#: Bits of the embedding, and of the head where it has none of its own.
HEAD_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 8}
#: Bits at which attention or MLP of some layers of an int4 model may be held.
WIDE_BITS = 8
#: Bits at which the head of an int4 model may be held, the embedding having 8 all the same.
NARROW_HEAD_BITS = 4
#: Bytes of an activation, and of a cached key or value.
VALUE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 4, "int8": 4, "int4": 4}


@dataclass(frozen=True, order=True)
class BlockShape:
    """One decoder layer. Heads of 0 mean that attention is skipped, `intermediate_size` of 0 that the MLP is.

    A part's bits are WIDE_BITS where an int4 model holds it at those, and 0 where it has the bits of the precision.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    attention_bits: int = 0
    mlp_bits: int = 0

    def __post_init__(self) -> None:
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        if min(heads, groups, width) < 0:
            raise ValueError(f"a block's sizes must be 0 or more, got {heads=} {groups=} {width=}")
        if (heads == 0) != (groups == 0) or (groups and heads % groups):
            raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads=} {groups=}")
        for bits, size in ((self.attention_bits, heads), (self.mlp_bits, width)):
            if bits not in (0, WIDE_BITS) or (bits and not size):
                raise ValueError(
                    f"bits of a part must be 0 or {WIDE_BITS}, and 0 of a skipped one, got {bits=} {size=}"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that Hugging Face configs have for them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_bits")}


@dataclass(frozen=True)
class ModelShape:
    """A decoder without its weights: all that latency, memory and size depend on."""

    hidden_size: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    blocks: tuple[BlockShape, ...]
    #: Whether queries, keys and values have biases, as in Qwen2.
    attention_bias: bool = False
    #: Whether each head of queries and keys is normed, as in Qwen3.
    qk_norm: bool = False
    #: Whether what attention and MLP add is normed as well, as in Gemma.
    post_norms: bool = False
    #: Whether embeddings are multiplied by the square root of hidden_size, as in Gemma.
    scaled_embedding: bool = False
    #: Of the gate, or of the one input map where there is no gate, as Hugging Face names it.
    hidden_act: HiddenAct = "silu"
    #: For each block how many positions, its own included, a token attends to, 0 for all; empty where all see all.
    #: Runtimes on CPUs cache and multiply all the same, so neither bytes nor FLOPs are fewer.
    windows: tuple[int, ...] = ()
    #: Whether norms take off the mean and add a bias, as in GPT-2, in place of RMS norms.
    layer_norm: bool = False
    #: Whether MLPs have a gate beside the input map.
    gated_mlp: bool = True
    #: Whether the output maps of attention have biases, and both maps of MLPs.
    output_bias: bool = False
    mlp_bias: bool = False
    #: Whether the MLP reads what the attention of its layer reads, as in GPT-NeoX, not what that leaves.
    parallel_residual: bool = False
    #: Rows of a learned embedding of positions, 0 where there is a rotary one.
    learned_positions: int = 0
    #: c, where scores of attention and logits are c tanh(x / c), as in Gemma 2; 0 where they are x.
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    #: NARROW_HEAD_BITS where an int4 model holds its head at those, apart from the embedding even where the two are
    #: tied; 0 where it has HEAD_BITS.
    head_bits: int = 0

    def __post_init__(self) -> None:
        if self.head_bits not in (0, NARROW_HEAD_BITS):
            raise ValueError(f"bits of the head must be 0 or {NARROW_HEAD_BITS}, got {self.head_bits}")

    @classmethod
    def from_config(cls, config: Any, blocks: tuple[BlockShape, ...]) -> ModelShape:
        """What these blocks make with the rest of a Hugging Face config of Llama or a family like it."""
        family = getattr(config, "base_model_type", config.model_type)
        gemma, gpt = family in ("gemma2", "gemma3_text"), config.model_type == "heterogeneous_gpt"
        biased = bool(getattr(config, "attention_bias", False))
        return cls(
            hidden_size=config.hidden_size,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            blocks=blocks,
            attention_bias=family == "qwen2" or biased,
            qk_norm=family in ("qwen3", "gemma3_text"),
            post_norms=gemma,
            scaled_embedding=gemma,
            hidden_act=config.hidden_activation if gemma else config.hidden_act,
            windows=_windows(config) if gemma else (),
            layer_norm=gpt,
            gated_mlp=not gpt,
            output_bias=biased,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            parallel_residual=gpt and config.parallel_residual,
            learned_positions=config.max_position_embeddings if gpt and not config.rotary_dim else 0,
            # Gemma 3's config has the field, and transformers does not compute with it
            attn_logit_softcapping=float((family == "gemma2" and config.attn_logit_softcapping) or 0),
            final_logit_softcapping=float(getattr(config, "final_logit_softcapping", None) or 0),
        )

    def window(self, layer: int) -> int:
        """Positions that a token attends to in this layer, 0 for all."""
        return self.windows[layer] if self.windows else 0

    @property
    def attention_blocks(self) -> tuple[BlockShape, ...]:
        """The blocks that own a slot in the KV cache, in order."""
        return tuple(block for block in self.blocks if block.num_attention_heads)

    @property
    def is_mixed(self) -> bool:
        """Whether parts or the head have bits of their own, as only those of an int4 model do."""
        return self.head_bits > 0 or any(block.attention_bits or block.mlp_bits for block in self.blocks)

    @property
    def id(self) -> str:
        """Twelve hex digits, equal for equal shapes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Without what has its default, so that ids of earlier versions stay."""
        said = _given(self) | {"blocks": [_given(block) for block in self.blocks]}
        return json.dumps(said, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelShape:
        given = json.loads(text)
        given["blocks"] = tuple(BlockShape(**block) for block in given["blocks"])
        given["windows"] = tuple(given.get("windows", ()))
        return cls(**given)

    def block_parameters(self, block: BlockShape) -> int:
        """Weights of one block: projections, their biases, and the norms of the parts kept."""
        return sum(self.matrix_parameters(block)) + self.vector_parameters(block)

    def matrix_parameters(self, block: BlockShape) -> tuple[int, int]:
        """Weights in the matrices of one block's attention and of its MLP."""
        heads = block.num_attention_heads + block.num_key_value_heads
        return self.hidden_size * 2 * self.head_dim * heads, self.hidden_size * self.mlp_maps * block.intermediate_size

    def vector_parameters(self, block: BlockShape) -> int:
        """Norms and biases of one block, which stay fp32 at every precision."""
        heads, groups = block.num_attention_heads, block.num_key_value_heads
        width = block.intermediate_size
        norms = self.hidden_size * ((heads > 0) + (width > 0)) * (1 + self.post_norms) * self.norm_vectors
        of_heads = 2 * self.qk_norm * (heads > 0) + self.attention_bias * (heads + 2 * groups)
        behind = self.hidden_size * (self.output_bias * (heads > 0) + self.mlp_bias * (width > 0))
        return norms + self.head_dim * of_heads + behind + self.mlp_bias * (self.mlp_maps - 1) * width

    @property
    def mlp_maps(self) -> int:
        """Matrices of an MLP."""
        return 2 + self.gated_mlp

    @property
    def norm_vectors(self) -> int:
        """Of one norm: a weight, and a bias where there is one."""
        return 1 + self.layer_norm

    @property
    def end_vector_parameters(self) -> int:
        """Of the last norm and of learned positions, which stay fp32 at every precision."""
        return self.hidden_size * (self.norm_vectors + self.learned_positions)

    @property
    def has_own_head(self) -> bool:
        """Whether files hold the head as another matrix than the embedding."""
        return self.head_bits > 0 or not self.tie_word_embeddings

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        return sum(map(self.block_parameters, self.blocks)) + self.end_vector_parameters + self.embedding_parameters

    def weight_bytes(self, precision: Precision, scale_bytes: int = 2) -> int:
        """Bytes of all weights: matrices at the precision's bits or their own, below 16 with a scale per 32, vectors as
        fp32.

        Of the exported weights within 1 KiB, given the format's `scale_bytes`; ONNX adds tables of the positions and
        starts each tensor at a page.
        """
        return self._bytes(precision, scale_bytes, embeddings=self.has_own_head)

    def read_weight_bytes(self, precision: Precision, scale_bytes: int = 2) -> int:
        """What a step reads of these: where the head is another matrix than the embedding, all but the latter."""
        return self._bytes(precision, scale_bytes, embeddings=0)

    def _bytes(self, precision: Precision, scale_bytes: int, embeddings: int) -> int:
        """Of the weights with so many embeddings beside the head."""
        vectors = self.end_vector_parameters + sum(map(self.vector_parameters, self.blocks))
        of_bits: Counter[int] = Counter()
        for block in self.blocks:
            for bits, weights in zip(
                (block.attention_bits, block.mlp_bits), self.matrix_parameters(block), strict=True
            ):
                of_bits[bits or BLOCK_BITS[precision]] += weights
        of_bits[HEAD_BITS[precision]] += self.vocab_size * self.hidden_size * embeddings
        of_bits[self.head_bits or HEAD_BITS[precision]] += self.vocab_size * self.hidden_size
        return round(
            sum(weights * bits_per_weight(bits, scale_bytes) / 8 for bits, weights in of_bits.items()) + vectors * 4
        )

    def kv_cache_bytes(self, tokens: int, batch_size: int = 1, bytes_per_value: int = 4) -> int:
        groups = sum(block.num_key_value_heads for block in self.blocks)
        return 2 * groups * self.head_dim * tokens * batch_size * bytes_per_value

    def flops(self, workload: Workload) -> int:
        """Multiply-adds times two of one step: projections, attention over the context, the head on the last token."""
        fed = workload.tokens if workload.phase == "prefill" else 1
        # token t of a prompt attends to t + 1 positions, a decoded one to the whole context and itself
        seen = fed * (fed + 1) // 2 if workload.phase == "prefill" else workload.tokens + 1
        heads = sum(block.num_attention_heads for block in self.blocks)
        weights = sum(map(self.block_parameters, self.blocks))
        per_sequence = 2 * fed * weights + 4 * heads * self.head_dim * seen + 2 * self.hidden_size * self.vocab_size
        return workload.batch_size * per_sequence


def _given(made: BlockShape | ModelShape) -> dict[str, Any]:
    """Its fields that have not their defaults."""
    return {f.name: value for f in fields(made) if (value := getattr(made, f.name)) != f.default}


def _windows(config: Any) -> tuple[int, ...]:
    """Of each layer of a Gemma config, or of one whose blocks say what kind of layer they are."""
    blocks = getattr(config, "block_configs", None)
    kinds = [block["layer_type"] for block in blocks] if blocks else config.layer_types
    return tuple(config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)


def bits_per_weight(bits: int, scale_bytes: int = 2) -> float:
    """Storage of one matrix weight, its share of the scale included."""
    return bits if bits >= 16 else bits + 8 * scale_bytes / QUANTIZATION_BLOCK_SIZE


@dataclass(frozen=True, order=True)
class Workload:
    """`tokens` is the prompt length for prefill and the context already in the KV cache for decode."""

    phase: Phase
    tokens: int
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase must be prefill or decode, got {self.phase!r}")
        if self.tokens < (1 if self.phase == "prefill" else 0) or self.batch_size < 1:
            raise ValueError(
                f"{self.phase} needs tokens and a batch of at least 1, got {self.tokens} and {self.batch_size}"
            )
