import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import Store
from nas.pareto import hypervolume
from nas.quality import Quality
from nas.search import SearchSettings, quality_features, search
from nas.space import SearchSpace
from nas.study import ALGORITHMS, Algorithm, Study, Trial
from nas.subnet import SKIPPED, LayerChoice, Subnet
from tests.nas.synthetic import SyntheticEvaluator, latency_ms, tiny_space

SETTINGS = SearchSettings(evaluations=26, batch=6, seeds_per_bits=5, population=24, generations=8)
REFERENCE = (3.0, 12.0)


def open_study(store: Store, space: SearchSpace) -> Study:
    return Study.create(store, "s", "a model", "0123", space, {"windows": 2})


def run(store: Store, evaluator: SyntheticEvaluator, settings: SearchSettings = SETTINGS) -> list[Trial]:
    return search(evaluator.space, evaluator, latency_ms, open_study(store, evaluator.space), settings)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "search.db")) as opened:
        yield opened


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], SyntheticEvaluator]:
    """A run of SETTINGS in a database of its own, and what it evaluated."""
    evaluator = SyntheticEvaluator(tiny_space())
    with Store(str(tmp_path_factory.mktemp("reference") / "search.db")) as opened:
        return run(opened, evaluator), evaluator


def objectives(subnets: list[Subnet]) -> list[tuple[float, float]]:
    kl = [SyntheticEvaluator(tiny_space()).kl(subnet) for subnet in subnets]
    return list(zip(kl, latency_ms(subnets).tolist(), strict=True))


def test_runs_to_the_count_in_order_without_duplicates(
    uninterrupted: tuple[list[Trial], SyntheticEvaluator],
) -> None:
    trials, evaluator = uninterrupted
    space = evaluator.space
    assert [t.subnet for t in trials[:2]] == [space.full(8), space.full(4)]
    roles = [trial.role for trial in trials]
    assert roles == sorted(roles, key=["full", "seed", "search"].index)
    assert [roles.count(role) for role in ("full", "seed")] == [2, 10]
    assert len(trials) == 2 + SETTINGS.evaluations
    assert len({trial.subnet for trial in trials}) == len(trials)
    assert evaluator.evaluated == [trial.subnet for trial in trials]
    assert all(trial.quality.kl == evaluator.kl(trial.subnet) for trial in trials)
    assert len(set(evaluator.scored)) == len(evaluator.scored)
    assert all(trial.subnet in space and any(c.num_key_value_heads for c in trial.subnet.layers) for trial in trials)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layers_are_alike_throughout_where_they_should(store: Store, algorithm: Algorithm) -> None:
    space = tiny_space(homogeneous=True)
    trials = run(store, SyntheticEvaluator(space), replace(SETTINGS, algorithm=algorithm, budget_ms=6.0))
    assert len(trials) == 2 + SETTINGS.evaluations or algorithm == "additive"
    assert all(trial.subnet in space and len({*trial.subnet.layers} - {SKIPPED}) == 1 for trial in trials)


def test_beats_as_many_random_subnets(uninterrupted: tuple[list[Trial], SyntheticEvaluator]) -> None:
    found = hypervolume(objectives([trial.subnet for trial in uninterrupted[0]]), REFERENCE)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        random = [tiny_space().sample(rng) for _ in uninterrupted[0]]
        assert found > 1.03 * hypervolume(objectives(random), REFERENCE)


def test_rounds_of_search_improve_on_the_seeds(uninterrupted: tuple[list[Trial], SyntheticEvaluator]) -> None:
    trials = uninterrupted[0]
    seeds = [trial.subnet for trial in trials if trial.role != "search"]
    assert hypervolume(objectives([t.subnet for t in trials]), REFERENCE) > hypervolume(objectives(seeds), REFERENCE)


def test_a_budget_draws_trials_below_it(store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator]) -> None:
    budget_ms = 4.0
    settings = SearchSettings(**{**vars(SETTINGS), "budget_ms": budget_ms})
    with_budget = run(store, SyntheticEvaluator(tiny_space()), settings)

    def best(trials: list[Trial]) -> float:
        return min(t.quality.kl for t in trials if latency_ms([t.subnet])[0] <= budget_ms)

    def near(trials: list[Trial]) -> int:
        return sum(0.85 * budget_ms <= latency_ms([t.subnet])[0] <= budget_ms for t in trials if t.role == "search")

    assert near(with_budget) > near(uninterrupted[0])
    assert best(with_budget) <= best(uninterrupted[0])


class _WithTask(SyntheticEvaluator):
    """Beside the KL a task that attention alone matters to."""

    def evaluate(self, subnet: Subnet) -> Quality:
        return replace(super().evaluate(subnet), task_loss=self.task_loss(subnet))

    def task_loss(self, subnet: Subnet) -> float:
        with_mlps = tuple(LayerChoice(layer.num_key_value_heads, 128) for layer in subnet.layers)
        return 1 + 0.2 * self.kl(replace(subnet, layers=with_mlps))


def test_a_task_takes_the_place_of_kl(store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator]) -> None:
    evaluator = _WithTask(tiny_space())
    by_task = run(store, evaluator)
    assert len(by_task) == len(uninterrupted[0])

    def hypervolume_of(trials: list[Trial]) -> float:
        losses = [evaluator.task_loss(trial.subnet) for trial in trials]
        values_ms = latency_ms([trial.subnet for trial in trials]).tolist()
        return hypervolume(list(zip(losses, values_ms, strict=True)), (2.0, 12.0))

    assert hypervolume_of(by_task) > hypervolume_of(uninterrupted[0])
    assert all(trial.quality.loss == evaluator.task_loss(trial.subnet) for trial in by_task)


