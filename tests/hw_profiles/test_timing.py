from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import pytest

from hw_profiles.runtimes import Session
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.shapes import Workload
from hw_profiles.timing import (
    PASSES,
    PROMPT_RUNS,
    REPEATED_PROMPT_TOKENS,
    SETTLE_S,
    WARM_STEPS,
    measure,
    tokens_needed,
)

WORKLOADS = [
    Workload("prefill", 16),
    Workload("decode", 16),
    Workload("decode", 4),
    Workload("decode", 8, batch_size=2),
]
REFERENCE = FakeModel(base_ms=4.0, token_ms=0.5, context_ms=0.25)
HALF = FakeModel(base_ms=2.0, token_ms=0.25, context_ms=0.125)


class Clock:
    """Time that passes only when a session works or the timer sleeps, faster or slower as the machine drifts."""

    def __init__(self, drift: Callable[[float], float] = lambda now_s: 1.0) -> None:
        self.now_s = 0.0
        self._drift = drift

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds * self._drift(self.now_s)


def load(tmp_path: Path, models: dict[str, FakeModel], wait: Callable[[float], None]) -> dict[str, Session]:
    engine = FakeRuntime(wait)
    sessions: dict[str, Session] = {}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        sessions[name] = engine.load(model.write(tmp_path / name), threads=1, max_tokens=64)
    return sessions


def test_times_follow_the_programmed_formula(tmp_path: Path) -> None:
    clock = Clock()
    sessions = load(tmp_path, {"full": REFERENCE, "half": HALF}, clock.wait)
    timings = measure(
        sessions, ["full"], WORKLOADS, vocab_size=16, rounds=3, decode_steps=5, clock=clock, sleep=clock.wait
    )
    assert set(timings) == {(name, work) for name in ("full", "half") for work in WORKLOADS}
    expected_ms = {
        WORKLOADS[0]: 4.0 + 16 * 0.5,
        # the median of five steps is the third, two tokens later; the context is no shorter than the untimed steps
        WORKLOADS[1]: 4.0 + 0.5 + (max(16, WARM_STEPS) + 2) * 0.25,
        WORKLOADS[2]: 4.0 + 0.5 + (WARM_STEPS + 2) * 0.25,
        WORKLOADS[3]: 4.0 + 2 * (0.5 + (WARM_STEPS + 2) * 0.25),
    }
    for work, value_ms in expected_ms.items():
        full, half = timings["full", work], timings["half", work]
        assert full.ratio == pytest.approx(1.0)
        assert full.median_ms == full.references_ms["full"] == half.references_ms["full"] == pytest.approx(value_ms)
        assert half.ratio == pytest.approx(0.5)
        assert half.median_ms == pytest.approx(value_ms / 2)
        assert half.repeats == (3 if work.phase == "prefill" else 3 * PASSES)
        assert half.spread_ratio == pytest.approx(0.0, abs=1e-9)


def test_decode_on_an_empty_cache(tmp_path: Path) -> None:
    clock, work = Clock(), Workload("decode", 0)
    sessions = load(tmp_path, {"full": REFERENCE}, clock.wait)
    timing = measure(sessions, ["full"], [work], vocab_size=16, rounds=1, decode_steps=3, clock=clock, sleep=clock.wait)
    assert timing["full", work].median_ms == pytest.approx(4.0 + 0.5 + (WARM_STEPS + 1) * 0.25)


def test_the_tokens_needed_are_those_fed(tmp_path: Path) -> None:
    for work, needed in ((Workload("prefill", 16), 16), (Workload("decode", 3), 23), (Workload("decode", 40), 43)):
        assert tokens_needed([work], decode_steps=3) == needed
        clock = Clock()
        REFERENCE.write(tmp_path)
        session = FakeRuntime(clock.wait).load(tmp_path, threads=1, max_tokens=needed)
        measure({"full": session}, ["full"], [work], vocab_size=16, decode_steps=3, clock=clock, sleep=clock.wait)


