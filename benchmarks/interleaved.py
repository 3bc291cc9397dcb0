"""Files of one runtime timed side by side, each loaded several times: the pages that it lands on are noise, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hw_profiles import Workload, detect, runtime
from hw_profiles.timing import Timing, measure, pooled, tokens_needed


@dataclass(frozen=True)
class Repeats:
    """Of each file, and of all files within a load of them."""

    loads: int
    rounds: int
    seed: int = 0


def timed(
    name: str,
    paths: Mapping[str, Path],
    reference: str,
    workloads: Sequence[Workload],
    vocab_size: int,
    repeats: Repeats,
) -> dict[tuple[str, Workload], Timing]:
    """Of each of `paths`, by label, on each workload; ratios are to the one labelled `reference`."""
    engine, threads = runtime(name), detect().cores
    batches = []
    for seed in range(repeats.seed, repeats.seed + repeats.loads):
        sessions = {label: engine.load(path, threads, tokens_needed(workloads)) for label, path in paths.items()}
        batches.append(
            measure(sessions, [reference], workloads, vocab_size=vocab_size, rounds=repeats.rounds, seed=seed)
        )
    return {key: pooled([timings[key] for timings in batches]) for key in batches[0]}
