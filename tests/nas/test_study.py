from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from sqlalchemy import text

from hw_profiles import Store, StoreError
from nas.quality import Quality
from nas.study import Study, StudyError, Trial
from tests.nas.synthetic import tiny_space
from tests.processes import run_at_once

SPACE = tiny_space(3)
PROTOCOL = {"windows": 2, "reform": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies.db"


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with Store(database_url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(path: Path) -> Iterator[Store]:
    with Store(str(path)) as opened:
        yield opened


def random_trials(count: int, seed: int = 0) -> list[Trial]:
    rng = np.random.default_rng(seed)
    subnets = dict.fromkeys(SPACE.sample(rng) for _ in range(3 * count))
    values = rng.lognormal(size=(len(subnets), 3))
    roles = ("full", "seed", "search")
    return [
        Trial(subnet, Quality(float(kl), float(perplexity), i, float(seconds), [None, 0.5][i % 2]), roles[i % 3])
        for i, (subnet, (kl, perplexity, seconds)) in enumerate(zip(subnets, values, strict=True))
    ][:count]


def test_what_goes_in_comes_out_in_order_to_the_last_bit(store: Store, database_url: str) -> None:
    trials = random_trials(20)
    study = Study.create(store, "s", "/models/m", "0123", SPACE, PROTOCOL)
    for trial in trials:
        study.add(trial)
    with Store(database_url) as again:
        loaded = Study.load(again, "s")
        assert loaded.trials() == trials
        assert (loaded.model, loaded.fingerprint, loaded.space, loaded.protocol) == (
            "/models/m",
            "0123",
            SPACE,
            PROTOCOL,
        )


def test_creating_again_opens_it_and_the_model_may_have_moved(store: Store) -> None:
    trials = random_trials(2)
    Study.create(store, "s", "here", "0123", SPACE, PROTOCOL).add(trials[0])
    again = Study.create(store, "s", "moved/there", "0123", SPACE, dict(reversed(PROTOCOL.items())))
    again.add(trials[1])
    assert again.trials() == trials
    assert Study.load(store, "s").model == again.model == "moved/there"


def test_a_model_that_lies_here_is_found_from_elsewhere(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Study.create(store, "s", "./tiny", "0123", SPACE, PROTOCOL).model == str(tmp_path / "tiny")
    assert Study.load(store, "s").model == str(tmp_path / "tiny")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE studies SET space = '{}'",
        "UPDATE studies SET space = 'x'",
        "UPDATE studies SET protocol = '3'",
        "UPDATE studies SET text = '3'",
        "UPDATE trials SET subnet = '[]'",
        "UPDATE trials SET role = 'judge'",
        "UPDATE trials SET kl = 'good'",
        "UPDATE trials SET tokens = 'many'",
        "UPDATE scores SET kl = 'good'",
    ],
)
def test_a_row_that_is_none_of_ours(sqlite_store: Store, change: str) -> None:
    study = Study.create(sqlite_store, "s", "m", "0123", SPACE, PROTOCOL)
    study.add(random_trials(1)[0])
    study.add_score("attention 0", 0.5)
    with sqlite_store.transaction() as session:
        session.execute(text(change))
    with pytest.raises(StoreError, match=r"holds a row that this version cannot read .*restore a copy"):
        (Study.load(sqlite_store, "s"), study.trials(), study.scores())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fingerprint": "4567"}, "another model"),
        ({"space": tiny_space(4)}, "another space"),
        ({"space": replace(SPACE, bits_choices=(8,))}, "another space"),
        ({"protocol": {"windows": 3, "reform": True}}, "another protocol"),
        ({"space": tiny_space(4), "protocol": {}}, "another space and protocol"),
        ({"fingerprint": "4567", "space": tiny_space(4)}, "another model "),
    ],
)
def test_a_name_belongs_to_one_model_space_and_protocol(store: Store, changes: dict[str, object], named: str) -> None:
    wanted = {"model": "m", "fingerprint": "0123", "space": SPACE, "protocol": PROTOCOL}
    Study.create(store, "s", **wanted)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=f"'s' was made for {named}.*give another --study"):
        Study.create(store, "s", **(wanted | changes))  # type: ignore[arg-type]
    assert Study.load(store, "s").space == SPACE


def test_where_a_users_own_text_is_may_change(store: Store, tmp_path: Path) -> None:
    assert Study.create(store, "s", "m", "0123", SPACE, PROTOCOL).text == Study.load(store, "s").text == ()
    for place in (tmp_path / "here.txt", tmp_path / "there.txt"):
        Study.create(store, "s", "m", "0123", SPACE, PROTOCOL, [place])
        assert Study.load(store, "s").text == (place,)


def test_studies_of_version_1_are_brought_up_to_date(store: Store, database_url: str) -> None:
    trials = random_trials(2)
    Study.create(store, "s", "m", "0123", SPACE, PROTOCOL).add(trials[0])
    with store.transaction() as session:
        session.execute(text("ALTER TABLE studies DROP COLUMN text"))
        session.execute(text("ALTER TABLE trials DROP COLUMN task_loss"))
        session.execute(text("UPDATE schema_version SET version = 1 WHERE name = 'nas'"))
    with Store(database_url) as later:
        study = Study.load(later, "s")
        study.add(trials[1])
        assert (study.trials(), study.text, study.protocol) == (trials, (), PROTOCOL)


