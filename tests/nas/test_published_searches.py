from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import Store
from nas.evolution import keeps_attention
from nas.pareto import hypervolume
from nas.published_searches import PUBLISHED
from nas.search import SearchSettings, search
from nas.space import SearchSpace
from nas.study import Study, Trial
from tests.nas.synthetic import SyntheticEvaluator, latency_ms, tiny_space

REFERENCE = (3.0, 12.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "search.db")) as opened:
        yield opened


def run(store: Store, evaluator: SyntheticEvaluator, algorithm: str, evaluations: int) -> list[Trial]:
    space = evaluator.space
    study = Study.create(store, algorithm, "a model", "0123", space, {"windows": 2})
    settings = SearchSettings(evaluations=evaluations, algorithm=algorithm)
    return search(space, evaluator, latency_ms, study, settings)


def found(trials: Sequence[Trial]) -> float:
    values_ms = latency_ms([trial.subnet for trial in trials])
    return hypervolume(np.column_stack([[trial.quality.kl for trial in trials], values_ms]), REFERENCE)


@pytest.mark.parametrize("algorithm", sorted(PUBLISHED))
def test_spends_its_evaluations_on_different_subnets_and_none_on_parts(store: Store, algorithm: str) -> None:
    evaluator = SyntheticEvaluator(tiny_space())
    trials = run(store, evaluator, algorithm, 70)
    assert len(evaluator.evaluated) == 2 + 70
    assert len({trial.subnet for trial in trials}) == len(trials) == len(evaluator.evaluated)
    assert not evaluator.scored
    assert all(keeps_attention(trial.subnet) for trial in trials)


@pytest.mark.parametrize("algorithm", sorted(PUBLISHED))
def test_goes_on_where_it_was_stopped(store: Store, tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(RuntimeError, match="stop here"):
        run(store, SyntheticEvaluator(tiny_space(), fails_after=60), algorithm, 70)
    resumed = run(store, SyntheticEvaluator(tiny_space()), algorithm, 70)
    with Store(str(tmp_path / "other.db")) as other:
        assert resumed == run(other, SyntheticEvaluator(tiny_space()), algorithm, 70)


def test_linas_finds_more_than_chance_and_half_the_evaluations_of_the_seeded_search_more_than_all(store: Store) -> None:
    by_name = {name: found(run(store, SyntheticEvaluator(tiny_space()), name, 150)) for name in PUBLISHED}
    assert by_name["random"] < by_name["linas"]
    assert max(by_name.values()) < found(run(store, SyntheticEvaluator(tiny_space()), "seeded", 75))


def test_later_generations_of_nsga2_are_better(store: Store) -> None:
    trials = run(store, SyntheticEvaluator(tiny_space()), "nsga2", 200)[2:]
    assert found(trials[-50:]) > 1.02 * found(trials[:50])


@pytest.mark.parametrize("algorithm", sorted(PUBLISHED))
def test_ends_where_the_space_is_used_up(store: Store, algorithm: str) -> None:
    space = SearchSpace(tiny_space(1).base, (0, 1, 2), (0, 64, 128), (8,))
    trials = run(store, SyntheticEvaluator(space), algorithm, evaluations=50)
    assert len({trial.subnet for trial in trials}) == len(trials) <= 6


def test_the_additive_search_evaluates_the_solvers_subnets_alone(store: Store) -> None:
    evaluator = SyntheticEvaluator(tiny_space())
    trials = run(store, evaluator, "additive", 12)
    assert {trial.role for trial in trials} == {"full", "seed"}
    assert len(trials) == 2 + 12
    assert evaluator.scored


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted an algorithm out of seeded, additive"):
        SearchSettings(algorithm="hill-climb")
