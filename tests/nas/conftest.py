from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from nas import calibration, stream_checkpoint
from nas.families import LoadedModel, wrap

#: Of two layers in three a window shorter than `windows`, and scores unlike any default.
OF_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 0.75,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    "gpt2": {"num_attention_heads": 3},
    "gpt_neox": {
        "num_attention_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
    },
    "opt": {"num_attention_heads": 3, "word_embed_proj_dim": 96},
}
#: Sizes that a family's config calls otherwise.
RENAMED = {
    "gpt2": {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim", "initializer_range": "init_std"},
}


def _tiny_model(
    model_type: str = "llama",
    *,
    tied: bool = True,
    bias: bool = False,
    vocabulary: int = 96,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Three layers, three KV groups of two heads, or of one, width 128.

    Norms and biases are random, so that checks can fail.
    """
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,
        "pad_token_id": None,
    }
    sizes |= {"attention_bias": True, "mlp_bias": True} if bias else {}
    sizes |= OF_FAMILIES.get(model_type, {})
    for name, theirs in RENAMED.get(model_type, {}).items():
        sizes[theirs] = sizes.pop(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            torch.nn.init.uniform_(parameter, *((-0.5, 0.5) if "gemma" in model_type else (0.5, 1.5)))
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _tiny(model_type: str = "llama", **options: Any) -> LoadedModel:
    return wrap(_tiny_model(model_type, **options), None, f"tiny-{model_type}")


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return _tiny_model


@pytest.fixture
def tiny() -> Callable[..., LoadedModel]:
    return _tiny


class InterruptedOnce:
    """A progress that is told of steps, and interrupts when `at` is begun for the first time."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.begun: list[int] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        self.begun.append(done)
        if done == self.at and self.begun.count(done) == 1:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], InterruptedOnce]:
    """With streams kept before every layer."""
    monkeypatch.setattr(stream_checkpoint, "_EVERY_S", 0.0)
    return InterruptedOnce


@pytest.fixture
def smollm2_config() -> LlamaConfig:
    """Of SmolLM2-135M's layers, four of them."""
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


@pytest.fixture
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that do not depend on what the CPU computes fastest in."""
    monkeypatch.setattr(calibration, "fast_dtype", lambda: torch.float32)


@pytest.fixture
def windows() -> torch.Tensor:
    """Sixteen windows of 32 tokens: more tokens than the widest input of the tiny model."""
    return torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(1))
