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
from typing import Any

import numpy as np
from bars import at_least, table_of
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
#: A worse subnet adds nothing; the slowest full model bounds the other side. Beyond the first nothing is of use, at the
#: last a subnet says words at random: searches that begin with random subnets find most of theirs between the two.
WORST_KLS = (2.5, 5.0, 10.0)
#: Evaluations after which ours should have found what LINAS finds with all of its own.
OURS, LINAS = ("seeded", 100), ("linas", 250)

console = Console(width=140)


@dataclass(frozen=True)
class Row:
    algorithm: Algorithm
    seed: int
    #: Beside the full models, which all searches evaluate.
    evaluations: int
    #: Of the rectangle between nothing and (the worst KL, the slowest full model's TPOT), the share dominated; for each
    #: of WORST_KLS.
    hypervolumes: list[float]
    #: KLs of one part replaced alone, on half of the text, that the search has besides.
    part_scores: int
    #: Of the true evaluations alone.
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments.database, arguments.study, arguments.search_windows, arguments.folder)
    rows = [
        bench.row(algorithm, seed, evaluations)
        for seed in range(arguments.seeds)
        for algorithm in arguments.algorithm
        for evaluations in arguments.evaluations
    ]
    print_tables(rows)
    if arguments.json:
        said = {
            "model": bench.loaded.name,
            "space": bench.space.size,
            "runtime": RUNTIME,
            "workload": asdict(WORKLOAD),
            "search_windows": arguments.search_windows,
            "worst_kls": WORST_KLS,
            "slowest_ms": bench.slowest_ms,
            "rows": [asdict(row) for row in rows],
            "bars": bars(rows),
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True, help="with a profile of this machine and a study")
    parser.add_argument("--study", default="demo", help="whose model and space are searched")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument(
        "--search-windows",
        type=int,
        default=EvaluationProtocol.search_windows,
        help="of 256 tokens, that an evaluation sees; half as many take half as long",
    )
    parser.add_argument("--folder", type=Path, default=Path("build/search_gain"), help="for trials and the cache")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Bench:
    def __init__(self, database: str, study: str, search_windows: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        device = detect()
        with Store(database) as profiled:
            base = Study.load(profiled, study)
            self.latency = LatencyModel.fit(
                profiled, device.id, RUNTIME, device.cores, base.space, WORKLOAD, learn_from_finalists=False
            )
        self.space = base.space
        self.loaded = load_model(base.model)
        protocol = EvaluationProtocol(search_windows=search_windows)
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
            [self._hypervolume(trials, worst_kl) for worst_kl in WORST_KLS],
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

    def _hypervolume(self, trials: Sequence[Trial], worst_kl: float) -> float:
        points = np.column_stack([[t.quality.kl for t in trials], self.latency.value_ms([t.subnet for t in trials])])
        return hypervolume(points, (worst_kl, self.slowest_ms * 1.001)) / (worst_kl * self.slowest_ms * 1.001)


def bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours against LINAS, seed by seed."""
    return [
        at_least(f"{OURS[0]} after {OURS[1]} beside {LINAS[0]} after {LINAS[1]}, to a KL of {worst_kl:g}, seed "
                 f"{ours.seed}", ours.hypervolumes[i], linas.hypervolumes[i])
        for ours in rows if (ours.algorithm, ours.evaluations) == OURS
        for linas in rows if (linas.algorithm, linas.evaluations, linas.seed) == (*LINAS, ours.seed)
        for i, worst_kl in enumerate(WORST_KLS)
    ]  # fmt: skip


def print_tables(rows: Sequence[Row]) -> None:
    counts = sorted({row.evaluations for row in rows})
    for i, worst_kl in enumerate(WORST_KLS):
        title = f"share of the hypervolume to a KL of {worst_kl:g}"
        table = Table("", *(f"{count} evaluations" for count in counts), title=title)
        for algorithm in dict.fromkeys(row.algorithm for row in rows):
            table.add_row(algorithm, *(_spread(rows, algorithm, count, i) for count in counts))
        console.print(table)
    console.print(table_of(bars(rows)))


def _spread(rows: Sequence[Row], algorithm: Algorithm, evaluations: int, worst: int) -> str:
    found = [r.hypervolumes[worst] for r in rows if (r.algorithm, r.evaluations) == (algorithm, evaluations)]
    if not found:
        return ""
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")


if __name__ == "__main__":
    main()
