"""Latency on a machine that drifts: all graphs in each round, in random order, as a ratio to references.

Minutes apart, the median of one and the same graph moved by up to 22 %; the ratio to references timed in the same
round moves much less. The references' own noise is in all ratios of a batch, so they are visited more often: with n
other graphs about sqrt(n) times a round in all, which gives the ratios the least noise for the time spent, and the
smaller ones more often than the first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from hw_profiles.runtimes import Session
from hw_profiles.shapes import PHASES, Workload

#: Idle before a visit. Worker threads of the session before go on spinning for about 35 ms (ONNX Runtime) and would
#: take a core from the session being timed.
SETTLE_S = 0.05
#: Single-token steps of which a decode latency is the median, at most; of slow models as many as take DECODE_MS, but
#: FEWEST_STEPS: what noise is left is between visits.
DECODE_STEPS = 10
DECODE_MS = 100.0
FEWEST_STEPS = 4
#: Prompts of at most so many tokens over all sequences are as noisy as single tokens and nearly as cheap: run so many
#: times in a visit, of which the first, in the caches that another model left, goes untimed.
REPEATED_PROMPT_TOKENS = 64
PROMPT_RUNS = 3
#: Untimed steps before them, at most, and the milliseconds after which they end. After another model's weights those of
#: SmolLM2 at int4 move into the caches step by step: of 84 % of it the first step took 6.7 ms, the tenth 4.9, the
#: twentieth 4.5, the fortieth 4.4, which is what generating many tokens costs. Slower models, which no cache holds,
#: cost the same at once.
WARM_STEPS = 20
WARM_MS = 200.0
#: Passes over all sessions in one round: the first for every workload, the others for decode alone, which is short and
#: noisy.
PASSES = 2
_DRAWS = 1000


@dataclass(frozen=True)
class Timing:
    """`ratio` is the median over `repeats` passes of own / geometric mean of the references.

    `references_ms` are their medians by name; spreads are half the interquartile range.
    """

    ratio: float
    spread_ratio: float
    median_ms: float
    spread_ms: float
    references_ms: dict[str, float]
    repeats: int


def measure(
    sessions: Mapping[str, Session],
    references: Sequence[str] | Mapping[str, Sequence[str]],
    workloads: Sequence[Workload],
    *,
    vocab_size: int,
    rounds: int = 9,
    decode_steps: int = DECODE_STEPS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[tuple[str, Workload], Timing]:
    """Time every session on every workload, against the sessions named `references`, or against each its own of them.

    The first of several references is the largest.

    A visit's value is one prefill, of short prompts the mean of the runs after the first, or the median of
    `decode_steps` single-token steps, fewer of slow models, from the context's length on, or from WARM_STEPS on for
    a shorter one. The values in the cache do not matter to the speed: it is made, not computed. A pass's value is
    that of the one visit, or the geometric mean over the visits of a reference. A round has one pass for every
    workload and PASSES - 1 more for decode. `clock` returns seconds.
    """
    each = references if isinstance(references, Mapping) else dict.fromkeys(sessions, references)
    beside = {name: tuple(own) for name, own in each.items()}
    named = {reference for own in beside.values() for reference in own}
    if set(beside) != set(sessions) or not all(beside.values()) or not named <= set(sessions):
        raise ValueError(f"the references must be among the sessions {', '.join(sessions)}, got {references!r}")
    if rounds < 1 or decode_steps < 1:
        raise ValueError(f"rounds and decode_steps must be 1 or more, got {rounds=} {decode_steps=}")
    rng = np.random.default_rng(seed)
    distinct = sorted(set(workloads))
    visits = list(sessions)
    for own, count in Counter(beside.values()).items():
        others = max(count - len(own), 0)
        for place, name in enumerate(own):  # all but the first take half of its time or less, and are noisier
            visits += [name] * (math.ceil(math.sqrt(others * (2 if place else 1)) / len(own)) - 1)
    times_ms: dict[tuple[str, Workload], list[float]] = {(name, work): [] for name in sessions for work in distinct}
    prefills, decodes = ([work for work in distinct if work.phase == phase] for phase in PHASES)
    passes = [distinct, *([decodes] * (PASSES - 1) if decodes else [])]
    order: list[str] = []
    # the first round warms up and does not count; decode has untimed steps of its own
    for counts, works in [(False, prefills or decodes), *[(True, works) for _ in range(rounds) for works in passes]]:
        tokens = _draw_tokens(works, decode_steps, vocab_size, rng)
        order = _order(visits if counts else list(sessions), order[-1:], rng)
        pass_ms: dict[tuple[str, Workload], list[float]] = {}
        for name in order:
            sleep(SETTLE_S)
            visit_ms = _visit(sessions[name], works, tokens, decode_steps, clock)
            for work, value_ms in visit_ms.items():
                pass_ms.setdefault((name, work), []).append(value_ms)
        for key, values_ms in pass_ms.items() if counts else ():
            times_ms[key].append(float(np.exp(np.mean(np.log(values_ms)))))
    return {
        (name, work): _summary(own_ms, {reference: times_ms[reference, work] for reference in beside[name]})
        for (name, work), own_ms in times_ms.items()
    }


def _order(visits: Sequence[str], before: Sequence[str], rng: np.random.Generator) -> list[str]:
    """A random order in which no session follows itself, where there is one, the last visit `before` included.

    Visited twice on end, a session finds its weights in the processor's cache: that would favour a reference that is
    visited more often than others.
    """
    for _ in range(_DRAWS):
        order = [visits[index] for index in rng.permutation(len(visits))]
        if all(one != next_one for one, next_one in pairwise([*before, *order])):
            break
    return order


def tokens_needed(workloads: Sequence[Workload], decode_steps: int = DECODE_STEPS) -> int:
    """The most tokens that `measure` puts into a cache."""
    return max(w.tokens if w.phase == "prefill" else max(w.tokens, WARM_STEPS) + decode_steps for w in workloads)


def _draw_tokens(
    workloads: Sequence[Workload], decode_steps: int, vocab_size: int, rng: np.random.Generator
) -> dict[int, NDArray[np.int64]]:
    """For each batch size, tokens [B, longest prompt or steps of decode], for all sessions of a pass."""
    lengths: dict[int, int] = {}
    for work in workloads:
        fed = work.tokens if work.phase == "prefill" else WARM_STEPS + decode_steps
        lengths[work.batch_size] = max(lengths.get(work.batch_size, 0), fed)
    return {batch: rng.integers(0, vocab_size, (batch, length), np.int64) for batch, length in lengths.items()}


def _visit(
    session: Session,
    workloads: Sequence[Workload],
    tokens: Mapping[int, NDArray[np.int64]],
    decode_steps: int,
    clock: Callable[[], float],
) -> dict[Workload, float]:
    """One value in milliseconds for each workload. The cache that a decode workload starts from is made, not fed."""
    values_ms: dict[Workload, float] = {}
    session.reset(new_tokens=1)
    wake_ms = _step_ms(session, next(iter(tokens.values()))[:1, :1], clock)  # also wakes the threads up
    wake_ms = max(wake_ms, 1e-3)
    warm_steps = min(WARM_STEPS, max(1, math.ceil(WARM_MS / wake_ms)))
    decode_steps = min(decode_steps, max(FEWEST_STEPS, math.ceil(DECODE_MS / wake_ms)))
    for work in workloads:
        ids = tokens[work.batch_size]
        if work.phase == "prefill":
            runs_ms = []
            for _ in range(PROMPT_RUNS if work.tokens * work.batch_size <= REPEATED_PROMPT_TOKENS else 1):
                session.reset(work.batch_size, 0, work.tokens)
                runs_ms.append(_step_ms(session, ids[:, : work.tokens], clock))
            values_ms[work] = fmean(runs_ms[1:] or runs_ms)
        else:
            steps = warm_steps + decode_steps
            session.reset(work.batch_size, max(work.tokens, WARM_STEPS) - warm_steps, steps)
            steps_ms = [_step_ms(session, ids[:, i : i + 1], clock) for i in range(steps)]
            values_ms[work] = float(np.median(steps_ms[warm_steps:]))
    session.reset(new_tokens=1)  # gives back the room that a long context took
    return values_ms


def _step_ms(session: Session, token_ids: NDArray[np.int64], clock: Callable[[], float]) -> float:
    start = clock()
    session.step(token_ids)
    return (clock() - start) * 1e3


def _summary(own_ms: Sequence[float], references_ms: Mapping[str, Sequence[float]]) -> Timing:
    ratios = np.array(own_ms) / np.exp(np.mean(np.log(list(references_ms.values())), axis=0))
    return Timing(
        ratio=float(np.median(ratios)),
        spread_ratio=_half_interquartile_range(ratios),
        median_ms=float(np.median(own_ms)),
        spread_ms=_half_interquartile_range(np.array(own_ms)),
        references_ms={name: float(np.median(values_ms)) for name, values_ms in references_ms.items()},
        repeats=len(own_ms),
    )


def pooled(timings: Sequence[Timing]) -> Timing:
    """Several calls of `measure` on one session and workload, as many passes each, as one: means of all they say."""
    return Timing(
        ratio=fmean(timing.ratio for timing in timings),
        spread_ratio=fmean(timing.spread_ratio for timing in timings),
        median_ms=fmean(timing.median_ms for timing in timings),
        spread_ms=fmean(timing.spread_ms for timing in timings),
        references_ms={name: fmean(t.references_ms[name] for t in timings) for name in timings[0].references_ms},
        repeats=sum(timing.repeats for timing in timings),
    )


def _half_interquartile_range(values: NDArray[np.float64]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2
