"""What onnxruntime-genai has to be told to run an ONNX folder."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig

from export.decoder import Decoder
from export.onnx import MODEL_FILE


def write_genai_config(decoder: Decoder, generation: GenerationConfig, directory: Path) -> None:
    """Write `genai_config.json`, with which onnxruntime-genai runs the folder.

    Its `num_hidden_layers` counts KV cache slots, so layers without attention are left out of it.
    """
    shape = decoder.shape
    config = {
        "model": {
            "type": "llama",
            "vocab_size": shape.vocab_size,
            "context_length": decoder.max_position_embeddings,
            # it refuses null
            **{
                name: getattr(generation, name)
                for name in ("bos_token_id", "eos_token_id", "pad_token_id")
                if getattr(generation, name) is not None
            },
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": max(block.num_attention_heads for block in shape.blocks),
                "num_key_value_heads": max(block.num_key_value_heads for block in shape.blocks),
                "num_hidden_layers": len(shape.attention_blocks),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": decoder.max_position_embeddings,
            "past_present_share_buffer": True,
        },
    }
    (directory / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")
