"""How much of the front searches find for their true evaluations: ours beside NSGA-II, LINAS, the solver and chance.

Quality is KL to the full model, latency the predicted TPOT of a profiled device; model, space and profile are those
of a database such as `make demo` leaves. Each search has a study of its own: stopped, it goes on where it was.

    python benchmarks/search_gain.py --database demo/llm-nas.db --json benchmarks/results/search_gain.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from rich.console import Console
from rich.table import Table

from hw_profiles import Store, Workload, detect
from nas.families import load_model
from nas.latency import LatencyModel
from nas.pareto import hypervolume
from nas.protocol import EvaluationProtocol, open_evaluator, open_supernet
from nas.published_searches import PUBLISHED
from nas.search import SearchSettings, score_parts, search
from nas.study import ALGORITHMS, Algorithm, Study, Trial
from nas.terminal import progress_bar

EVALUATIONS = (50, 100, 250)
RUNTIME = "openvino"
WORKLOAD = Workload("decode", 128)
#: A worse subnet adds nothing; the slowest full model bounds the other side.
WORST_KL = 2.5

console = Console(width=140)


@dataclass(frozen=True)
class Row:
    algorithm: Algorithm
    seed: int
    #: Beside the full models, which all searches evaluate.
    evaluations: int
    #: Of the rectangle between nothing and (WORST_KL, the slowest full model's TPOT), the share dominated.
    hypervolume: float
    #: KLs of one part replaced alone, on half of the text, that the search has besides.
    part_scores: int
    #: Of the true evaluations alone.
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments.database, arguments.study, arguments.folder)
    rows = [
        bench.row(algorithm, seed, evaluations)
        for seed in range(arguments.seeds)
        for algorithm in arguments.algorithm
        for evaluations in arguments.evaluations
    ]
    print_table(rows)
    if arguments.json:
        said = {
            "model": bench.loaded.name,
            "space": bench.space.size,
            "runtime": RUNTIME,
            "workload": asdict(WORKLOAD),
            "worst_kl": WORST_KL,
            "slowest_ms": bench.slowest_ms,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True, help="with a profile of this machine and a study")
    parser.add_argument("--study", default="demo", help="whose model and space are searched")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--folder", type=Path, default=Path("build/search_gain"), help="for trials and the cache")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Bench:
    def __init__(self, database: str, study: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        device = detect()
        with Store(database) as profiled:
            base = Study.load(profiled, study)
            self.latency = LatencyModel.fit(
                profiled, device.id, RUNTIME, device.cores, base.space, WORKLOAD, learn_from_finalists=False
            )
        self.space = base.space
        self.loaded = load_model(base.model)
        protocol = EvaluationProtocol()
        self.protocol = protocol.to_dict()
        self.evaluator = open_evaluator(open_supernet(self.loaded, self.space, protocol, folder / "cache"), protocol)
        self.store = Store(str(folder / "trials.db"))
        self.model = base.model
        self.slowest_ms = float(max(self.latency.value_ms([self.space.full(b) for b in self.space.bits_choices])))

    def row(self, algorithm: Algorithm, seed: int, evaluations: int) -> Row:
        name = f"{algorithm} {seed}"
        if algorithm == "additive":
            name += f" {evaluations}"  # its subnets depend on how many are asked for
        study = self._study(name)
        if algorithm not in PUBLISHED:
            known = study.scores()
            for score, kl in self.part_scores.items():
                if score not in known:
                    study.add_score(score, kl)
        settings = SearchSettings(evaluations=evaluations, seed=seed, algorithm=algorithm)
        with progress_bar(f"{name}, {evaluations}") as progress:
            trials = search(self.space, self.evaluator, self.latency.value_ms, study, settings, progress)
        return Row(
            algorithm,
            seed,
            len(trials) - len(self.space.bits_choices),
            self._hypervolume(trials),
            len(study.scores()),
            round(sum(trial.quality.seconds for trial in trials), 1),
        )

    @cached_property
    def part_scores(self) -> dict[str, float]:
        """Made once for all searches that use them."""
        study = self._study("part scores")
        with progress_bar("part scores") as progress:
            score_parts(self.space, self.evaluator, study, progress)
        return study.scores()

    def _study(self, name: str) -> Study:
        return Study.create(self.store, name, self.model, self.loaded.fingerprint, self.space, self.protocol)

    def _hypervolume(self, trials: Sequence[Trial]) -> float:
        points = np.column_stack([[t.quality.kl for t in trials], self.latency.value_ms([t.subnet for t in trials])])
        return hypervolume(points, (WORST_KL, self.slowest_ms * 1.001)) / (WORST_KL * self.slowest_ms * 1.001)


def print_table(rows: Sequence[Row]) -> None:
    counts = sorted({row.evaluations for row in rows})
    table = Table("", *(f"{count} evaluations" for count in counts), title="share of the hypervolume")
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        table.add_row(algorithm, *(_spread(rows, algorithm, count) for count in counts))
    console.print(table)


def _spread(rows: Sequence[Row], algorithm: Algorithm, evaluations: int) -> str:
    found = [r.hypervolume for r in rows if (r.algorithm, r.evaluations) == (algorithm, evaluations)]
    if not found:
        return ""
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")


if __name__ == "__main__":
    main()