def test_an_unknown_name_is_answered_with_those_there_are(store: Store) -> None:
    with pytest.raises(StudyError, match=r"no study 'c' in (sqlite|postgresql).* \(there: none\)"):
        Study.load(store, "c")
    for name in ("b", "a"):
        Study.create(store, name, "m", "0123", SPACE, PROTOCOL)
    with pytest.raises(StudyError, match=r"there: a, b\); run nas search"):
        Study.load(store, "c")


def test_studies_of_one_database_are_apart(store: Store) -> None:
    first = Study.create(store, "a", "m", "0123", SPACE, PROTOCOL)
    second = Study.create(store, "b", "m", "4567", tiny_space(3, bits=(8,)), {})
    trials = random_trials(6)
    for trial in trials[:4]:
        first.add(trial)
    for trial in trials[2:]:  # two subnets are in both
        second.add(replace(trial, quality=replace(trial.quality, kl=9.0)))
    first.add_score("0.mlp.32", 0.5)
    second.add_score("0.mlp.32", 0.7)
    assert first.trials() == trials[:4]
    assert [t.quality.kl for t in second.trials()] == [9.0] * 4
    assert (first.scores(), second.scores()) == ({"0.mlp.32": 0.5}, {"0.mlp.32": 0.7})


def test_adding_a_subnet_again_keeps_the_first(store: Store) -> None:
    study = Study.create(store, "s", "m", "0123", SPACE, PROTOCOL)
    (trial,) = random_trials(1)
    study.add(trial)
    study.add(replace(trial, quality=replace(trial.quality, kl=0.125)))
    study.add_score("0.mlp.32", 1 / 3)
    study.add_score("0.mlp.32", 0.5)
    assert study.trials() == [trial]
    assert study.scores() == {"0.mlp.32": 1 / 3}


def read_only(path: Path) -> Store:
    return Store(f"sqlite:///file:{path}?mode=ro&uri=true")


def test_a_read_only_database_can_be_read_and_is_else_refused_in_one_sentence(sqlite_store: Store, path: Path) -> None:
    with read_only(path) as locked, pytest.raises(StoreError, match=r"readonly.*writable"):
        Study.load(locked, "s")
    study = Study.create(sqlite_store, "s", "m", "0123", SPACE, PROTOCOL)
    (trial,) = random_trials(1)
    study.add(trial)
    with read_only(path) as locked:
        assert Study.load(locked, "s").trials() == [trial]
        with pytest.raises(StoreError, match=r"readonly.*writable"):
            Study.load(locked, "s").add(trial)


def test_a_study_of_before_versions_were_written_goes_on(store: Store, database_url: str) -> None:
    trials = random_trials(2)
    Study.create(store, "s", "m", "0123", SPACE, PROTOCOL).add(trials[0])
    with store.engine.begin() as connection:
        connection.execute(text("ALTER TABLE studies DROP COLUMN text"))
        connection.execute(text("ALTER TABLE trials DROP COLUMN task_loss"))
        assert connection.execute(text("DELETE FROM schema_version WHERE name = 'nas'")).rowcount == 1
    with Store(database_url) as again:
        study = Study.create(again, "s", "m", "0123", SPACE, PROTOCOL)
        study.add(trials[1])
        assert Study.load(again, "s").trials() == trials


def test_a_study_of_a_later_llm_nas_is_refused(store: Store) -> None:
    Study.create(store, "s", "m", "0123", SPACE, PROTOCOL)
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = 99 WHERE name = 'nas'"))
    with pytest.raises(StoreError, match="the tables of nas have schema version 99, wanted at most 3; use the llm-nas"):
        Study.load(store, "s")


def test_two_writers_create_and_fill_a_study_at_once(database_url: str) -> None:
    """Each on its own connections; the file does not exist before."""
    barrier = Barrier(2, timeout=30)

    def write(seed: int) -> None:
        barrier.wait()
        with Store(database_url) as store:
            study = Study.create(store, "s", "m", "0123", SPACE, PROTOCOL)
            for trial in random_trials(12, seed):
                study.add(trial)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (0, 1)))  # raises what a writer raised
    with Store(database_url) as store:
        found = {trial.subnet for trial in Study.load(store, "s").trials()}
    assert found == {trial.subnet for seed in (0, 1) for trial in random_trials(12, seed)}


WRITER = """
from tests.nas.test_study import PROTOCOL, SPACE, Store, Study, random_trials
shared, own = random_trials(12, seed=100), random_trials(12, seed={number})
wait()
with Store({url!r}) as store:
    study = Study.create(store, "s", "m", "0123", SPACE, PROTOCOL)
    for both in zip(shared, own):
        for trial in both:
            study.add(trial)
            study.add_score(trial.subnet.id, trial.quality.kl)
"""


def test_three_processes_add_trials_at_once(database_url: str) -> None:
    """Each adds 12 of its own and the same 12 as the others; the study does not exist before."""
    assert run_at_once([WRITER.format(url=database_url, number=number) for number in range(3)]) == [(0, "")] * 3
    expected = {trial.subnet.id: trial for seed in (0, 1, 2, 100) for trial in random_trials(12, seed)}
    with Store(database_url) as store:
        study = Study.load(store, "s")
        trials = study.trials()
        assert len(trials) == len(expected)
        assert {trial.subnet.id for trial in trials} == set(study.scores()) == set(expected)
