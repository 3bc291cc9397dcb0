"""From a subnet of the supernet to an exported folder with its proof."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from export import LatencyPrediction, Manifest, Parity, export_folder
from export.artefact import Format, TextQuality
from nas.card import write_card
from nas.evaluate import Evaluator
from nas.extraction import extract, rounded_matrices
from nas.subnet import Subnet
from nas.supernet import Supernet

_VERSIONED = ("torch", "transformers", "onnxruntime", "openvino")
#: Each window is fed as a prompt of 96 tokens and 32 more one by one; logits are compared at every fourth of those.
_PROMPT_TOKENS = 96
_PARITY_POSITIONS = range(_PROMPT_TOKENS - 1, _PROMPT_TOKENS + 32, 4)


def export_subnet(
    supernet: Supernet,
    subnet: Subnet,
    format_: Format,
    directory: Path,
    windows: torch.Tensor,
    predictions: Sequence[LatencyPrediction] = (),
    quality: TextQuality | None = None,
    tuning: str | None = None,
) -> Path:
    """Write `subnet` at its own bits, with the active supernet's logits on `windows` [N, 128 or more] as evidence.

    `tuning` says how its weights were trained, if they were.
    """
    manifest = Manifest(
        format=format_,
        precision=subnet.precision,
        shape=supernet.space.model_shape(subnet),
        base_model=supernet.loaded.name,
        base_fingerprint=supernet.loaded.fingerprint,
        subnet_id=subnet.id,
        predictions=tuple(predictions),
        quality=quality,
        licence=supernet.loaded.licence,
        tuning=tuning,
        versions={package: version(package) for package in ("llm-nas", *_VERSIONED)},
    )
    model = extract(supernet, subnet, shared=True)
    evidence = parity(supernet, subnet, windows)
    export_folder(model, supernet.loaded.tokenizer, manifest, evidence, directory, rounded_matrices(supernet, subnet))
    write_card(directory)
    return directory


def text_quality(supernet: Supernet, subnet: Subnet, windows: torch.Tensor) -> TextQuality:
    """Of `subnet` with the weights that it would be exported with, beside the full model, on windows [N, T]."""
    evaluator = Evaluator(supernet, windows)
    found, full = evaluator.evaluate(subnet), evaluator.evaluate_full_model()
    return TextQuality(found.kl, found.perplexity, full.perplexity, windows.numel())


@torch.no_grad()
def parity(supernet: Supernet, subnet: Subnet, windows: torch.Tensor) -> Parity:
    """fp32 logits of the active subnet on `windows` [N, T]."""
    tokens = windows[:, : _PARITY_POSITIONS[-1] + 1]
    positions = torch.tensor(list(_PARITY_POSITIONS))
    supernet.activate(subnet)
    logits = torch.stack([supernet.loaded.logits(window[None])[0, positions] for window in tokens])
    return Parity(tokens.clone(), positions, logits)
