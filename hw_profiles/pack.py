"""A profile to carry: the graphs and the plan in one zip file, timed on a device that cannot write them itself.

    plan.json                                what to time, and how
    {engine}/{precision}/{shape id}/{file}   what the writer for that runtime made of that shape, for all its devices

Files are stored uncompressed, since random weights do not shrink: no zip is larger unpacked than it is.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

from hw_profiles.devices import Device, Target
from hw_profiles.measured import MAX_MEASUREMENTS, MeasuredFile
from hw_profiles.measurement import ROLES
from hw_profiles.memory import can_measure_memory, memory_plan, profile_memory
from hw_profiles.planning import PlannedGraph, is_of_precision
from hw_profiles.profile import Build, Progress, profile
from hw_profiles.runtimes import Runtime, engine_of
from hw_profiles.shapes import PRECISIONS, ModelShape, Precision, Workload
from hw_profiles.untrusted import MAX_ROUNDS, MAX_THREADS, Fields, model_shape, runtime_name, same_model, workload

PLAN_FILE = "plan.json"
MAX_PLAN_BYTES = 64 * 2**20
MAX_MEMORY_GRAPHS = 1000

_FORMAT, _VERSION = "llm-nas pack", 2
_REMEDY = "write the pack again with nas profile --pack"
_MAX_TARGETS = 64
_MAX_WORKLOADS = 64
#: A component of a name in the zip: no separator, no drive, nothing hidden, no `..`.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
#: A graph's files may take this many times its weights (scales in fp32, alignment, tables), and so much more.
_FILES_PER_WEIGHT_BYTE = 2
_FILES_EXTRA_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PackPlan:
    """What is to be timed: each graph for each target. `threads` of None leaves them to the device: all its cores."""

    targets: tuple[tuple[str, Precision], ...]
    graphs: tuple[PlannedGraph, ...]
    workloads: tuple[Workload, ...]
    rounds: int
    decode_steps: int
    seed: int
    threads: int | None
    #: About as many are run for their memory as well, in processes of their own.
    memory_graphs: int = 0

    @property
    def reference(self) -> ModelShape:
        """The first, the full model."""
        return next(graph.shape for graph in self.graphs if graph.role == "reference")

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """By id, in the order of the plan: a shape with two roles is there once."""
        return {graph.shape.id: graph.shape for graph in self.graphs}

    @property
    def files(self) -> dict[tuple[str, Precision, str], ModelShape]:
        """By engine, precision and id, what has files: targets that differ in the device alone share theirs."""
        kinds = dict.fromkeys((engine_of(runtime), precision) for runtime, precision in self.targets)
        return {
            (engine, precision, name): shape
            for engine, precision in kinds
            for name, shape in self.shapes.items()
            if is_of_precision(shape, precision)
        }

    def graphs_at(self, precision: Precision) -> list[PlannedGraph]:
        return [graph for graph in self.graphs if is_of_precision(graph.shape, precision)]

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "rounds": self.rounds,
                "decode_steps": self.decode_steps,
                "seed": self.seed,
                "threads": self.threads,
                "memory_graphs": self.memory_graphs,
                "workloads": [asdict(work) for work in self.workloads],
                "targets": [{"runtime": runtime, "precision": precision} for runtime, precision in self.targets],
                "graphs": [
                    {"role": graph.role, "folder": graph.shape.id, "shape": json.loads(graph.shape.to_json())}
                    for graph in self.graphs
                ],
            }
        )

    @classmethod
    def from_json(cls, content: bytes, file: str) -> PackPlan:
        """ValueError, in one sentence, unless all of it is valid."""
        fields = Fields.parse(content, file, _REMEDY)
        fields.header(_FORMAT, _VERSION)
        targets = [_target(row) for row in fields.objects("targets", 1, _MAX_TARGETS)]
        workloads = [_workload(row) for row in fields.objects("workloads", 1, _MAX_WORKLOADS)]
        rows = fields.objects("graphs", 1, MAX_MEASUREMENTS // (len(targets) * len(workloads)))
        graphs = [_graph(row) for row in rows]
        references = [graph.shape for graph in graphs if graph.role == "reference"]
        if not references:
            raise ValueError(f"{file}: one of graphs must have the role reference, got none; {_REMEDY}")
        for row, graph in zip(rows, graphs, strict=True):
            same_model(graph.shape, references[0], row)
        for name, values in (("targets", targets), ("workloads", workloads), ("graphs", graphs)):
            if len(set(values)) < len(values):
                raise ValueError(f"{file}: {name} must be distinct, got some twice; {_REMEDY}")
        made = cls(
            targets=tuple(targets),
            graphs=tuple(graphs),
            workloads=tuple(workloads),
            rounds=fields.integer("rounds", 1, MAX_ROUNDS),
            decode_steps=fields.integer("decode_steps", 1, MAX_ROUNDS),
            seed=fields.integer("seed", 0, 2**32),
            threads=fields.optional_integer("threads", 1, MAX_THREADS),
            memory_graphs=fields.integer("memory_graphs", 0, MAX_MEMORY_GRAPHS) if "memory_graphs" in fields else 0,
        )
        fields.end()
        return made


def _target(fields: Fields) -> tuple[str, Precision]:
    target = runtime_name(fields), fields.choice("precision", PRECISIONS)
    fields.end()
    return target


def _workload(fields: Fields) -> Workload:
    made = workload(fields)
    fields.end()
    return made


def _graph(fields: Fields) -> PlannedGraph:
    graph = PlannedGraph(model_shape(fields.nested("shape")), fields.choice("role", ROLES))
    fields.choice("folder", [graph.shape.id])
    fields.end()
    return graph


def write_pack(
    path: Path,
    plan: PackPlan,
    builders: Mapping[str, Build],
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Write the graphs that the plan needs, one at a time, and the plan. The file appears when it is whole."""
    content = plan.to_json().encode()
    PackPlan.from_json(content, "the plan")  # what the device would refuse is refused here
    if path.is_dir():
        raise ValueError(f"wanted the name of a zip file to write, got the folder {path}; give a file in it")
    if path.exists() and path.stat().st_size and not is_zipfile(path):
        raise ValueError(f"wanted the name of a new file, or of an earlier pack, got {path}; give another name")
    files = plan.files
    _check_room(path, sum(shape.weight_bytes(precision) for (_, precision, _), shape in files.items()))
    part = path.with_name(path.name + ".part")
    try:
        with ZipFile(part, "w", ZIP_STORED) as archive:
            archive.writestr(PLAN_FILE, content)
            for done, ((engine, precision, name), shape) in enumerate(files.items()):
                progress(done, len(files), f"{engine}/{precision}: writing {name}")
                with tempfile.TemporaryDirectory(prefix="hw_profiles-") as directory:
                    builders[engine](shape, precision, Path(directory))
                    for file in sorted(Path(directory).iterdir()):
                        archive.write(file, f"{engine}/{precision}/{name}/{file.name}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    progress(len(files), len(files), "finished")


def _check_room(path: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < wanted_bytes:
        raise ValueError(
            f"{path} needs about {wanted_bytes / 1e9:.1f} GB, got {free_bytes / 1e9:.1f} GB free on its disk; name "
            "fewer --runtime and --precision, or plan fewer --anchors and --heldout"
        )


class Pack:
    """An open pack, all of it checked but what the graphs' own files hold, which only their runtime can tell.

    ValueError, in one sentence, for whatever `write_pack` would not have written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._refusals():
            self._archive = ZipFile(path)
        try:
            self._files = self._checked_files()
            with self._refusals():
                content = self._archive.read(PLAN_FILE)
            self.plan = PackPlan.from_json(content, f"{path}: {PLAN_FILE}")
            self._check_graphs()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._archive.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def builder(self, runtime: str) -> Build:
        """What `profile` takes as `build`: unpacks a graph instead of writing it."""

        def unpack(shape: ModelShape, precision: Precision, directory: Path) -> Path:
            for info in self._files[engine_of(runtime), precision, shape.id]:
                with (
                    self._refusals(),
                    self._archive.open(info) as source,
                    (directory / info.filename.rpartition("/")[2]).open("xb") as file,
                ):
                    shutil.copyfileobj(source, file, 2**20)
            return directory

        return unpack

    def _checked_files(self) -> dict[tuple[str, str, str], list[ZipInfo]]:
        """The files of each graph, by engine, precision and shape id."""
        entries = self._archive.infolist()
        names = [info.filename for info in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.path} must hold each file once, got some twice; {_REMEDY}")
        if PLAN_FILE not in names:
            raise ValueError(f"{self.path} must hold {PLAN_FILE}, got a zip file without; {_REMEDY}")
        files: dict[tuple[str, str, str], list[ZipInfo]] = {}
        for info in entries:
            parts = info.filename.split("/")
            mode = info.external_attr >> 16
            if info.filename != PLAN_FILE and (len(parts) != 4 or not all(map(_SAFE_NAME.fullmatch, parts))):
                raise self._unsafe(info, "a name such as onnxruntime/int8/0123456789ab/model.onnx")
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise self._unsafe(info, "a plain file")
            if info.compress_type != ZIP_STORED or info.flag_bits & 1:
                raise self._unsafe(info, "stored uncompressed and unencrypted")
            if info.filename == PLAN_FILE:
                if info.file_size > MAX_PLAN_BYTES:
                    raise self._unsafe(info, f"at most {MAX_PLAN_BYTES:,} bytes")
            else:
                files.setdefault((parts[0], parts[1], parts[2]), []).append(info)
        if sum(info.file_size for info in entries) > self.path.stat().st_size:
            raise ValueError(f"{self.path} must not be larger unpacked than it is, got files that overlap; {_REMEDY}")
        return files

    def _check_graphs(self) -> None:
        """Every graph of the plan has files of a size that fits its shape, and nothing else is there."""
        wanted = self.plan.files
        for found in self._files:
            if found not in wanted:
                raise ValueError(f"{self.path} must hold the plan's graphs alone, got {'/'.join(found)}; {_REMEDY}")
        for (engine, bits, shape_id), shape in wanted.items():
            size_bytes = sum(info.file_size for info in self._files.get((engine, bits, shape_id), []))
            weight_bytes = shape.weight_bytes(bits)
            if not 0 < size_bytes <= _FILES_PER_WEIGHT_BYTE * weight_bytes + _FILES_EXTRA_BYTES:
                raise ValueError(
                    f"{self.path} must hold files for about {weight_bytes:,} bytes of weights in "
                    f"{engine}/{bits}/{shape_id}, got {size_bytes:,} bytes; {_REMEDY}"
                )

    def _unsafe(self, info: ZipInfo, wanted: str) -> ValueError:
        name = ascii(info.filename)[1:-1][:60]
        return ValueError(f"each file in {self.path} must be or have {wanted}, got {name}; {_REMEDY}")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Whatever the zip module says of a broken file, as one sentence."""
        try:
            yield
        except (BadZipFile, EOFError, ValueError, RuntimeError, OverflowError, MemoryError, struct.error) as error:
            raise self._broken(error) from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # an offset before the file's begin
                raise
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} must be a whole zip file ({error}); copy it again, or {_REMEDY}")


def run_pack(
    pack: Pack,
    results: MeasuredFile,
    device: Device,
    engines: Mapping[str, Runtime],
    targets: Sequence[tuple[str, Precision]],
    *,
    threads: int,
    rounds: int,
    memory_graphs: int = 0,
    scratch: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Time the pack's graphs for `targets`, some of the plan's, on this device; what the results hold is kept.

    Once all are timed, about `memory_graphs` of them are run for their memory, where the system tells it.
    """
    plan = pack.plan
    in_memory = memory_plan(plan.graphs, plan.workloads, memory_graphs if can_measure_memory() else 0)
    asked = [Target(device.id, runtime, precision, threads) for runtime, precision in targets]
    counts = [len(plan.graphs_at(target.precision)) for target in asked]
    total = sum(counts) + len(asked) * len(in_memory)

    def from_there(before: int, key: str) -> Progress:
        return lambda done, _, what: progress(before + done, total, f"{key}: {what}")

    for number, target in enumerate(asked):
        profile(
            results, device, target, plan.graphs_at(target.precision), plan.workloads, pack.builder(target.runtime),
            engines[target.runtime],
            rounds=rounds, decode_steps=plan.decode_steps, seed=plan.seed, scratch=scratch,
            progress=from_there(sum(counts[:number]), target.key),
        )  # fmt: skip
    for number, target in enumerate(asked if in_memory else ()):
        profile_memory(
            results, target, engines[target.runtime].version(), plan.graphs, plan.workloads,
            pack.builder(target.runtime),
            graphs=memory_graphs, scratch=scratch,
            progress=from_there(sum(counts) + number * len(in_memory), target.key),
        )  # fmt: skip


def chosen_targets(
    plan: PackPlan, runtimes: Collection[str], precisions: Collection[str]
) -> list[tuple[str, Precision]]:
    """Those of the plan's targets with one of the names, where names are given; ValueError where none is left."""
    chosen = [
        (runtime, precision)
        for runtime, precision in plan.targets
        if (not runtimes or runtime in runtimes) and (not precisions or precision in precisions)
    ]
    if not chosen:
        there = ", ".join("/".join(target) for target in plan.targets)
        raise ValueError(
            f"wanted {' or '.join(runtimes) or 'any runtime'} at {' or '.join(precisions) or 'any precision'}, got a "
            f"pack with {there}; ask for one of these"
        )
    return chosen
