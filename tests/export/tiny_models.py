"""A heterogeneous decoder small enough for every test, and what torch says of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from export import fake_quantize, heterogeneous_model
from export.gpt import gpt_config
from export.quantize import is_rounded
from hw_profiles.runtimes import Session
from hw_profiles.shapes import BlockShape, ModelShape, Precision

VOCAB_SIZE, HIDDEN_SIZE, HEAD_DIM, MAX_POSITIONS, EOS = 272, 64, 16, 64, 256
#: Two KV groups, no attention, one KV group and no MLP, nothing at all, three KV groups.
BLOCKS = (
    BlockShape(4, 2, 96),
    BlockShape(0, 0, 128),
    BlockShape(2, 1, 0),
    BlockShape(0, 0, 0),
    BlockShape(6, 3, 64),
)


#: What a Gemma has in place of a Llama's: a window shorter than any text here, in all layers but some;
#: caps that most scores and logits feel.
GEMMA: dict[str, dict[str, Any]] = {
    "gemma2": {
        "sliding_window": 6,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "sliding")],
        "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 11,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
}


#: What families whose weights are fused, transposed or named otherwise have in place of a Llama's.
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96, "layer_norm_epsilon": 1e-3},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN_SIZE},
    "gpt_neox": {
        "intermediate_size": 96,
        "layer_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    },
}


def shape(tied: bool) -> ModelShape:
    return ModelShape(HIDDEN_SIZE, HEAD_DIM, VOCAB_SIZE, tied, BLOCKS)


def llama_config(tied: bool = True, **fields: object) -> LlamaConfig:
    """An epsilon and a rotary base unlike any default, so that a writer that forgets them shows."""
    values: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": len(BLOCKS),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    return LlamaConfig(**(values | fields))


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every tensor random, norm weights too; logits spread over a few units and depend on the whole context."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.2, generator=generator)
    return model.requires_grad_(False).eval()


def heterogeneous(
    tied: bool = True, blocks: tuple[BlockShape, ...] = BLOCKS, seed: int = 0, family: str = "llama"
) -> PreTrainedModel:
    if family in OTHER_SIZES:
        return randomise(heterogeneous_model(gpt_config(other_config(family, tied)), blocks), seed)
    fields = {key: value for key, value in llama_config(tied).to_dict().items() if key != "model_type"}
    fields |= {"num_hidden_layers": len(blocks)} | GEMMA.get(family, {})
    return randomise(heterogeneous_model(AutoConfig.for_model(family, **fields), blocks), seed)


def other_config(family: str, tied: bool = True) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(family, **sizes, **OTHER_SIZES[family])


def rounded(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A copy in torch whose matrices are the ones that a file at `precision` should hold."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_rounded(name, parameter):
                end = "embed_tokens" in name or "lm_head" in name
                parameter.copy_(fake_quantize(parameter, "int8" if end and precision == "int4" else precision))
    return model


def tokens(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def torch_logits(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray:
    """[B, T, V], in one pass without a cache."""
    return model(input_ids=ids, use_cache=False).logits.numpy()


def session_logits(session: Session, ids: torch.Tensor, prompt: int) -> np.ndarray:
    """[B, T - prompt + 1, V]: after the prompt, then after each further token, fed one by one."""
    array = ids.numpy()
    steps = [array[:, :prompt], *(array[:, i : i + 1] for i in range(prompt, array.shape[1]))]
    return np.stack([session.step(step) for step in steps], axis=1)


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[int]:
    """The most likely tokens, each from a pass over all that came before it."""
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama's, with two merges: id 0-255 the bytes, then the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<|end|>": EOS, "th": EOS + 1, "the": EOS + 2}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
