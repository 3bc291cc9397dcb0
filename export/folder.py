"""One call per exported folder: the model, its tokenizer, the manifest and the parity data, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from export.artefact import Manifest, Parity, whole_or_absent
from export.decoder import decoder_from_model
from export.genai_config import write_genai_config
from export.gguf import write_gguf
from export.gguf_tokenizer import tokenizer_metadata
from export.huggingface import write_huggingface
from export.onnx import write_onnx
from export.openvino import write_openvino, write_openvino_tokenizer
from export.quantize import QuantizedWeight, as_half, dequantize, is_rounded, quantize
from export.tokenizer_files import genai_special_tokens, write_tokenizer
from hw_profiles.shapes import BLOCK_BITS, HEAD_BITS, Precision


def export_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    parity: Parity,
    directory: Path,
    quantized: Mapping[str, QuantizedWeight] | None = None,
) -> Path:
    """Write an fp32 `model` in the manifest's format, its weights rounded to the manifest's precision.

    `quantized` holds the matrices that were rounded before, by name; others are rounded to the nearest here.
    The Hugging Face folder holds the rounded weights as fp32, bf16 or fp16: the same model, as tools expect it.
    `model` itself is given the rounded weights for it; those that it had stay as they are.
    """
    precision = manifest.precision
    if manifest.format == "onnx":
        manifest = replace(manifest, genai_special_tokens=genai_special_tokens(tokenizer))
    with whole_or_absent(directory, manifest) as unfinished:
        parity.save(unfinished)
        if manifest.format == "huggingface":
            write_huggingface(_rounded(model, precision, quantized or {}), tokenizer, unfinished)
        else:
            decoder = decoder_from_model(model, precision, quantized)
            generation = generation_config(model, tokenizer)
            if manifest.format == "gguf":  # one file with all of it
                metadata = tokenizer_metadata(tokenizer, decoder.shape.vocab_size, generation)
                metadata["general.name"] = manifest.title
                if manifest.licence is not None:
                    metadata["general.license"] = manifest.licence
                write_gguf(decoder, unfinished, metadata)
                return directory
            write_tokenizer(tokenizer, unfinished)
            generation.save_pretrained(unfinished)
            if manifest.format == "onnx":
                write_onnx(decoder, unfinished)
                write_genai_config(decoder, generation, unfinished)
            else:
                write_openvino(decoder, unfinished)
                write_openvino_tokenizer(tokenizer, unfinished)
                model.config.save_pretrained(unfinished)
    return directory


def generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy decoding that ends where the tokenizer says that a turn ends, and where the model itself does."""
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [end for end in dict.fromkeys((tokenizer.eos_token_id, *ends)) if end is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.config.pad_token_id
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=pad if pad is not None else next(iter(ends), None),
        do_sample=False,
    )


def _rounded(model: PreTrainedModel, precision: Precision, quantized: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    if precision == "fp32":
        return model
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_rounded(name, parameter):
                bits = HEAD_BITS[precision] if id(parameter) in embeddings else BLOCK_BITS[precision]
                if bits == 16:
                    parameter.data = as_half(parameter, precision)
                else:
                    parameter.data = dequantize(quantized[name] if name in quantized else quantize(parameter, bits))
    return model
