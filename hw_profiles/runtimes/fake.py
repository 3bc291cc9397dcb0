"""A runtime whose speed is written in its model file: for tests of whatever times, stores or predicts latencies.

It is left out of `RUNTIMES`, so that users never meet it; tests construct it or add it there themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hw_profiles.runtimes import check_room, model_file
from hw_profiles.shapes import PRECISIONS

MODEL_FILE = "fake.json"


@dataclass(frozen=True)
class FakeModel:
    """A step that feeds S tokens to each of B sequences with P in the cache takes, in milliseconds,
    base_ms + B * S * token_ms + B * P * context_ms."""

    base_ms: float
    token_ms: float = 0.0
    context_ms: float = 0.0
    vocab_size: int = 16

    def write(self, directory: Path) -> Path:
        path = directory / MODEL_FILE
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


class FakeRuntime:
    """`wait` takes seconds; a test may hand in the advance of its own clock."""

    name = "fake"
    precisions = PRECISIONS

    def __init__(self, wait: Callable[[float], None] = time.sleep) -> None:
        self._wait = wait

    def version(self) -> str:
        return "1"

    def devices(self) -> list[str]:
        return ["CPU"]

    def load(self, path: Path, threads: int, max_tokens: int) -> FakeSession:
        file = model_file(path, MODEL_FILE)
        try:
            model = FakeModel(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"wanted a JSON object with the fields of FakeModel, got {file}: {error}") from error
        return FakeSession(model, max_tokens, self._wait)


class FakeSession:
    """Its logits depend on every token in the cache and their order, so a forgotten reset shows."""

    def __init__(self, model: FakeModel, max_tokens: int, wait: Callable[[float], None]) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._wait = wait
        self._history: NDArray[np.int64] | None = None

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        check_room(new_tokens or 0, past_tokens, self._max_tokens)
        self._history = np.zeros((batch_size, past_tokens), np.int64) if past_tokens else None

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        model = self._model
        batch_size, fed = token_ids.shape
        past = 0 if self._history is None else self._history.shape[1]
        check_room(fed, past, self._max_tokens)
        self._wait((model.base_ms + batch_size * (fed * model.token_ms + past * model.context_ms)) / 1e3)
        self._history = token_ids if self._history is None else np.concatenate([self._history, token_ids], axis=1)
        state = (self._history + 1) @ np.arange(1, past + fed + 1)
        logits: NDArray[np.float32] = np.cos(state[:, None] * np.arange(1, model.vocab_size + 1)).astype(np.float32)
        return logits
