"""Greedy tokens through onnxruntime-genai's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def genai_tokens(directory: Path, ids: Sequence[int], count: int) -> list[int]:
    """At most `count` tokens after the prompt `ids`; the end of a text is not among them."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(list(ids))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]