@pytest.mark.parametrize(
    ("step_ms", "untimed", "timed"), [(1.0, 20, 9), (10.0, 20, 9), (12.0, 17, 9), (20.0, 10, 5), (500.0, 1, 4)]
)
def test_slow_models_take_fewer_steps(tmp_path: Path, step_ms: float, untimed: int, timed: int) -> None:
    clock, work = Clock(), Workload("decode", 40)
    sessions = load(tmp_path, {"full": FakeModel(base_ms=step_ms)}, clock.wait)
    steps = 0

    def counted(token_ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> object:
        nonlocal steps
        steps += 1
        return original(token_ids)

    original, sessions["full"].step = sessions["full"].step, counted  # type: ignore[method-assign, assignment]
    measure(sessions, ["full"], [work], vocab_size=16, rounds=1, decode_steps=9, clock=clock, sleep=clock.wait)
    assert steps == (1 + PASSES) * (1 + untimed + timed)


@pytest.mark.parametrize(
    ("work", "runs"),
    [
        (Workload("prefill", REPEATED_PROMPT_TOKENS), PROMPT_RUNS),
        (Workload("prefill", REPEATED_PROMPT_TOKENS // 2, 2), PROMPT_RUNS),
        (Workload("prefill", REPEATED_PROMPT_TOKENS // 2 + 1, 2), 1),
    ],
)
def test_short_prompts_run_several_times_of_which_the_first_does_not_count(work: Workload, runs: int) -> None:
    """The first run of a visit takes 9 ms, the others 4 and 6."""
    clock, prefills = Clock(), 0

    class Warming:
        def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
            pass

        def step(
            self, token_ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
        ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            nonlocal prefills
            if token_ids.shape[1] > 1:
                clock.wait(1e-3 * (9.0, 4.0, 6.0)[prefills % runs])
                prefills += 1
            return np.zeros((1, 1), np.float32)

    timing = measure({"a": Warming()}, ["a"], [work], vocab_size=4, rounds=2, clock=clock, sleep=clock.wait)
    assert timing["a", work].median_ms == pytest.approx(5.0 if runs > 1 else 9.0)
    assert prefills == 3 * runs  # to warm up, and two rounds


def test_each_session_beside_its_own_reference(tmp_path: Path) -> None:
    clock, work = Clock(), Workload("prefill", 16)
    sessions = load(tmp_path, {"full": REFERENCE, "half": HALF, "other": REFERENCE}, clock.wait)
    beside = {"full": ["full"], "half": ["half"], "other": ["half"]}
    timings = measure(sessions, beside, [work], vocab_size=16, rounds=2, clock=clock, sleep=clock.wait)
    assert [timings[name, work].ratio for name in sessions] == pytest.approx([1.0, 1.0, 2.0])
    for wrong in ({"full": ["full"]}, {key: ["third"] for key in sessions}, dict.fromkeys(sessions, ())):
        with pytest.raises(ValueError, match=r"must be among the sessions full, half, other"):
            measure(sessions, wrong, [work], vocab_size=16)


def test_several_references_count_by_their_geometric_mean(tmp_path: Path) -> None:
    clock, work = Clock(), Workload("prefill", 16)
    sessions = load(tmp_path, {"full": REFERENCE, "half": HALF, "other": REFERENCE}, clock.wait)
    timings = measure(sessions, ["full", "half"], [work], vocab_size=16, rounds=2, clock=clock, sleep=clock.wait)
    assert [timings[name, work].ratio for name in sessions] == pytest.approx([2**0.5, 2**-0.5, 2**0.5])
    assert timings["other", work].references_ms == pytest.approx({"full": 12.0, "half": 6.0})


def test_drift_cancels_in_the_ratio(tmp_path: Path) -> None:
    """The machine becomes three times slower over the session: milliseconds move, the ratio does not."""
    clock = Clock(drift=lambda now_s: 1.0 + 2.0 * min(now_s / 120.0, 1.0))
    sessions = load(tmp_path, {"full": REFERENCE, "half": HALF}, clock.wait)
    timing = measure(sessions, ["full"], WORKLOADS, vocab_size=16, rounds=25, clock=clock, sleep=clock.wait)
    for work in WORKLOADS:
        half = timing["half", work]
        assert half.spread_ms / half.median_ms > 0.1
        assert half.ratio == pytest.approx(0.5, rel=0.02)
        assert half.spread_ratio < 0.02


@pytest.mark.parametrize(
    ("references", "visited"),
    [("a", "aabcd"), ("ab", "abcd"), ("abc", "abcd"), ("abc", "abbccdefgh"), ("dabc", "abcd")],
)
def test_every_round_visits_all_in_changing_order(references: str, visited: str) -> None:
    """One reference of three others as often as their square root says, of several the smaller ones more often."""
    visits: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
            if not visits or visits[-1] != self.name:
                visits.append(self.name)

        def step(
            self, token_ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
        ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            clock.wait(1e-3)
            return np.zeros((1, 1), np.float32)

    clock = Clock()
    sessions: dict[str, Session] = {name: Recorder(name) for name in sorted(set(visited))}

    def pause(seconds: float) -> None:
        assert seconds == SETTLE_S
        visits.append("|")

    measure(sessions, references, WORKLOADS[:1], vocab_size=4, rounds=5, clock=clock, sleep=pause)
    order = "".join(visits).replace("|", "")
    warm_up = len(sessions)
    assert sorted(order[:warm_up]) == sorted(sessions)
    rounds = [order[i : i + len(visited)] for i in range(warm_up, len(order), len(visited))]
    assert len(rounds) == 5
    assert all(sorted(one) == list(visited) for one in rounds)
    assert len(set(rounds)) > 2
    assert not any(one == next_one for one, next_one in pairwise(order))  # none finds its weights in the cache


def test_the_reference_of_a_round_is_the_geometric_mean_of_its_visits() -> None:
    """The reference takes 1, 4, 1, 4 .. ms, the three others 6 ms each."""
    clock = Clock()
    reference_ms = cycle([1.0, 4.0])

    class Alternating:
        def __init__(self, name: str) -> None:
            self.name = name

        def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
            pass

        def step(
            self, token_ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
        ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            if token_ids.shape[1] > 1:  # the prefill that is timed, not the token that wakes the threads up
                clock.wait(1e-3 * (next(reference_ms) if self.name == "a" else 6.0))
            return np.zeros((1, 1), np.float32)

    sessions: dict[str, Session] = {name: Alternating(name) for name in "abcd"}
    work = Workload("prefill", REPEATED_PROMPT_TOKENS + 1)
    timing = measure(sessions, ["a"], [work], vocab_size=4, rounds=3, clock=clock, sleep=clock.wait)
    assert timing["a", work].median_ms == pytest.approx(2.0)
    assert [timing[name, work].ratio for name in "abcd"] == pytest.approx([1.0, 3.0, 3.0, 3.0])
    assert timing["b", work].repeats == 3


def test_a_known_sleep_on_the_real_clock(tmp_path: Path) -> None:
    work = Workload("prefill", 1)
    sessions = load(tmp_path, {"full": FakeModel(base_ms=20.0), "half": FakeModel(base_ms=10.0)}, time.sleep)
    timing = measure(sessions, ["full"], [work], vocab_size=4, rounds=5, decode_steps=1)
    assert timing["half", work].ratio == pytest.approx(0.5, rel=0.15)
    assert 10.0 <= timing["half", work].median_ms < 20.0


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    sessions = load(tmp_path, {"full": REFERENCE}, time.sleep)
    with pytest.raises(ValueError, match=r"among the sessions full, got \['ful'\]"):
        measure(sessions, ["ful"], WORKLOADS, vocab_size=4)
    with pytest.raises(ValueError, match=r"rounds=0"):
        measure(sessions, ["full"], WORKLOADS, vocab_size=4, rounds=0)