@pytest.mark.parametrize("stop", [0, 5, 24, 25, 31, 45])
def test_resumed_search_ends_like_the_uninterrupted_one(
    store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator], stop: int
) -> None:
    """Two full models come first, then 24 scores and the seeds; 45 is in the middle of the second round."""
    trials, reference = uninterrupted
    assert len(reference.scored) == 6 * 4
    first = SyntheticEvaluator(tiny_space(), fails_after=stop)
    with pytest.raises(RuntimeError, match="stop here"):
        run(store, first)
    again = SyntheticEvaluator(tiny_space())
    resumed = run(store, again)
    assert resumed == trials
    assert open_study(store, tiny_space()).trials() == trials
    assert first.evaluated + again.evaluated == reference.evaluated
    assert first.scored + again.scored == reference.scored


def test_a_finished_search_evaluates_nothing_and_goes_on_where_more_is_asked(
    store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator]
) -> None:
    short = SearchSettings(**{**vars(SETTINGS), "evaluations": 10 + SETTINGS.batch})
    run(store, SyntheticEvaluator(tiny_space()), short)
    idle, further = SyntheticEvaluator(tiny_space()), SyntheticEvaluator(tiny_space())
    assert run(store, idle, short) == uninterrupted[0][: 2 + short.evaluations]
    assert idle.evaluated == idle.scored == []
    assert run(store, further) == uninterrupted[0]
    assert len(further.evaluated) == SETTINGS.evaluations - short.evaluations


def test_another_seed_searches_elsewhere_in_the_same_study(
    store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator]
) -> None:
    evaluator = SyntheticEvaluator(tiny_space())
    run(store, evaluator)
    before = list(evaluator.evaluated)
    other = run(store, evaluator, SearchSettings(**{**vars(SETTINGS), "seed": 1}))
    assert len(other) == len(uninterrupted[0])
    assert [t.role for t in other] == [t.role for t in uninterrupted[0]]
    assert {t.subnet for t in other} - set(before) == set(evaluator.evaluated[len(before) :]) != set()
    assert len(set(evaluator.evaluated)) == len(evaluator.evaluated)


def test_a_small_space_is_searched_to_its_end(store: Store) -> None:
    space = SearchSpace(tiny_space(2).base, (0, 2), (0, 128), (8,))
    trials = run(store, SyntheticEvaluator(space), SearchSettings(**{**vars(SETTINGS), "evaluations": 40}))
    choices = [LayerChoice(groups, width) for groups in (0, 2) for width in (0, 128)]
    everything = {Subnet((a, b), 8) for a in choices for b in choices if a.num_key_value_heads + b.num_key_value_heads}
    assert len(everything) == 12
    assert {trial.subnet for trial in trials} == everything
    assert len(trials) == 12


@pytest.mark.parametrize("settings", [{"evaluations": 0}, {"batch": 0}, {"population": 3}])
def test_settings_that_make_no_search_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SearchSettings(**settings)


SEARCHER = """
import sys
sys.path.insert(0, {root!r})
from tests.nas.test_search import *
with Store({path!r}) as store:
    print("started", flush=True)
    run(store, SyntheticEvaluator(tiny_space(), seconds=0.05))
"""


def test_a_killed_search_goes_on_after_the_last_trial(
    tmp_path: Path, uninterrupted: tuple[list[Trial], SyntheticEvaluator]
) -> None:
    trials, reference = uninterrupted
    root, path = Path(__file__).parents[2], tmp_path / "killed.db"
    command = [sys.executable, "-c", SEARCHER.format(root=str(root), path=str(path))]
    with Store(str(path)) as store, subprocess.Popen(command, stdout=subprocess.PIPE) as searcher:
        assert searcher.stdout
        assert searcher.stdout.readline() == b"started\n"
        study = open_study(store, tiny_space())
        deadline = time.monotonic() + 60
        while len(study.trials()) < 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(searcher.pid, signal.SIGKILL)
        assert searcher.wait() == -signal.SIGKILL
        done = study.trials()
        assert 15 <= len(done) < len(trials)
        assert done == trials[: len(done)]
        again = SyntheticEvaluator(tiny_space())
        assert run(store, again) == trials
        assert study.trials() == trials
    assert again.evaluated == reference.evaluated[len(done) :]
    assert again.scored == []


def test_mixed_bits_beat_uniform_ones(store: Store, uninterrupted: tuple[list[Trial], SyntheticEvaluator]) -> None:
    space = tiny_space(mixed_bits=True)
    evaluator = SyntheticEvaluator(space)
    trials = run(store, evaluator)
    assert all(trial.subnet in space for trial in trials)
    assert sum(trial.subnet.is_mixed for trial in trials) > len(trials) / 3
    # each whole part is rounded alone, once
    assert len(set(evaluator.scored)) == len(evaluator.scored)
    whole = [scored for scored in evaluator.scored if scored[1:] in (("attention", 2), ("mlp", 128))]
    assert len(whole) == 2 * space.depth
    assert evaluator.scored_heads == 1
    assert any(trial.subnet.head_bits for trial in trials)
    found, uniform = (
        np.array([(trial.quality.kl, *latency_ms([trial.subnet])) for trial in made])
        for made in (trials, uninterrupted[0])
    )
    assert hypervolume(found, np.array(REFERENCE)) > hypervolume(uniform, np.array(REFERENCE))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_searches_mixed_bits(store: Store, algorithm: Algorithm) -> None:
    space = tiny_space(3, mixed_bits=True)
    trials = run(store, SyntheticEvaluator(space), replace(SETTINGS, algorithm=algorithm, evaluations=60))
    assert any(trial.subnet.is_mixed for trial in trials)
    assert quality_features(space, [trial.subnet for trial in trials]).shape == (len(trials), 4 * 3 + 1 + 4 + 2)
