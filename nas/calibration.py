"""Second moments of what every projection reads, in one pass over calibration text, kept on disk layer by layer.

H = sum over tokens of x x^T, fp32 [in, in]. Only one layer's statistics are in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hw_profiles.profile import Progress
from nas.arithmetic import computing, fast_dtype
from nas.families import LoadedModel
from nas.stream_checkpoint import StreamCheckpoint

#: Part of every cache key: raise it when what is stored changes its meaning.
_VERSION = 2
_TOKENS_AT_ONCE = 4096
_HEAD_INPUT = "head_input"
_COLUMNS_AT_ONCE = 192


@dataclass(frozen=True)
class LayerStatistics:
    """H of the four inputs of one layer's projections.

    Where a norm is behind an output map, its inputs are divided by the size of what it makes of them, as the norm does:
    else a few loud tokens, which the norm makes as quiet as the others, would be all that its weights are fitted to.
    """

    attention_input: torch.Tensor
    attention_output: torch.Tensor  # what o_proj reads
    mlp_input: torch.Tensor
    mlp_output: torch.Tensor  # what down_proj reads


_MOMENTS = {field.name for field in fields(LayerStatistics)}


@dataclass(frozen=True)
class Statistics:
    """One file per layer in `folder`, and one of what the head reads; `tokens` were summed.

    `key` names model, text and precision of the pass.
    """

    key: str
    tokens: int
    folder: Path
    layers: int

    def layer(self, index: int) -> LayerStatistics:
        return LayerStatistics(**load_layer(self.folder, index, _MOMENTS))

    def has_layer(self, index: int) -> bool:
        """Whether its file is there and sound."""
        return find_layer(self.folder, index, _MOMENTS) is not None

    @property
    def head_input(self) -> torch.Tensor:
        """H of what the head reads."""
        return load_layer(self.folder, self.layers, {_HEAD_INPUT})[_HEAD_INPUT]

    @property
    def is_complete(self) -> bool:
        """Whether all files are there and sound."""
        is_known = is_complete(self.folder, self.layers, _MOMENTS)
        return is_known and find_layer(self.folder, self.layers, {_HEAD_INPUT}) is not None


def statistics_key(loaded: LoadedModel, windows: torch.Tensor) -> str:
    """Sixteen hex digits, equal where `collect` would store the same numbers."""
    digest = hashlib.sha256(f"{_VERSION} {loaded.fingerprint} {fast_dtype()} {tuple(windows.shape)}".encode())
    digest.update(windows.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def collect(
    loaded: LoadedModel,
    windows: torch.Tensor,
    cache_dir: Path,
    progress: Progress = lambda done, total, what: None,
) -> Statistics:
    """Run token windows [N, T] through the model once, or find that pass in `cache_dir`.

    One that was killed goes on, a damaged one is run again.
    """
    key = statistics_key(loaded, windows)
    statistics = Statistics(key, windows.numel(), cache_dir / f"statistics-{key}", len(loaded.layers))
    if statistics.is_complete:
        return statistics
    rows = max(1, _TOKENS_AT_ONCE // windows.shape[1])
    dtype = fast_dtype()
    checkpoint = StreamCheckpoint(statistics.folder)
    known = checkpoint.load(streams=1)
    if known is not None and all(statistics.has_layer(index) for index in range(known[0])):
        first, (batches,) = known
    else:
        first, batches = 0, [loaded.embed(batch) for batch in torch.split(windows, rows)]
    for index, layer in list(enumerate(loaded.layers))[first:]:
        progress(index, statistics.layers, f"calibrating layer {index}")
        sums: dict[str, torch.Tensor] = {}
        hooks = [
            layer.get_submodule(path).register_forward_hook(_summing(sums, name, normed))
            for name, (path, normed) in _inputs(loaded).items()
        ]
        with computing(dtype):
            for number, batch in enumerate(batches):  # one by one, so that no two layers' streams are there at once
                batches[number] = loaded.run_layer(index, batch)
        for hook in hooks:
            hook.remove()
        save_layer(statistics.folder, index, asdict(LayerStatistics(**sums)))
        checkpoint.save_if_due(index + 1, batches)
    H = torch.zeros(loaded.shape.hidden_size, loaded.shape.hidden_size)
    for batch in batches:
        add_second_moments(H, loaded.final_norm(batch).flatten(0, -2))
    save_layer(statistics.folder, statistics.layers, {_HEAD_INPUT: H})
    checkpoint.remove()
    return statistics


def _inputs(loaded: LoadedModel) -> dict[str, tuple[str, bool]]:
    """Which projection reads it, and whether what that makes of it is normed."""
    family = loaded.family
    return {
        "attention_input": (family.query, False),
        "attention_output": (family.output, bool(family.attention_post_norm)),
        "mlp_input": (family.up, False),
        "mlp_output": (family.down, bool(family.mlp_post_norm)),
    }


def _summing(
    sums: dict[str, torch.Tensor], name: str, normed: bool
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        if normed:
            x = x / sizes(output.flatten(0, -2))
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1])
        add_second_moments(sums[name], x)

    return hook


def sizes(rows: torch.Tensor) -> torch.Tensor:
    """Root mean squares [tokens, 1] of rows [tokens, out], by which a norm divides them."""
    return rows.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """`moments(x, x)` in two thirds of the time: what lies below the diagonal is copied."""
    H = torch.zeros(x.shape[1], x.shape[1])
    add_second_moments(H, x)
    return H


def add_second_moments(H: torch.Tensor, x: torch.Tensor) -> None:
    """Add them to H in place: the sums of a wide map alone may take half a gigabyte."""
    for start in range(0, len(H), _COLUMNS_AT_ONCE):
        stop = start + _COLUMNS_AT_ONCE
        H[start:stop, start:] += moments(x[:, start:stop], x[:, start:])
        H[stop:, start:stop] = H[start:stop, stop:].T


def moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x^T y [in, out] in fp32 of x [tokens, in] and y [tokens, out], which are read in `fast_dtype`.

    Products are exact and their sums fp32; autocast would round the sums, too, and no Cholesky survives that. What a
    matrix product made is in that dtype anyway, and with it this takes a third of the time.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast_dtype() == torch.bfloat16 else "highest")
    try:
        with torch.autocast("cpu", enabled=False):
            return x.float().T @ y.float()
    finally:
        torch.set_float32_matmul_precision(before)


def save_layer(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write one layer's tensors; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}-{index}.partial"
    save_file(tensors, partial)
    partial.replace(_file(folder, index))


def load_layer(folder: Path, index: int, names: set[str]) -> dict[str, torch.Tensor]:
    """One layer's tensors; ValueError where the file is damaged or lacks one of `names`."""
    file = _file(folder, index)
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"wanted cached tensors in {file}, got: {error}; delete {folder} to have it rebuilt"
        ) from error
    if not names <= tensors.keys():
        raise ValueError(f"wanted {sorted(names)} in {file}, got {sorted(tensors)}; delete {folder} to have it rebuilt")
    return tensors


def find_layer(folder: Path, index: int, names: set[str]) -> dict[str, torch.Tensor] | None:
    """The same, or None where the file is not there, damaged, or lacks one."""
    try:
        return load_layer(folder, index, names)
    except ValueError:
        return None


def is_complete(folder: Path, layers: int, names: set[str]) -> bool:
    """Whether every layer's file is there and sound."""
    return all(find_layer(folder, index, names) is not None for index in range(layers))


def _file(folder: Path, index: int) -> Path:
    return folder / f"layer_{index:03d}.safetensors"
