"""Packs: written, timed, interrupted, and forged. The runtime is mostly the fake one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import pytest

import hw_profiles
from hw_profiles.__main__ import main
from hw_profiles.devices import Target, detect
from hw_profiles.measured import MeasuredFile, read_measured
from hw_profiles.measurement import Measurement
from hw_profiles.pack import PLAN_FILE, Pack, PackPlan, run_pack, write_pack
from hw_profiles.planning import PlannedGraph, plan
from hw_profiles.profile import ALONE_ROUNDS, profile
from hw_profiles.runtimes import RUNTIMES, name_on
from hw_profiles.runtimes.fake import FakeRuntime
from hw_profiles.shapes import BlockShape, ModelShape, Precision, Workload
from hw_profiles.store import Store
from hw_profiles.timing import PASSES

from . import tiny_graphs
from .test_measured import leaves, set_
from .test_profile import CHOICES, FULL, PLANNED, WORKLOADS, Builder, milliseconds

PLAN = PackPlan((("fake", "int8"),), tuple(PLANNED), tuple(WORKLOADS), 3, 2, 0, 1)
EXPECTED = {(g.role, g.shape.id, work) for g in PLANNED for work in WORKLOADS}

Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(RUNTIMES, "fake", FakeRuntime)
    monkeypatch.setattr("hw_profiles.timing.SETTLE_S", 0.0)
    monkeypatch.setattr("hw_profiles.timing.WARM_STEPS", 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    write_pack(tmp_path / "pack.zip", PLAN, {"fake": Builder()})
    return tmp_path / "pack.zip"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, with its exit code and standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(["run", *arguments]), capsys.readouterr().err

    return run


def found_in(path: Path) -> dict[tuple[str, str, Workload], Measurement]:
    return {(m.role, m.shape.id, m.workload): m for m in read_measured(path).measurements}


def test_a_pack_holds_each_graph_once(tmp_path: Path) -> None:
    build, told = Builder(), []
    write_pack(tmp_path / "pack.zip", PLAN, {"fake": build}, lambda *progress: told.append(progress))
    shapes = {graph.shape for graph in PLANNED}
    assert len(shapes) == len(PLANNED) - 2  # the repeats
    assert set(build.built) == shapes
    assert len(build.built) == len(shapes)
    with ZipFile(tmp_path / "pack.zip") as archive:
        names = set(archive.namelist())
    assert names == {PLAN_FILE} | {f"fake/int8/{shape.id}/fake.json" for shape in shapes}
    with Pack(tmp_path / "pack.zip") as opened:
        assert opened.plan == PLAN
    assert told[0][:2] == (0, len(shapes))
    assert told[-1] == (len(shapes), len(shapes), "finished")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_graphs_of_mixed_bits_are_packed_and_run_at_int4_alone(tmp_path: Path, run: Run) -> None:
    graphs = plan(FULL, CHOICES, anchors=2, heldout=2, repeats=0, mixed=2)
    mixed = {graph.shape.id for graph in graphs if graph.shape.is_mixed}
    made = replace(PLAN, targets=(("fake", "int8"), ("fake", "int4")), graphs=tuple(graphs))
    write_pack(tmp_path / "pack.zip", made, {"fake": lambda shape, _, folder: Builder()(shape, "int8", folder)})
    with Pack(tmp_path / "pack.zip") as opened:
        assert opened.plan == made
    with ZipFile(tmp_path / "pack.zip") as archive:
        names = {tuple(name.split("/")[1:3]) for name in archive.namelist() if name != PLAN_FILE}
    shapes = {graph.shape.id for graph in graphs}
    assert names == {("int8", name) for name in shapes - mixed} | {("int4", name) for name in shapes}
    assert run("pack.zip", "--output", "out.json")[0] == 0
    timed = {(m.target.precision, m.shape.id) for m in read_measured(tmp_path / "out.json").measurements}
    assert timed == names


def test_a_pack_measures_what_a_profile_does(pack: Path, run: Run, tmp_path: Path) -> None:
    code, err = run("pack.zip", "--output", "measured.json")
    assert code == 0
    lines = err.splitlines()
    assert lines[0] == f"0/{len(PLANNED)} graphs: fake/int8/1 thread: 0 graphs are stored already"
    assert any("s left: fake/int8/1 thread: timing" in line for line in lines)
    assert lines[-1] == f"{len(PLANNED)}/{len(PLANNED)} graphs: fake/int8/1 thread: finished"
    assert {entry.name for entry in tmp_path.iterdir()} == {"pack.zip", "measured.json", "temporary"}
    measured = read_measured(tmp_path / "measured.json")
    assert (measured.device, measured.reference) == (detect(), FULL)
    with Store(str(tmp_path / "profiles.db")) as store:
        target = Target(measured.device.id, "fake", "int8", 1)
        profile(store, measured.device, target, PLANNED, WORKLOADS, Builder(), FakeRuntime(), rounds=3, decode_steps=2)
        local = {(m.role, m.shape.id, m.workload): m for m in store.measurements()}
    found = found_in(tmp_path / "measured.json")
    assert set(found) == set(local) == EXPECTED
    for key, its in found.items():
        same = {name: getattr(local[key], name) for name in ("ratio", "spread_ratio", "references_ms", "created_at")}
        assert replace(its, **same) == replace(local[key], profile_ms=None)  # all but what was timed
    before = (tmp_path / "measured.json").read_bytes()
    code, err = run("pack.zip", "--output", "measured.json")
    assert (code, err.count("\n")) == (0, 1)
    assert (tmp_path / "measured.json").read_bytes() == before


def test_latencies_are_those_programmed(tmp_path: Path, run: Run) -> None:
    slow = tuple(g for g in PLANNED if g.role in ("reference", "anchor"))
    write_pack(tmp_path / "slow.zip", replace(PLAN, graphs=slow, rounds=5), {"fake": Builder(scale=5.0)})
    assert run("slow.zip", "--output", "measured.json")[0] == 0
    for found in read_measured(tmp_path / "measured.json").measurements:
        assert found.latency_ms == pytest.approx(5.0 * milliseconds(found.shape), rel=0.25)
        rounds = ALONE_ROUNDS if found.role == "reference" else 5
        assert found.repeats == (rounds if found.workload.phase == "prefill" else rounds * PASSES)


def test_options_take_part_of_a_pack(tmp_path: Path, run: Run) -> None:
    def build(shape: ModelShape, precision: Precision, directory: Path) -> Path:
        return Builder()(shape, "int8", directory)

    both = replace(PLAN, targets=(("fake", "int8"), ("fake", "int4")), threads=None)
    write_pack(tmp_path / "both.zip", both, {"fake": build})
    assert run("both.zip", "--output", "m.json", "--precision", "int4", "--rounds", "2")[0] == 0
    found = read_measured(tmp_path / "m.json").measurements
    assert {m.target for m in found} == {Target(detect().id, "fake", "int4", detect().cores)}
    assert {m.repeats for m in found} == {2, 2 * PASSES}
    code, err = run("both.zip", "--output", "m.json", "--threads", "64", "--runtime", "fake")
    assert code == 0
    assert err.splitlines()[-1].startswith(f"{2 * len(PLANNED)}/{2 * len(PLANNED)} graphs")
    assert Counter(m.target.key for m in read_measured(tmp_path / "m.json").measurements) == dict.fromkeys(
        [found[0].target.key, "fake/int8/64 threads", "fake/int4/64 threads"], len(EXPECTED)
    )
    code, err = run("both.zip", "--output", "m.json", "--precision", "fp32")
    assert code == 2
    assert "wanted any runtime at fp32, got a pack with fake/int8, fake/int4; ask for one of these" in err


class _TwoDevices(FakeRuntime):
    def __init__(self, device: str = "CPU") -> None:
        super().__init__()
        self.name = name_on("fake", device)

    def devices(self) -> list[str]:
        return ["CPU", "GPU"]


def test_devices_of_a_runtime_share_its_files(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(PLAN, targets=(("fake", "int8"), ("fake:GPU", "int8")), rounds=1)
    write_pack(tmp_path / "both.zip", both, {"fake": Builder()})
    with ZipFile(tmp_path / "both.zip") as archive:
        assert {name.rpartition("/")[0] for name in archive.namelist()} == {
            "",
            *(f"fake/int8/{graph.shape.id}" for graph in PLANNED),
        }
    code, err = run("both.zip", "--output", "m.json")
    assert code == 2
    assert "wanted a device that fake 1 lists here (fake), got fake:GPU; take one of these" in err
    monkeypatch.setitem(RUNTIMES, "fake", _TwoDevices)
    assert run("both.zip", "--output", "m.json")[0] == 0
    found = read_measured(tmp_path / "m.json").measurements
    assert Counter(m.target.runtime for m in found) == {"fake": len(EXPECTED), "fake:GPU": len(EXPECTED)}


def test_an_interrupted_run_goes_on_where_it_was(pack: Path, run: Run, tmp_path: Path) -> None:
    def stop_in_the_second_batch(done: int, total: int, what: str) -> None:
        if done:
            raise KeyboardInterrupt

    device = detect()
    results = MeasuredFile(tmp_path / "m.json", device, FULL)
    options = {"threads": 1, "rounds": 3, "progress": stop_in_the_second_batch}
    with Pack(pack) as opened, pytest.raises(KeyboardInterrupt):
        run_pack(opened, results, device, {"fake": FakeRuntime()}, PLAN.targets, **options)
    before = found_in(tmp_path / "m.json")
    assert 0 < len(before) < len(EXPECTED)
    assert run("pack.zip", "--output", "m.json")[0] == 0
    after = found_in(tmp_path / "m.json")
    assert set(after) == EXPECTED
    assert {key: after[key] for key in before} == before
    assert list((tmp_path / "temporary").iterdir()) == []


KILLED = """
import sys
sys.path.insert(0, {root!r})
import hw_profiles.timing
from hw_profiles.__main__ import main
from hw_profiles.runtimes import RUNTIMES
from hw_profiles.runtimes.fake import FakeRuntime
RUNTIMES["fake"] = FakeRuntime
hw_profiles.timing.SETTLE_S = 0.002
hw_profiles.timing.WARM_STEPS = 1
main(["run", "pack.zip", "--output", "m.json", "--rounds", "40"])
"""


def test_kill_9_keeps_the_finished_batches(pack: Path, run: Run, tmp_path: Path) -> None:
    code = KILLED.format(root=str(Path(hw_profiles.__file__).parents[1]))
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 30
    path = tmp_path / "m.json"
    while time.monotonic() < deadline_s and not (path.exists() and found_in(path)):
        time.sleep(0.05)
    assert process.poll() is None, "the run was over before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = found_in(path)
    assert 0 < len(before) < len(EXPECTED)
    assert list((tmp_path / "m.json.unpacked").iterdir()) != []
    assert run("pack.zip", "--output", "m.json")[0] == 0
    after = found_in(path)
    assert set(after) == EXPECTED
    assert {key: after[key] for key in before} == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"pack.zip", "m.json", "temporary"}


def test_two_runs_do_not_write_one_file(pack: Path, run: Run, tmp_path: Path) -> None:
    def another(done: int, total: int, what: str) -> None:
        seen.append(run("pack.zip", "--output", "m.json"))
        raise KeyboardInterrupt

    seen: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hw_profiles.__main__._progress", lambda: another)
        assert run("pack.zip", "--output", "m.json")[0] == 130
    assert seen == [(2, "hw_profiles: another run writes m.json; wait for it, or give another --output\n")]
    assert run("pack.zip", "--output", "m.json")[0] == 0
    assert set(found_in(tmp_path / "m.json")) == EXPECTED


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pack.zip"
    with pytest.raises(OSError, match="no space"):
        write_pack(path, PLAN, {"fake": Builder(lambda shape, count: OSError("no space") if count == 3 else None)})
    with pytest.raises(ValueError, match="rounds must be a whole number from 1 to 1000, got 5000"):
        write_pack(path, replace(PLAN, rounds=5000), {"fake": Builder()})
    with pytest.raises(ValueError, match="wanted the name of a zip file to write, got the folder"):
        write_pack(tmp_path / "temporary", PLAN, {"fake": Builder()})
    with pytest.raises(FileNotFoundError):
        write_pack(tmp_path / "nonesuch" / "pack.zip", PLAN, {"fake": Builder()})
    monkeypatch.setattr("hw_profiles.pack.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"needs about .* GB, got 0.0 GB free on its disk; name fewer --runtime"):
        write_pack(path, PLAN, {"fake": Builder()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["temporary"]


def test_a_file_that_is_no_pack_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "llm-nas.db"
    path.write_bytes(b"SQLite format 3\0 and weeks of measurements")
    with pytest.raises(ValueError, match="wanted the name of a new file, or of an earlier pack, got"):
        write_pack(path, PLAN, {"fake": Builder()})
    assert path.read_bytes().endswith(b"weeks of measurements")
    for _ in range(2):
        write_pack(tmp_path / "pack.zip", PLAN, {"fake": Builder()})


def test_a_graph_that_does_not_load_is_left_out(tmp_path: Path, run: Run) -> None:
    broken = PLANNED[5].shape

    def build(shape: ModelShape, precision: Precision, directory: Path) -> Path:
        path = Builder()(shape, precision, directory)
        if shape == broken:
            path.write_text("none")
        return path

    write_pack(tmp_path / "pack.zip", PLAN, {"fake": build})
    code, err = run("pack.zip", "--output", "m.json")
    assert code == 2
    assert f"1 of {len(PLANNED)} graphs could not be built, loaded or run" in err.splitlines()[-1]
    assert set(found_in(tmp_path / "m.json")) == {key for key in EXPECTED if key[1] != broken.id}


MISTAKES = {
    ("pack.zip",): "the following arguments are required: --output; see",
    ("pack.zip", "--output", "m.json", "--threads", "0"): "must be a whole number from 1 to 4096, got '0'",
    ("pack.zip", "--output", "m.json", "--rounds", "many"): "must be a whole number from 1 to 1000, got 'many'",
    ("pack.zip", "--output", "m.json", "--runtime", "tvm"): "wanted tvm at any precision, got a pack with fake/int8",
    ("pack.zip", "--output", "m.json", "--runtime", "openvino"): "wanted openvino at any precision, got a pack with",
    ("pack.zip", "--output", "nonesuch/m.json"): "No such file or directory: nonesuch/m.json.unpacked",
    ("pack.zip", "--output", "pack.zip"): "pack.zip must be JSON, got something else",
    ("nonesuch.zip", "--output", "m.json"): "No such file or directory: nonesuch.zip",
    ("temporary", "--output", "m.json"): "Is a directory: temporary",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_end_in_one_sentence(pack: Path, run: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    before = pack.read_bytes()
    code, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("hw_profiles: ")
    assert MISTAKES[arguments] in err
    assert pack.read_bytes() == before
    assert not (tmp_path / "m.json").exists()


def test_a_runtime_that_is_not_installed(pack: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> FakeRuntime:
        raise ModuleNotFoundError("No module named 'fake'")

    monkeypatch.setitem(RUNTIMES, "fake", missing)
    code, err = run("pack.zip", "--output", "m.json")
    assert code == 2
    assert "graphs for fake, which cannot be imported here (No module named 'fake'); install it, or name another" in err


GRAPH = f"fake/int8/{FULL.id}/fake.json"


def forge(
    source: Path,
    *,
    skip: tuple[str, ...] = (),
    alter: Callable[[dict[str, object]], None] = lambda plan: None,
    more: tuple[tuple[str | ZipInfo, bytes], ...] = (),
    compression: int = ZIP_STORED,
) -> None:
    """Write the pack again without some files, with another plan, with more files."""
    with ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    plan = json.loads(contents[PLAN_FILE])
    alter(plan)
    contents[PLAN_FILE] = json.dumps(plan).encode()
    with ZipFile(source, "w", compression) as archive:
        for name, content in contents.items():
            if name not in skip:
                archive.writestr(name, content)
        for name, content in more:
            archive.writestr(name, content)


def symlink(name: str) -> ZipInfo:
    info = ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def overlap(pack: Path) -> None:
    """Every entry of the central directory points to the first one's bytes and claims to be as long as the zip."""
    content = bytearray(pack.read_bytes())
    position = content.find(b"PK\x01\x02")
    while position >= 0:
        for offset in (20, 24):
            content[position + offset : position + offset + 4] = (len(content) // 2).to_bytes(4, "little")
        position = content.find(b"PK\x01\x02", position + 4)
    pack.write_bytes(content)


def encrypt(pack: Path) -> None:
    content = bytearray(pack.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    pack.write_bytes(content)


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not a zip": (lambda p: p.write_bytes(b"no zip" * 99) and None, "must be a whole zip file"),
    "empty": (lambda p: p.write_bytes(b"") and None, "must be a whole zip file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]) and None, "must be a whole zip file"),
    "cut in front": (lambda p: p.write_bytes(p.read_bytes()[300:]) and None, "must"),
    "traversal": (lambda p: forge(p, more=(("../evil", b"x"),)), "a name such as"),
    "traversal inside": (lambda p: forge(p, more=((f"fake/int8/{FULL.id}/../../../evil", b"x"),)), "a name such as"),
    "dots": (lambda p: forge(p, more=(("fake/int8/../evil", b"x"),)), "a name such as"),
    "absolute": (lambda p: forge(p, more=(("/evil", b"x"),)), "a name such as"),
    "drive": (lambda p: forge(p, more=(("fake/int8/x/C:evil", b"x"),)), "a name such as"),
    "backslash": (lambda p: forge(p, more=(("fake/int8/x/..\\evil", b"x"),)), "a name such as"),
    "hidden": (lambda p: forge(p, more=((f"fake/int8/{FULL.id}/.evil", b"x"),)), "a name such as"),
    "folder": (lambda p: forge(p, more=((f"fake/int8/{FULL.id}/evil/", b""),)), "a name such as"),
    "symlink": (lambda p: forge(p, more=((symlink(f"fake/int8/{FULL.id}/evil"), b"/etc"),)), "a plain file"),
    "symlinked plan": (lambda p: forge(p, skip=(PLAN_FILE,), more=((symlink(PLAN_FILE), b"/etc"),)), "a plain file"),
    "compressed": (lambda p: forge(p, compression=ZIP_DEFLATED), "stored uncompressed"),
    "encrypted": (encrypt, "stored uncompressed and unencrypted"),
    "overlapping": (overlap, "must not be larger unpacked than it is"),
    "no plan": (lambda p: forge(p, skip=(PLAN_FILE,)), "must hold plan.json"),
    "stranger": (lambda p: forge(p, more=(("fake/int8/0123456789ab/fake.json", b"x"),)), "the plan's graphs alone"),
    "missing graph": (lambda p: forge(p, skip=(GRAPH,)), "must hold files for about"),
    "large graph": (
        lambda p: forge(p, more=((f"fake/int8/{FULL.id}/more", bytes(70 * 2**20)),)),
        "bytes of weights in fake/int8/",
    ),
    "version": (lambda p: forge(p, alter=set_("version", to=1)), "format version 2, got 1"),
    "rounds": (lambda p: forge(p, alter=set_("rounds", to=10**9)), "rounds must be a whole number from 1 to 1000"),
    "tokens": (lambda p: forge(p, alter=set_("workloads", 0, "tokens", to=10**9)), "tokens must be a whole number"),
    "batch": (lambda p: forge(p, alter=set_("workloads", 0, "batch_size", to=10**9)), "batch_size must be a whole"),
    "vocabulary": (lambda p: forge(p, alter=set_("graphs", 0, "shape", "vocab_size", to=10**12)), "vocab_size must be"),
    "runtime": (lambda p: forge(p, alter=set_("targets", 0, "runtime", to="os")), "runtime must be one of"),
    "another folder": (lambda p: forge(p, alter=set_("graphs", 0, "folder", to="..")), "folder must be one of"),
    "no reference": (
        lambda p: forge(p, alter=lambda plan: [graph.update(role="table") for graph in plan["graphs"]]),
        "must have the role reference, got none",
    ),
    "no graphs": (lambda p: forge(p, alter=set_("graphs", to=[])), "graphs must be a list of 1 to"),
    "threads": (lambda p: forge(p, alter=set_("threads", to=-1)), "threads must be a whole number from 1 to 4096"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_pack_is_refused_in_one_sentence(pack: Path, run: Run, tmp_path: Path, forgery: str) -> None:
    spoil, words = FORGERIES[forgery]
    spoil(pack)
    code, err = run("pack.zip", "--output", "m.json")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert len(err) < 400
    assert {entry.name for entry in tmp_path.iterdir()} == {"pack.zip", "temporary"}
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_are_there_twice(pack: Path, run: Run) -> None:
    forge(pack, more=((GRAPH, b"x"),))
    code, err = run("pack.zip", "--output", "m.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "must hold each file once" in err


def test_a_damaged_graph_shows_when_it_is_unpacked(pack: Path, run: Run) -> None:
    with ZipFile(pack) as archive:
        content = archive.read(GRAPH)
    pack.write_bytes(pack.read_bytes().replace(content, content.replace(b"0.", b"9."), 1))
    code, err = run("pack.zip", "--output", "m.json")
    assert code == 2
    assert "must be a whole zip file (Bad CRC-32" in err.splitlines()[-1]


@pytest.mark.parametrize("junk", [None, -1, 10**30, 1.5, "", "x/../y", [], {}])
def test_junk_in_any_place_of_the_plan(junk: object) -> None:
    small = replace(PLAN, graphs=tuple(PLANNED[:2]))
    for place in leaves(json.loads(small.to_json())):
        content = json.loads(small.to_json())
        set_(*place, to=junk)(content)
        try:
            made = PackPlan.from_json(json.dumps(content).encode(), "plan.json")
        except ValueError:
            continue
        assert PackPlan.from_json(made.to_json().encode(), "plan.json") == made


def test_a_flipped_byte_ends_in_a_sentence(pack: Path) -> None:
    """Of the central directory and the end: whatever it leads to, never a traceback."""
    whole = pack.read_bytes()
    start = whole.find(b"PK\x01\x02")
    for position in [*range(start, start + 100), *range(len(whole) - 30, len(whole))]:
        pack.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with suppress(ValueError):
            Pack(pack).close()


FORBIDDEN = (
    *("torch", "transformers", "sqlalchemy", "onnx", "scipy", "typer", "rich", "openvino"),
    *("export", "nas", "predictors"),
)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    """The interpreter of an environment with numpy, onnxruntime and the folder hw_profiles alone."""
    folder = tmp_path / "bare"
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    for name in ("numpy", "onnxruntime", "hw_profiles"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(next(iter(spec.submodule_search_locations)))
        for path in (source, source.with_name(f"{name}.libs")):
            if path.exists():
                (site_packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def test_a_bare_environment_runs_a_pack(bare: Path, tmp_path: Path) -> None:
    """The graphs are real ones for ONNX Runtime, the same for every shape."""
    full = ModelShape(32, 16, tiny_graphs.VOCAB_SIZE, False, (BlockShape(4, 2, 64),) * 2)
    graphs = plan(full, CHOICES, anchors=1, heldout=1, repeats=1)
    graphs = [PlannedGraph(full, "reference"), *(g for g in graphs if g.role in ("anchor", "heldout", "repeat"))]
    made = PackPlan((("onnxruntime", "int8"),), tuple(graphs), tuple(WORKLOADS), 1, 2, 0, None, memory_graphs=2)
    write_pack(
        tmp_path / "pack.zip", made, {"onnxruntime": lambda shape, bits, directory: tiny_graphs.write_onnx(directory)}
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    code = f"import importlib.util as u; print([name for name in {FORBIDDEN} if u.find_spec(name)])"
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    seen = subprocess.run([bare, "-c", code], **options)
    assert seen.stdout.strip() == "[]"
    command = [bare, "-m", "hw_profiles", "run", "pack.zip", "--output", "measured.json"]
    ran = subprocess.run(command, **options)
    assert (ran.returncode, ran.stderr.count("Traceback")) == (0, 0), ran.stderr
    assert ran.stdout.startswith(f"measured.json: {2 * len(graphs)} measurements of ")
    measured = read_measured(tmp_path / "measured.json")
    assert {(m.role, m.shape.id, m.workload) for m in measured.measurements} == {
        (g.role, g.shape.id, work) for g in graphs for work in WORKLOADS
    }
    assert {(m.shape.id, m.workload) for m in measured.memory if m.role == "reference"} == {
        (full.id, work) for work in WORKLOADS
    }
    assert {m.role for m in measured.memory} == {"reference", "anchor"}
    assert all(m.peak_bytes > m.baseline_bytes > 10**6 for m in measured.memory)
    asked = subprocess.run([*command, "--runtime", "openvino"], **options)
    assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
