"""What a busy neighbour does to a measured latency: ours, told beside references, and the plain median's.

A second process loads one core half of the time; quiet and disturbed runs take turns.

    python benchmarks/timing_noise.py --json benchmarks/results/timing_noise.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from export import BUILDERS
from hw_profiles import BlockShape, ModelShape, Workload, detect, runtime
from hw_profiles.references import at_profile_speed, reference_shapes
from hw_profiles.runtimes import Session
from hw_profiles.shapes import QUANTIZATION_BLOCK_SIZE, Precision
from hw_profiles.timing import measure

#: SmolLM2-135M, and the same with two thirds of its KV groups and half of its width in every layer.
FULL = ModelShape(576, 64, 49152, True, (BlockShape(9, 3, 1536),) * 30)
SUBNET = replace(FULL, blocks=(BlockShape(6, 2, 768 // QUANTIZATION_BLOCK_SIZE * QUANTIZATION_BLOCK_SIZE),) * 30)
WORKLOADS = [Workload("prefill", 128), Workload("decode", 128)]
RUNTIMES = ("onnxruntime", "openvino")
LOAD_PERIOD_S = 0.2
MOST_CHANGE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="quiet and disturbed runs, each so many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="int8", choices=["fp32", "int8", "int4"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    turns, rounds = (1, 5) if arguments.quick else (arguments.turns, arguments.rounds)
    rows = [row for name in RUNTIMES for row in changes(name, arguments.precision, turns, rounds)]
    table = Table("runtime", "phase", "plain median moves by", "beside the references it moves by")
    for row in rows:
        table.add_row(row["runtime"], row["phase"], f"{row['plain']:+.1%}", f"{row['beside_references']:+.1%}")
    Console().print(table)
    if arguments.json:
        bars = [
            {
                "name": f"{row['runtime']}, {row['phase']}: change under load beside the references",
                "value": abs(row["beside_references"]),
                "limit": MOST_CHANGE,
                "holds": abs(row["beside_references"]) < MOST_CHANGE < abs(row["plain"]),
            }
            for row in rows
        ]
        device = detect()
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": {"name": device.name, "cores": device.cores},
            "versions": {name: runtime(name).version() for name in RUNTIMES},
            "turns": turns,
            "rounds": rounds,
            "changes": rows,
            "bars": bars,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def changes(name: str, precision: Precision, turns: int, rounds: int) -> list[dict[str, float | str]]:
    """By phase, how far the median over turns of each kind of measurement moves when a neighbour is busy."""
    engine, threads = runtime(name), detect().cores
    plain_ms: dict[tuple[str, bool], list[float]] = {}
    ours_ms: dict[tuple[str, bool], list[float]] = {}
    references = {shape.id: shape for shape in reference_shapes(FULL)}
    with tempfile.TemporaryDirectory() as scratch:
        sessions: dict[str, Session] = {}
        for label, shape in {**references, "subnet": SUBNET}.items():
            folder = Path(scratch, label)
            folder.mkdir()
            sessions[label] = engine.load(BUILDERS[name](shape, precision, folder), threads, 256)
        profile_ms: dict[str, dict[str, float]] = {}
        for turn in range(turns):
            for busy in (False, True):
                with neighbour() if busy else quiet():
                    timings = measure(
                        sessions, list(references), WORKLOADS,
                        vocab_size=FULL.vocab_size, rounds=rounds, seed=2 * turn + busy,
                    )  # fmt: skip
                    alone = measure(
                        {"subnet": sessions["subnet"]}, ["subnet"], WORKLOADS,
                        vocab_size=FULL.vocab_size, rounds=rounds, seed=2 * turn + busy, sleep=lambda seconds: None,
                    )  # fmt: skip
                for work in WORKLOADS:
                    timing = timings["subnet", work]
                    first_ms = profile_ms.setdefault(work.phase, timing.references_ms)
                    value_ms = at_profile_speed(timing.ratio, timing.references_ms, first_ms)
                    ours_ms.setdefault((work.phase, busy), []).append(value_ms)
                    plain_ms.setdefault((work.phase, busy), []).append(alone["subnet", work].median_ms)
        sessions.clear()

    def change(values: dict[tuple[str, bool], list[float]], phase: str) -> float:
        return float(np.median(values[phase, True]) / np.median(values[phase, False]) - 1)

    return [
        {
            "runtime": name,
            "phase": work.phase,
            "plain": change(plain_ms, work.phase),
            "beside_references": change(ours_ms, work.phase),
        }
        for work in WORKLOADS
    ]


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that computes for half of each period."""
    process = multiprocessing.get_context("spawn").Process(target=compute_half_of_the_time, daemon=True)
    process.start()
    time.sleep(1.0)  # until it runs
    try:
        yield
    finally:
        process.terminate()
        process.join()


@contextmanager
def quiet() -> Iterator[None]:
    time.sleep(1.0)
    yield


def compute_half_of_the_time() -> None:
    while True:
        until = time.perf_counter() + LOAD_PERIOD_S / 2
        while time.perf_counter() < until:
            pass
        time.sleep(LOAD_PERIOD_S / 2)


if __name__ == "__main__":
    main()
