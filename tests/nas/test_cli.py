import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from sqlalchemy import text

from hw_profiles import Device, Store, Workload, detect, runtime
from hw_profiles.__main__ import main as run_on_board
from hw_profiles.devices import affinity
from hw_profiles.measured import read_measured
from nas.budget import Answer
from nas.cli import main
from nas.families import load_config
from nas.memory import Memory
from nas.protocol import EvaluationProtocol
from nas.space import SearchSpace
from nas.study import Study, Trial
from nas.subnet import LayerChoice, Subnet
from nas.tables import answer_fields, space_fields, trial_fields
from nas.tables import trials as trials_table
from nas.terminal import emit, progress_bar
from nas.text import SEARCH_FILES
from tests.nas.synthetic import VERSION, SyntheticEvaluator, fill_memory, fill_profile, tiny_space
from tests.nas.tiny_llama import save_tiny_llama


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on standard error, without its prefix."""
        assert self.err.startswith("nas: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err.removeprefix("nas: ").strip()

    @property
    def json(self) -> Any:
        """Standard output, all of it one JSON object."""
        return json.loads(self.out)


Nas = Callable[..., Outcome]


@pytest.fixture
def nas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Nas:
    """The command, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nas", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, int)
        return Outcome(exit_.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Study `s` of six trials in llm-nas.db, on a device profiled for OpenVINO with one thread."""
    space = tiny_space(4)
    with Store(str(tmp_path / "llm-nas.db")) as store:
        fill_profile(store, space, detect(), "openvino", [Workload("decode", 128), Workload("prefill", 128)])
        made = Study.create(store, "s", "/models/tiny", "0123", space, {"reform": True})
        evaluator = SyntheticEvaluator(space)
        for seed in range(6):
            subnet = space.sample(np.random.default_rng(seed))
            made.add(Trial(subnet, evaluator.evaluate(subnet), "seed"))
        return made


USAGE = {
    ("query", "--bogus"): "No such option: --bogus",
    ("bogus",): "No such command 'bogus'.",
    ("query", "--tpot-ms", "1"): "Missing option '--study'.",
    ("query", "--study", "s", "--tpot-ms", "fast"): "Invalid value for '--tpot-ms'",
    ("verify",): "Missing argument 'directories'.",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_usage_errors(nas: Nas, arguments: tuple[str, ...]) -> None:
    outcome = nas(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.sentence.startswith(USAGE[arguments])
    assert nas(*arguments, "--json").json["error"].startswith(USAGE[arguments])


def test_no_command_shows_the_help_and_fails(nas: Nas) -> None:
    outcome = nas()
    assert (outcome.code, outcome.err) == (2, "")
    assert all(command in outcome.out for command in ("profile", "search", "query", "export", "verify", "report"))


MISTAKES = {
    ("profile", "./nonesuch"): "there is no nonesuch; check the path",
    (
        "profile",
        "bloom",
    ): "gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3, got model_type 'bloom'",
    ("profile", "bloom", "--runtime", "tpu"): "runtime must be one of onnxruntime, openvino, llamacpp, got 'tpu'",
    ("profile", "bloom", "--runtime", "openvino:XPU"): "lists here (openvino, ",
    ("profile", "bloom", "--cpus", "0-99999"): "such as 0-3,8, got '0-99999'",
    ("profile", "bloom", "--precision", "int3"): "precision must be one of fp32, bf16, fp16, int8, int4, got 'int3'",
    ("profile",): "wanted a MODEL to profile, or --import with a file of measurements, got neither",
    (
        "profile",
        "bloom",
        "--pack",
        "x",
    ): "gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3, got model_type 'bloom'",
    ("profile", "--pack", "x", "--import", "y"): "--pack writes a file and --import reads one, got both",
    ("profile", "--import", "nonesuch.json"): "No such file or directory: nonesuch.json",
    (
        "profile",
        "--import",
        "bloom/config.json",
    ): "bloom/config.json must have the field format, got none; run the pack",
    (
        "query",
        "--study",
        "s",
        "--tpot-ms",
        "9",
        "--device",
        "none",
    ): "no device 'none' in sqlite:///llm-nas.db",
    ("search", "./nonesuch.gguf", "--study", "s"): "there is no nonesuch.gguf; check the path",
    (
        "search",
        "bloom",
        "--study",
        "s",
        "--evaluations",
        "0",
    ): "'--evaluations': Input should be greater than or equal to 1",
    ("search", "bloom", "--study", "s", "--objective", "kl"): "objectives must be kl and one of tpot_ms, ttft_ms",
    ("query", "--study", "s"): "a query needs a budget; give --tpot-ms",
    ("query", "--study", "s", "--tpot-ms", "-1"): "'--tpot-ms': wanted a number above 0, and at most 1e+09, got -1",
    ("query", "--study", "s", "--tpot-ms", "nan"): "above 0, and at most 1e+09, got nan",
    ("query", "--study", "s", "--max-size-mb", "inf"): "above 0, and at most 1e+09, got inf",
    ("query", "--study", "s", "--tpot-ms", "9", "--threads", "0"): "'--threads': Input should be greater",
    ("query", "--study", "s", "--tpot-ms", "9", "--batch-size", "99999999999"): "'--batch-size': Input should be less",
    (
        "report",
        "--study",
        "s",
        "--threads",
        "1",
        "--output",
        "",
    ): "wanted the name of a new file, or of an earlier report, got .",
    ("profile", "bloom", "--anchors", "-1"): "'--anchors': Input should be greater than or equal to 0",
    ("profile", "bloom", "--seed", "-1"): "'--seed': Input should be greater than or equal to 0",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--alpha", "nan"): "'--alpha': wanted a number above",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--dropout", "nan"): "0 to below 1 and an evaluation",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x"): "but there is no /models/tiny; check the path; give "
    "--model where study 's' has its model now",
    ("verify", "bloom", "--prompt", " "): "wanted a --prompt to generate after, got none",
    ("devices", "--database", ""): "wanted a file or a server to keep measurements in",
    ("query", "--study", "s", "--memory-mb", "9", "--threads", "1"): "the memory of openvino with 1 threads was not "
    "measured for prefill at 128 tokens and decode at 128 tokens of this model",
    (
        "query",
        "--study",
        "none",
        "--tpot-ms",
        "9",
    ): "no study 'none' in sqlite:///llm-nas.db (there: s); run nas search",
    ("query", "--study", "s", "--tpot-ms", "9", "--threads", "7"): "7 threads was not profiled for decode at 128 "
    "tokens and this model (profiled: openvino with 1 threads decode at 128 tokens, openvino with",
    ("export", "--study", "none", "--subnet", "full", "--output", "x"): "no study 'none'",
    ("export", "--study", "s", "--subnet", "nope", "--output", "x"): "study 's' has no subnet 'nope'",
    ("export", "--study", "s", "--subnet", "full", "--output", "x", "--format", "exe"): "--format must be among",
    ("tune", "--study", "none", "--subnet", "full", "--output", "x"): "no study 'none'",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--method", "magic"): "wanted a method out of lora",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--loss", "l1"): "one of kl, text, both, got l1",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--rank", "8", "--rank", "4"): "lora has one rank",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--pattern", "4:2"): "wanted a pattern N:M",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--rank-search", "luck"): "ranks by hill-climb or",
    ("tune", "--study", "s", "--subnet", "full", "--output", "x", "--method", "losa"): "losa makes weights sparse",
    ("report", "--study", "none"): "no study 'none'",
    ("verify", "nonesuch"): "nonesuch is not a folder that nas export wrote",
    ("verify", "bloom"): "bloom is not a folder that nas export wrote",
    ("devices", "--database", "mysql://host/name"): "wanted a path or a URL",
    ("devices", "--database", "bloom"): "its folder must exist and be writable",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_end_in_one_sentence(nas: Nas, study: Study, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "bloom").mkdir()
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 2, "n_embd": 64, "n_head": 2}
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(config))
    outcome = nas(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert MISTAKES[arguments] in outcome.sentence
    assert not (tmp_path / "x").exists()


def test_query_heads_need_groups_of_several(nas: Nas, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    outcome = nas("profile", "./gpt2", "--query-heads")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.sentence == "wanted several query heads per KV group to choose from, got one; leave them as they are"


def test_mistakes_as_json_are_one_object(nas: Nas) -> None:
    outcome = nas("profile", "./nonesuch", "--json")
    assert outcome.code == 2
    assert list(outcome.json) == ["error"]
    assert outcome.json["error"] == outcome.sentence


def test_a_corrupt_database(nas: Nas, study: Study, tmp_path: Path) -> None:
    file = tmp_path / "llm-nas.db"
    content = bytearray(file.read_bytes())
    assert len(content) > 3 * 4096
    content[4096:] = b"\xa5" * (len(content) - 4096)
    for name, damaged in {
        "damaged": bytes(content),
        "cut": bytes(content[:5000]),
        "other": b"no database" * 99,
    }.items():
        Path(tmp_path, name).write_bytes(damaged)
        outcome = nas("query", "--study", "s", "--tpot-ms", "9", "--database", name)
        assert outcome.code == 2
        assert name in outcome.sentence
        assert "give another path" in outcome.sentence
        assert Path(tmp_path, name).read_bytes() == damaged


def test_query_answers_within_the_budget(nas: Nas, study: Study) -> None:
    outcome = nas("query", "--study", "s", "--max-size-mb", "0.14", "--threads", "1", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    fitting = [
        trial
        for trial in study.trials()
        if study.space.model_shape(trial.subnet).weight_bytes(trial.subnet.precision) <= 140_000
    ]
    assert 0 < len(fitting) < 6
    best = min(fitting, key=lambda trial: trial.quality.kl)
    assert outcome.json["subnet"] == best.subnet.id
    assert outcome.json["kl"] == best.quality.kl
    assert outcome.json["layers"] == [[c.num_key_value_heads, c.intermediate_size] for c in best.subnet.layers]
    for_people = nas("query", "--study", "s", "--max-size-mb", "0.14", "--threads", "1")
    assert (for_people.code, for_people.err) == (0, "")
    assert f"Subnet {best.subnet.id}, {best.subnet.precision}" in for_people.out


def test_query_tells_memory_where_it_is_profiled(nas: Nas, study: Study, tmp_path: Path) -> None:
    query = ("query", "--study", "s", "--max-size-mb", "0.14", "--threads", "1")
    assert nas(*query, "--json").json["memory_bytes"] is None
    assert "peak memory" not in nas(*query).out
    with Store(str(tmp_path / "llm-nas.db")) as store:
        workloads = [Workload("decode", 128), Workload("prefill", 128)]
        fill_memory(store, study.space, detect(), "openvino", workloads)
    memory = nas(*query, "--json").json["memory_bytes"]
    assert memory["without_model"] < memory["low"] <= memory["value"] <= memory["high"]
    assert f"{memory['value'] / 1e6:.0f} MB [" in nas(*query).out
    assert "joules_per_token" not in nas(*query, "--json").json
    assert nas(*query, "--memory-mb", str(memory["high"] / 1e6), "--json").json["memory_bytes"] == memory
    unmet = nas(*query, "--memory-mb", "1", "--json")
    assert unmet.code == 1
    assert "MB of memory" in unmet.sentence
    assert unmet.json["nearest"]["memory_bytes"]["high"] > 1e6


def test_energy_is_told_of_what_was_measured(study: Study) -> None:
    """Half a joule a step of the full model; a batch of four takes it for four tokens, a prompt of 128 for 128."""
    decode, prefill = Workload("decode", 128, 4), Workload("prefill", 128)
    memory = Memory(3, 2, 4, 1, {decode: 0.5, prefill: 0.5})
    found = Answer(study.space.full(8), study.trials()[0].quality, {}, 1, 1, 1.0, memory)
    assert answer_fields(found)["joules_per_token"] == {"decode 128 x 4": 0.125, "prefill 128": 0.5 / 128}
    assert "joules_per_token" not in answer_fields(replace(found, memory=replace(memory, step_joules={})))


def test_a_budget_out_of_reach_names_the_nearest(nas: Nas, study: Study) -> None:
    arguments = ("query", "--study", "s", "--tpot-ms", "0.001", "--threads", "1")
    outcome = nas(*arguments)
    assert (outcome.code, outcome.out) == (1, "")
    as_json = nas(*arguments, "--json")
    assert as_json.code == 1
    nearest = as_json.json["nearest"]
    assert nearest["subnet"] in {trial.subnet.id for trial in study.trials()}
    assert f"the nearest, {nearest['subnet']}, has decode {nearest['tpot_ms']['high']:.2f} ms" in outcome.sentence


def test_devices_lists_what_is_profiled(nas: Nas, study: Study) -> None:
    found = nas("devices", "--json").json
    assert found["here"]["id"] == detect().id
    assert {row["target"] for row in found["profiled"]} == {"openvino/int8/1 thread", "openvino/int4/1 thread"}
    assert {row["measurements"] for row in found["profiled"]} == {2 * (3 + 6 + 10 + 6 + 3)}
    assert {row["graphs"] for row in found["profiled"]} == {3 + 6 + 10 + 6}
    assert all(row["workloads"] == ["decode 128", "prefill 128"] for row in found["profiled"])
    assert all(row["repeat_noise"] == {"decode 128": 0.0, "prefill 128": 0.0} for row in found["profiled"])
    assert {row["runtime_version"] for row in found["profiled"]} == {runtime("openvino").version()}
    assert [row["stale"] for row in found["profiled"]] == [False, False]
    assert set(found["runtimes"]) == {"openvino", "onnxruntime", "llamacpp"}
    for_people = nas("devices").out
    assert "openvino/int4/1 thread" in for_people
    assert "STALE" not in for_people


def test_a_profile_of_another_version_is_flagged_and_refused(nas: Nas, study: Study, tmp_path: Path) -> None:
    with Store(str(tmp_path / "llm-nas.db")) as store, store.engine.begin() as connection:
        connection.execute(text("UPDATE measurements SET runtime_version = '1.0' WHERE precision = 'int4'"))
    found = nas("devices", "--json").json["profiled"]
    assert {row["target"]: (row["stale"], row["runtime_version"]) for row in found} == {
        "openvino/int8/1 thread": (False, runtime("openvino").version()),
        "openvino/int4/1 thread": (True, "1.0"),
    }
    for_people = nas("devices").out
    assert for_people.count("STALE") == 2
    assert "nas profile again for openvino/int4/1 thread" in for_people
    query = ("query", "--study", "s", "--max-size-mb", "0.14", "--threads", "1")
    refused = nas(*query)
    assert (refused.code, refused.out) == (2, "")
    assert refused.sentence == (
        f"openvino/int4/1 thread: decode at 128 tokens was profiled with openvino 1.0, but "
        f"{runtime('openvino').version()} is installed; run nas profile --runtime openvino --precision int4 "
        "--threads 1 --context-tokens 128 again, or give --allow-stale"
    )
    assert nas(*query, "--allow-stale").code == 0
    assert nas("report", "--study", "s", "--threads", "1").code == 0


def test_report_writes_one_page(nas: Nas, study: Study, tmp_path: Path) -> None:
    outcome = nas("report", "--study", "s", "--threads", "1", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json == {"report": "report.html"}
    html = (tmp_path / "report.html").read_text()
    assert all(trial.subnet.id in html for trial in study.trials())


FULL = "the disk is full; free some space and run the same command again, what was done is kept"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "report.html"), FULL),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (PermissionError(errno.EACCES, "Permission denied", "report.html"), "Permission denied: report.html"),
    ],
)
def test_errors_of_the_system(
    nas: Nas, study: Study, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def write_report(*_: object) -> None:
        raise error

    monkeypatch.setattr("nas.report.write_report", write_report)
    outcome = nas("report", "--study", "s", "--threads", "1")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.sentence == sentence


@pytest.fixture
def _heeds_control_c() -> Iterator[None]:
    """A shell's background jobs ignore it, and so do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_control_c")
def test_control_c(nas: Nas, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.report.write_report", lambda *_: signal.raise_signal(signal.SIGINT))
    outcome = nas("report", "--study", "s", "--threads", "1")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.sentence == "stopped; run the same command again to go on from here"


WITHOUT_TORCH = {
    ("search", "--help"): "--evaluations",
    ("devices",): "openvino/int4/1 thread",
    ("query", "--study", "s", "--max-size-mb", "0.14", "--threads", "1"): "KL to the full model",
    ("report", "--study", "s", "--threads", "1"): "report.html: 6 trials",
}


@pytest.mark.parametrize("arguments", WITHOUT_TORCH)
def test_what_is_stored_is_answered_without_torch(study: Study, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code = """
import sys
from nas.cli import main
try:
    main()
except SystemExit as exit_:
    print(exit_.code, "torch" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "0 False"
    assert WITHOUT_TORCH[arguments] in run.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_takes_nothing(study: Study, tmp_path: Path) -> None:
    """A sentence where the disk is full, and no complaint of Python's own as it ends."""
    devices = [sys.executable, "-m", "nas", "devices", "--json"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(devices, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (2, f"nas: {FULL}\n")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *devices], cwd=tmp_path, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.usefixtures("_heeds_control_c")
def test_control_c_while_the_command_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "nas", "devices"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "importing\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, "nas: stopped before it began\n")


def test_ids_are_whole_on_a_narrow_terminal(study: Study) -> None:
    rows = [trial_fields(trial, {"tpot_ms": 1.0}) for trial in study.trials()]
    console = Console(width=60, file=io.StringIO())
    console.print(trials_table("s", rows))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(row["id"] in shown for row in rows)


def test_a_bar_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the work took fewer steps than was thought, but not where it was stopped."""
    with progress_bar("work") as progress:
        progress(3, 10, "on and on")
    assert "10/10" in capsys.readouterr().err
    with suppress(ValueError), progress_bar("work") as progress:
        progress(3, 10, "on and on")
        raise ValueError
    assert "3/10" in capsys.readouterr().err


def test_a_models_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"[/b] [red]a[/red] :smile: {'long ' * 60}end"
    emit({}, False, words)
    assert capsys.readouterr().out == words + "\n"


def test_a_bar_that_never_moves_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("idle"):
        pass
    assert capsys.readouterr().err == ""
    with progress_bar("busy") as progress:
        progress(1, 3, "first")
    assert "busy" in capsys.readouterr().err


@pytest.fixture
def _single_thread() -> Iterator[None]:
    """More only wait for each other on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_environment_names_database_and_cache(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATABASE", str(tmp_path / "elsewhere.db"))
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "kept"))
    assert nas("devices", "--json").code == 0
    assert (tmp_path / "elsewhere.db").exists()
    assert not (tmp_path / "llm-nas.db").exists()
    assert "NAS_CACHE" in nas("search", "--help").out


@pytest.fixture
def _tiny_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model in ./tiny, and texts and pauses cut short."""
    short = partial(
        EvaluationProtocol, calibration_windows=8, calibration_tokens=64, search_windows=4, search_tokens=32
    )
    monkeypatch.setattr("nas.protocol.EvaluationProtocol", short)
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    save_tiny_llama(tmp_path / "tiny")


def test_a_profile_leans_on_that_of_another_device(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    save_tiny_llama(tmp_path / "tiny")
    space = SearchSpace.from_config(load_config("tiny"))
    another = Device("Another CPU", 4, 16 * 2**30, ("sve",), "Linux", "aarch64")
    with Store(str(tmp_path / "llm-nas.db")) as store:
        works = [Workload("prefill", 8), Workload("decode", 8)]
        fill_profile(store, space, another, "onnxruntime", works, ["int8"])
    profile = ("profile", "tiny", "--runtime", "onnxruntime", "--precision", "int8", "--threads", "1", "--rounds", "1",
               "--anchors", "3", "--heldout", "0", "--repeats", "0", "--prompt-tokens", "8", "--json")  # fmt: skip
    leaning = (*profile, "--context-tokens", "8", "--transfer-from")
    refused = nas(*leaning, "0123456789ab")
    assert (refused.code, refused.json["error"]) == (
        2,
        "--transfer-from 0123456789ab needs a profile of onnxruntime at int8, this model and prefill at 8 tokens, "
        "got none; run nas profile without it, there or here",
    )
    assert (
        "decode at 9 tokens, got none"
        in nas(*profile, "--context-tokens", "9", "--transfer-from", "auto").json["error"]
    )
    found = nas(*leaning, another.id).json["targets"]
    assert [(row["phase"], row["graphs"]) for row in found] == [("prefill", 6), ("decode", 6)]
    leans_on = f"{another.id}/onnxruntime/int8/1 thread {VERSION}"
    assert {row["leans_on"] for row in found} == {leans_on}  # six graphs are too few for a fit of their own
    assert all(0 < row["held_out_error"] < 2 for row in found)
    for_people = nas(*(word for word in leaning if word != "--json"), "auto")
    assert another.id in for_people.out


def _with_low_ms(low_ms: float, fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"smallest": fields["smallest"] | {"low_ms": low_ms}}


@pytest.mark.usefixtures("_single_thread", "_tiny_folder")
def test_every_command_end_to_end(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile, search, query, export, verify and report of a tiny model; only the texts and pauses are cut short."""
    on_device = ("--threads", "1", "--prompt-tokens", "8", "--context-tokens", "8", "--json")

    counts = ("--anchors", "3", "--heldout", "2", "--repeats", "1", "--rounds", "1", "--memory-graphs", "0")
    for engine, precisions in (("onnxruntime", ("int8", "int4")), ("openvino", ("int8",))):
        options = [word for precision in precisions for word in ("--precision", precision)]
        lengths = ("--context-tokens", "20", "--prompt-tokens", "20")
        profile = ("profile", "tiny", "--runtime", engine, *options, *counts, *lengths, *on_device)
        profiled = nas(*profile)
        assert profiled.code == 0
        targets = profiled.json["targets"]
        assert [row["target"] for row in targets] == [f"{engine}/{p}/1 thread" for p in precisions for _ in range(4)]
        # at int4 table entries for both parts and the head, two anchors and two held-out graphs have bits of their own
        counted = [3 + 6 + 3 + 2 + 1 + (3 + 2 + 2) * (p == "int4") for p in precisions for _ in range(4)]
        assert [row["graphs"] for row in targets] == counted
        assert all(row["full_ms"] > 0 for row in targets)
        assert profiled.json["memory"] == []
    assert nas(*profile).json == profiled.json  # all of it was stored

    full_bytes = check_memory_is_profiled(nas, counts, on_device)

    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "too short"}')
    short_of_text = nas("search", "tiny", "--study", "s", "--runtime", "onnxruntime", "--text", "own.jsonl", *on_device)
    assert short_of_text.code == 2
    assert "wanted 4 windows of 32 tokens after 512 others, got text for 0" in short_of_text.json["error"]
    own.write_text("".join(json.dumps({"text": line}) + "\n" for line in SEARCH_FILES[0].read_text().splitlines()))
    search = ("search", "tiny", "--study", "s", "--runtime", "onnxruntime", "--evaluations", "10", *on_device)
    search = (*search, "--text", "own.jsonl")
    with monkeypatch.context() as upgraded:
        upgraded.setattr("hw_profiles.runtimes.onnxruntime.OnnxRuntime.version", lambda _: "99.0")
        refused = nas(*search)
        assert refused.code == 2
        assert "but 99.0 is installed; run nas profile --runtime onnxruntime" in refused.json["error"]
    with monkeypatch.context() as slow:  # whether anything is too slow for this model's head is up to the machine
        slow.setattr("nas.tables.space_fields", lambda *arguments: _with_low_ms(5.0, space_fields(*arguments)))
        hopeless = nas(*search, "--budget-ms", "4")
    assert hopeless.code == 1
    assert "wanted 4 ms, but embedding and head alone take 5 ms; allow more" in hopeless.json["error"]
    assert hopeless.json["space"]["subnets"] == SearchSpace.from_config(load_config("tiny"), mixed_bits=True).size
    searched = nas(*search)
    assert searched.code == 0
    members = [searched.json["space"][name] for name in ("smallest", "middle", "full")]
    assert [member["parameters"] for member in members] == sorted(member["parameters"] for member in members)
    assert members[2]["value_ms"] > 0
    trials = searched.json["trials"]
    assert [trial["role"] for trial in trials[:2]] == ["full", "full"]
    assert len({trial["id"] for trial in trials}) == len(trials) == 12
    assert all(trial["kl"] >= trials[0]["kl"] for trial in trials)  # none is nearer to the model than int8 alone
    assert nas(*search).json["trials"] == trials

    ratio = 0.9
    budget = ("--max-parameters-ratio", str(ratio), "--tpot-ms", "1000")
    answered = nas("query", "--study", "s", "--runtime", "onnxruntime", *budget, "--measure", "1", *on_device)
    assert answered.code == 0
    answer = answered.json
    assert answer["parameters_ratio"] <= ratio
    assert answer["tpot_ms"]["measured"] > 0
    assert answer["memory_bytes"] is None  # of int4 it was not profiled
    limited = nas("query", "--study", "s", "--runtime", "onnxruntime", "--memory-mb", "999", *on_device)
    assert limited.code == 2
    assert "memory of precision int4 was not measured (only of int8)" in limited.sentence
    assert answer["subnet"] in {trial["id"] for trial in trials[2:]}

    # the profile holds 8 and 20 tokens, so it knows those between
    between = ("query", "--study", "s", "--runtime", "onnxruntime", "--threads", "1", "--tpot-ms", "1000")
    interpolated = nas(*between, "--context-tokens", "14", "--json")
    assert interpolated.code == 0
    assert 0 < interpolated.json["tpot_ms"]["value"] < 1000
    outside = nas(*between, "--context-tokens", "21")
    assert outside.code == 2
    assert "decode at 8 to 20 tokens" in " ".join(outside.err.split())

    folders = []
    for format_ in ("openvino", "onnx", "huggingface", "gguf"):
        exported = nas(
            "export", "--study", "s", "--subnet", answer["subnet"], "--output", format_, "--format", format_, *on_device
        )
        assert exported.code == 0
        assert exported.json["subnet"] == answer["subnet"]
        folders.append(format_)
    check_tuning(nas, answer["subnet"], on_device)
    check_judging(nas, tmp_path, answer["subnet"])
    check_search_by_task(nas, search)
    check_a_tuned_supernet(nas, search)
    said = own.read_text()
    own.write_text(said.replace("e", "a"))
    changed = nas("export", "--study", "s", "--subnet", answer["subnet"], "--output", "again")
    assert changed.code == 2
    assert "the text of study 's' has changed since its search; search again as another study" in changed.sentence
    own.write_text(said)
    verified = nas("verify", *folders, "--rounds", "1", "--tpot-ms", "1000", *on_device)
    assert verified.code == 0
    rows = verified.json["folders"]
    assert [row["format"] for row in rows] == folders
    assert all(row["parity_holds"] and row["within_budget"] and row["generated"] for row in rows)
    check_cards(tmp_path, rows, monkeypatch)
    check_limits_of_memory(nas, full_bytes, on_device)
    missed = nas("verify", "onnx", "--rounds", "1", "--tpot-ms", "0.000001", *on_device)
    assert missed.code == 1
    assert [row["within_budget"] for row in missed.json["folders"]] == [False]
    check_limits_at_the_profiles_speed(nas, tmp_path, on_device)

    here = ("--threads", "1", "--context-tokens", "8")
    reported = nas("report", "--study", "s", "--runtime", "onnxruntime", "--tpot-ms", "1000", *here)
    assert reported.code == 0
    html = (tmp_path / "report.html").read_text()
    assert all(trial["id"] in html for trial in trials)

    check_refining(nas, trials, on_device)
    check_bf16(nas, on_device)
    check_fp16(nas, on_device)
    check_recorded_before_it_is_said(nas, tmp_path / "fp16" / "onnx", on_device, monkeypatch)
    check_damaged_folders(nas, tmp_path, on_device)


@pytest.mark.usefixtures("_single_thread", "_tiny_folder")
def test_query_heads_end_to_end(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = ("--threads", "1", "--prompt-tokens", "8", "--context-tokens", "8", "--json")
    counts = ("--anchors", "3", "--heldout", "2", "--repeats", "0", "--rounds", "1", "--memory-graphs", "0")
    profile = ("profile", "tiny", "--runtime", "onnxruntime", "--precision", "int8", "--precision", "int4", *counts)
    search = ("search", "tiny", "--study", "s", "--evaluations", "12", "--query-heads", "--uniform-bits", *on_device)
    on_onnxruntime = ("--runtime", "onnxruntime")

    assert nas(*profile, *on_device).code == 0
    refused = nas(*search, *on_onnxruntime)
    assert refused.code == 2
    assert "was not profiled with fewer query heads per KV group" in refused.json["error"]
    refused = nas(*search, "--runtime", "openvino")
    assert refused.code == 2
    assert "as many query heads per KV group in every layer for openvino, got 1, 2; take" in refused.json["error"]

    assert nas(*profile, "--query-heads", *on_device).code == 0
    searched = nas(*search, *on_onnxruntime)
    assert searched.code == 0
    with Store(str(tmp_path / "llm-nas.db")) as store:
        study = Study.load(store, "s")
        chosen = Subnet((LayerChoice(2, 96, heads_per_group=1), LayerChoice(1, 128)) * 2, 8)
        study.space.validate(chosen)
        if chosen not in [trial.subnet for trial in study.trials()]:  # what a search finds depends on the clock
            study.add(Trial(chosen, study.trials()[0].quality, "search"))
    export = ("export", "--study", "s", "--subnet", chosen.id, "--no-fit", *on_device)
    for format_ in ("onnx", "gguf"):
        assert nas(*export, "--format", format_, "--output", format_).code == 0
    refused = nas(*export, "--format", "openvino", "--output", "openvino")
    assert refused.code == 2
    assert "as many query heads per KV group in every layer for openvino" in refused.json["error"]
    verified = nas("verify", "onnx", "gguf", "--rounds", "1", *on_device)
    assert [row["parity_holds"] for row in verified.json["folders"]] == [True, True]


def check_refining(nas: Nas, trials: list[dict[str, Any]], on_device: tuple[str, ...]) -> None:
    """Sizes are exchanged at no more latency; what comes out is a trial that can be exported."""
    worst = max(trials, key=lambda trial: float(trial["kl"]))["id"]
    refine = ("refine", "--study", "s", "--subnet", worst, "--runtime", "onnxruntime")
    refined = nas(*refine, *on_device)
    assert refined.code == 0
    assert refined.json["kl"]["after"] <= refined.json["kl"]["before"]
    assert refined.json["value_ms"]["after"] <= refined.json["value_ms"]["before"]
    assert nas(*refine, *on_device).json["subnet"] == refined.json["subnet"]
    export = ("export", "--study", "s", "--subnet", refined.json["subnet"], "--output", "refined", "--format", "onnx")
    assert nas(*export, *on_device).code == 0
    unknown = nas(*refine, *on_device, "--objective", "memory")
    assert unknown.code == 2
    assert "--objective must be one of tpot_ms, ttft_ms, got memory" in unknown.sentence


def check_tuning(nas: Nas, subnet: str, on_device: tuple[str, ...]) -> None:
    """Tuned weights are kept, exported and proven; those of another subnet are refused."""
    tune = ("tune", "--study", "s", "--subnet", subnet, "--output", "tuned", "--json", "--method", "nls")
    ranks = ("--rank", "8", "--rank", "4", "--rank-evaluations", "3", "--learning-rate", "0.001")
    tuned = nas(*tune, *ranks, "--steps", "30", "--batch", "4", "--tokens", "64")
    assert tuned.code == 0
    assert tuned.json["kl"]["after"] != tuned.json["kl"]["before"]
    assert set(tuned.json["ranks"].values()) <= {8, 4}
    other = nas(*tune, *ranks, "--steps", "9", "--batch", "4", "--tokens", "64")
    assert other.code == 2
    assert "tuned holds what was tuned with another subnet, text or settings" in other.sentence
    export = ("export", "--study", "s", "--tuned", "tuned", "--output", "tuned_onnx", "--format", "onnx", *on_device)
    assert nas(*export, "--subnet", subnet).code == 0
    assert nas("verify", "tuned_onnx", "--rounds", "1", *on_device).json["folders"][0]["parity_holds"]
    assert "tuned by nls for 30 steps" in Path("tuned_onnx", "README.md").read_text()
    wrong = nas(*export, "--subnet", "full")
    assert wrong.code == 2
    assert "got another; see nas tune" in wrong.sentence


def check_a_tuned_supernet(nas: Nas, search: tuple[str, ...]) -> None:
    """All subnets are tuned at once, and searched again as another study, which asks for the same supernet."""
    tune = ("tune", "--study", "s", "--subnet", "all", "--output", "supernet", "--json", "--learning-rate", "0.001")
    tuned = nas(*tune, "--rank", "4", "--steps", "10", "--batch", "4", "--tokens", "64")
    assert tuned.code == 0
    assert len(tuned.json["kl"]) > 3
    again = [word if word != "s" else "again" for word in search]
    again[again.index("--evaluations") + 1] = "2"
    searched = nas(*again, "--supernet", "supernet")
    assert searched.code == 0
    subnet = searched.json["trials"][-1]["id"]
    judge = ("evaluate", "--study", "again", "--subnet", subnet, "--no-fit", "--json")
    assert nas(*judge, "--supernet", "supernet").code == 0
    refused = nas(*judge)
    assert refused.code == 2
    assert "study 'again' was made of a tuned supernet, got --supernet None" in refused.json["error"]
    mixed = nas(*search, "--supernet", "supernet")
    assert mixed.code == 2
    assert "belongs to" in mixed.json["error"] or "another" in mixed.json["error"]


def check_judging(nas: Nas, folder: Path, subnet: str) -> None:
    """A subnet beside the full model, on text and on a task; nothing but lm-eval's names and sound files are tasks."""
    items = [{"context": f"{a} and", "choices": [f"{a} it is", "not"], "label": a % 2} for a in range(12)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    judge = ("evaluate", "--study", "s", "--subnet", subnet, "--tuned", "tuned", "--json")
    judged = nas(*judge, "--task", "items.jsonl", "--limit", "10")
    assert judged.code == 0
    fields = judged.json
    assert fields["kl"] > 0
    assert fields["perplexity"] != fields["full_perplexity"]
    (scores,) = fields["tasks"].values()
    assert set(scores) == {"acc", "acc_norm"}
    assert all(score[which]["items"] == 10 for score in scores.values() for which in ("subnet", "full"))
    for task, wanted in (("nonesuch", "wanted a task that lm-eval knows"), ("none.jsonl", "there is no none.jsonl")):
        refused = nas(*judge, "--task", task)
        assert refused.code == 2
        assert wanted in refused.json["error"]


def check_search_by_task(nas: Nas, search: tuple[str, ...]) -> None:
    """The study is of these items, as many and no others."""
    by_task = [word if word != "s" else "by task" for word in search]
    by_task[by_task.index("--evaluations") + 1] = "2"
    searched = nas(*by_task, "--task", "items.jsonl", "--task-items", "6")
    assert searched.code == 0
    assert all(row["task_loss"] > 0 for row in searched.json["trials"])
    best = min(searched.json["trials"], key=lambda row: row["task_loss"])
    query = ("query", "--study", "by task", "--runtime", "onnxruntime", "--threads", "1", "--max-size-mb", "1")
    answer = nas(*query, "--context-tokens", "8", "--json")
    assert (answer.json["subnet"], answer.json["task_loss"]) == (best["id"], best["task_loss"])
    no_task = nas(*[word if word != "by task" else "no task" for word in by_task], "--task", "nonesuch")
    assert no_task.code == 2
    assert "wanted a task that lm-eval knows" in no_task.json["error"]
    unknown = nas("query", "--study", "no task", "--max-size-mb", "1", "--json")
    assert "there is no study 'no task'" in unknown.json["error"]
    for other in ((), ("--task", "items.jsonl", "--task-items", "7")):
        refused = nas(*by_task, *other)
        assert refused.code == 2
        assert "was made for another protocol" in refused.json["error"]


@pytest.mark.usefixtures("_single_thread")
def test_other_devices_and_bf16_are_profiled_alike(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    save_tiny_llama(tmp_path / "tiny")
    tokens = ("--prompt-tokens", "8", "--context-tokens", "8", "--threads", "1")
    few = ("--anchors", "1", "--heldout", "1", "--repeats", "0", "--rounds", "1", "--memory-graphs", "0")
    profile = ("profile", "tiny", *few, *tokens)
    asked = [("openvino:AUTO", "int4")]
    if detect().has_bf16:
        asked.append(("openvino", "bf16"))
    for name, precision in asked:
        timed = nas(*profile, "--runtime", name, "--precision", precision, "--json")
        assert timed.code == 0
        assert {row["target"] for row in timed.json["targets"]} == {f"{name}/{precision}/1 thread"}
    found = nas("devices", "--json").json
    assert {row["target"] for row in found["profiled"]} == {f"{name}/{precision}/1 thread" for name, precision in asked}
    assert not any(row["stale"] for row in found["profiled"])
    assert {"openvino", "openvino:AUTO"} <= set(found["runtimes"]["openvino"]["names"])
    assert "--runtime openvino, openvino:AUTO" in nas("devices").out
    refused = nas(*profile, "--precision", "bf16")  # by default with onnxruntime first
    assert refused.code == 2
    wanted = "onnxruntime has kernels for on this device (fp32, fp16, int8, int4), got bf16; take one of these"
    assert wanted in refused.sentence


@pytest.fixture
def _restored_affinity() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), before)


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="needs Linux and two CPUs")
@pytest.mark.usefixtures("_restored_affinity")
def test_some_cpus_of_a_machine_are_a_device_of_their_own(nas: Nas, study: Study) -> None:
    query = ("query", "--study", "s", "--threads", "1", "--max-size-mb", "1")
    everywhere, cpu = detect().id, str(min(os.sched_getaffinity(0)))
    assert nas(*query).code == 0
    refused = nas(*query, "--cpus", cpu)
    assert refused.code == 2
    assert "was not profiled" in refused.sentence
    assert affinity() == cpu
    assert detect().id != everywhere
    assert nas(*query, "--device", everywhere).code == 0


@pytest.mark.usefixtures("_single_thread", "_tiny_folder")
def test_a_device_that_does_not_run_this_program(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of real graphs, timed as on a board, taken in, searched and queried by the device's id."""
    tokens = ("--prompt-tokens", "8", "--context-tokens", "8")
    targets = ("--runtime", "onnxruntime", "--precision", "int8", "--precision", "int4")
    counts = ("--anchors", "3", "--heldout", "2", "--repeats", "1", "--rounds", "1", "--memory-graphs", "3")
    packed = nas("profile", "tiny", "--pack", "pack.zip", *targets, *counts, *tokens, "--json")
    assert packed.code == 0
    assert packed.json == {
        "pack": "pack.zip",
        "size_bytes": (tmp_path / "pack.zip").stat().st_size,
        "graphs": 3 + 6 + 3 + 2 + 1 + 3 + 2 + 2,
        "targets": ["onnxruntime/int8", "onnxruntime/int4"],
    }
    assert not (tmp_path / "llm-nas.db").exists()

    assert run_on_board(["run", "pack.zip", "--output", "measured.json", "--threads", "1"]) == 0
    file = tmp_path / "measured.json"
    content = json.loads(file.read_text())
    content["device"] |= {"name": "Some board", "cores": 1}  # so that it is not this machine
    file.write_text(json.dumps(content))
    board = read_measured(file).device.id
    assert board != detect().id

    imported = nas("profile", "--import", "measured.json", "--json")
    assert (imported.code, imported.err) == (0, "")
    assert imported.json["device"] == board
    rows = imported.json["targets"]
    assert {(row["target"], row["phase"], row["graphs"]) for row in rows} == {
        (f"onnxruntime/{precision}/1 thread", phase, graphs)
        for precision, graphs in (("int8", 15), ("int4", 22))
        for phase in ("prefill", "decode")
    }
    in_memory = {row["target"]: row for row in imported.json["memory"]}
    assert set(in_memory) == {f"onnxruntime/{p}/1 thread" for p in ("int8", "int4")}
    for row in in_memory.values():
        assert min(row["full_bytes"].values()) > row["without_model_bytes"] > 10**6
    with Store(str(tmp_path / "llm-nas.db")) as store:
        stored = store.measurements()
        assert len(stored) == 2 * (15 + 22)
    assert nas("profile", "tiny", "--import", "measured.json", "--json").json == imported.json
    with Store(str(tmp_path / "llm-nas.db")) as store:
        assert store.measurements() == stored
        assert [device.name for device in store.devices()] == ["Some board"]
    check_refused_imports(nas, tmp_path)

    searched = nas(
        "search", "tiny", "--study", "s", "--runtime", "onnxruntime", "--evaluations", "4", "--device", board,
        *tokens, "--json",
    )  # fmt: skip
    assert searched.code == 0
    query = ("query", "--study", "s", "--runtime", "onnxruntime", "--tpot-ms", "1000", *tokens, "--json")
    answered = nas(*query, "--device", board)
    assert answered.code == 0
    assert answered.json["subnet"] in {trial["id"] for trial in searched.json["trials"]}
    here = nas(*query)
    assert here.code == 2
    assert "was not profiled for decode at 8 tokens" in here.sentence
    both = nas(*query, "--device", board, "--measure", "1")
    assert both.code == 2
    assert "--measure times on this device" in both.sentence


def check_refused_imports(nas: Nas, tmp_path: Path) -> None:
    """Of another model, with one bad number, without measurements: all refused, and the database stays as it is."""
    with Store(str(tmp_path / "llm-nas.db")) as store:
        stored = store.measurements()
    (tmp_path / "other").mkdir()
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert "must be of other, got another model" in nas("profile", "other", "--import", "measured.json").sentence
    content = json.loads((tmp_path / "measured.json").read_text())
    content["device"]["name"] = "Another board"
    for change, words in (
        ([*content["measurements"][:-1], content["measurements"][-1] | {"ratio": -1}], "ratio must be a number"),
        ([], "must hold measurements, got none"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content | {"measurements": change}))
        refused = nas("profile", "--import", "bad.json")
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.sentence
    with Store(str(tmp_path / "llm-nas.db")) as store:
        assert store.measurements() == stored
        assert len(store.devices()) == 1


def check_memory_is_profiled(nas: Nas, counts: tuple[str, ...], on_device: tuple[str, ...]) -> int:
    """In processes of their own, on top of what is timed already. Returns what the full model takes."""
    target = ("--runtime", "onnxruntime", "--precision", "int8")
    profile = ("profile", "tiny", *target, *counts, "--memory-graphs", "5", "--prompt-tokens", "20", *on_device)
    profiled = nas(*profile)
    assert profiled.code == 0
    (row,) = profiled.json["memory"]
    assert (row["target"], row["measurements"]) == ("onnxruntime/int8/1 thread", 3 + 3 * 2 + 1 * 2)
    assert set(row["full_bytes"]) == {"prefill 8", "prefill 20", "decode 8"}
    full_bytes = row["full_bytes"].values()
    assert all(10e6 < row["without_model_bytes"] < size < 1e9 for size in full_bytes)
    assert 0 <= row["mape"] < 0.5
    assert nas(*profile).json["memory"] == [row]  # all of it was stored
    return int(max(full_bytes))


def check_limits_of_memory(nas: Nas, full_bytes: int, on_device: tuple[str, ...]) -> None:
    """The exported folder takes about what the full model does, which without its weights is far more than half."""
    verify = ("verify", "onnx", "--beside", "huggingface", "--rounds", "1", *on_device)
    for limit_mb, within in ((full_bytes * 1.5 / 1e6, True), (full_bytes * 0.5 / 1e6, False)):
        verified = nas(*verify, "--memory-mb", str(limit_mb))
        assert verified.code == (0 if within else 1)
        judged, beside = verified.json["folders"]
        assert judged["peak_memory_bytes"] == pytest.approx(full_bytes, rel=0.2)
        assert (judged["within_budget"], beside["within_budget"]) == (within, True)
        assert beside["peak_memory_bytes"] is None
    refused = nas("verify", "huggingface", "--memory-mb", "1", "--rounds", "1", *on_device)
    assert refused.code == 2
    assert "got huggingface, which is huggingface; verify it without a limit of memory" in refused.json["error"]


def check_limits_at_the_profiles_speed(nas: Nas, tmp_path: Path, on_device: tuple[str, ...]) -> None:
    """Verified with its profile, an export is within a limit that by the clock it misses a thousandfold."""
    with Store(str(tmp_path / "faster.db")) as faster, Store(str(tmp_path / "llm-nas.db")) as store:
        for device in store.devices():
            faster.add_device(device)
        faster.add_measurements(
            [
                replace(m, references_ms={name: ms / 1e3 for name, ms in m.references_ms.items()})
                for m in store.measurements()
            ]
        )
        study = Study.load(store, "s")
        Study.create(faster, "s", study.model, study.fingerprint, study.space, study.protocol)
    verify = ("verify", "onnx", "--study", "s", "--rounds", "3", "--tpot-ms", "0.01", *on_device)
    for database, within in (("llm-nas.db", False), ("faster.db", True)):
        verified = nas(*verify, "--database", database)
        assert verified.code == (0 if within else 1), verified
        rows = verified.json["folders"]
        assert all((row["tpot_at_profile_speed_ms"] <= 0.01) == row["within_budget"] == within for row in rows)
        assert all(row["tpot_ms"] > 0.01 for row in rows)
    missing = nas(*verify[:4], "--threads", "1", "--context-tokens", "9", "--tpot-ms", "1", "--rounds", "1")
    assert missing.code == 2
    assert "was not profiled for decode at 9 tokens" in missing.sentence


def check_cards(tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A card says what `nas verify` said, and its instructions for Python run as they stand."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for row in rows:
        card = (tmp_path / row["directory"] / "README.md").read_text()
        assert f"{row['tpot_ms']:.2f} ms |" in card
        assert "1 threads: parity holds." in card
        assert re.search(r"On 2,048 tokens .* perplexity \d", card)
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{row['format']}: {run.stderr}"
        assert run.stdout.strip(), row["format"]


def check_bf16(nas: Nas, on_device: tuple[str, ...]) -> None:
    """Files of the full model hold its weights as bf16, for which ONNX Runtime has no kernels."""
    export = ("export", "--study", "s", "--subnet", "full", "--precision", "bf16", "--output")
    assert nas(*export, "half", "--format", "openvino", "--format", "huggingface", *on_device).code == 0
    verified = nas("verify", "half/openvino", "half/huggingface", "--rounds", "1", *on_device)
    assert verified.code == 0
    assert [row["precision"] for row in verified.json["folders"]] == ["bf16", "bf16"]
    refused = nas(*export, "none", "--format", "onnx", *on_device)
    assert refused.code == 2
    assert "got bf16; take another or openvino" in refused.json["error"]


def check_recorded_before_it_is_said(
    nas: Nas, folder: Path, on_device: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "verification.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("nas.subnet_commands.emit", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        assert nas("verify", str(folder), "--rounds", "1", *on_device).code == 2
    assert (folder / "verification.json").exists()


def check_fp16(nas: Nas, on_device: tuple[str, ...]) -> None:
    """Every format holds the full model's weights as fp16, and the same numbers."""
    formats = [word for name in ("openvino", "onnx", "gguf", "huggingface") for word in ("--format", name)]
    export = ("export", "--study", "s", "--subnet", "full", "--precision", "fp16", "--output", "fp16")
    assert nas(*export, *formats, *on_device).code == 0
    folders = [f"fp16/{name}" for name in formats[1::2]]
    verified = nas("verify", *folders, "--rounds", "1", *on_device)
    assert verified.code == 0
    assert [row["precision"] for row in verified.json["folders"]] == ["fp16"] * 4


def check_damaged_folders(nas: Nas, tmp_path: Path, on_device: tuple[str, ...]) -> None:
    """A tokenizer that is none, other numbers in the weights, a file cut short, and a manifest that is none."""
    tokenizer = tmp_path / "openvino" / "openvino_tokenizer.xml"
    tokenizer.write_bytes(b"x" * tokenizer.stat().st_size)
    broken = nas("verify", "openvino", "--rounds", "1", *on_device)
    assert broken.code == 2
    assert broken.json["error"]
    verify = ("verify", "onnx", "--rounds", "1", *on_device)
    weights = next((tmp_path / "onnx").glob("*.onnx.data"))
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    altered = nas(*verify)
    assert altered.code == 1
    assert [row["parity_holds"] for row in altered.json["folders"]] == [False]
    weights.write_bytes(content[:-1])
    assert (
        nas(*verify).json["error"]
        == f"onnx/{weights.name} has {len(content) - 1:,} bytes where {len(content):,} were written; export again"
    )
    (tmp_path / "onnx" / "llm-nas.json").write_text("{}")
    damaged = nas(*verify)
    assert damaged.code == 2
    assert "damaged or from another version" in damaged.sentence
