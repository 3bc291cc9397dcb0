"""`python -m hw_profiles run`: measure a pack on this device. Needs numpy and the runtime asked for, no more."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hw_profiles.devices import detect, pin
from hw_profiles.measured import MeasuredFile
from hw_profiles.pack import MAX_MEMORY_GRAPHS, Pack, chosen_targets, run_pack
from hw_profiles.profile import Progress
from hw_profiles.runtimes import Runtime, runtime
from hw_profiles.shapes import PRECISIONS
from hw_profiles.untrusted import MAX_ROUNDS, MAX_THREADS

try:
    import fcntl
except ImportError:  # Windows has none, and no lock there
    fcntl = None  # type: ignore[assignment]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage in front."""
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m hw_profiles", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run")
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="measure a pack that nas profile --pack wrote",
        description="Measure a pack that `nas profile --pack` wrote; give what comes out to `nas profile --import`. "
        "Run again after an interruption to go on. Graphs are unpacked a few at a time beside the output.",
    )
    run.add_argument("pack", type=Path)
    run.add_argument("--output", type=Path, required=True, help="JSON file of measurements")
    run.add_argument("--runtime", action="append", default=[], help="of the pack, only these")
    run.add_argument("--precision", action="append", choices=PRECISIONS, default=[], help="likewise")
    run.add_argument("--cpus", help="keep to these, such as 0-3,8; all by default")
    run.add_argument("--threads", type=_from(1, MAX_THREADS), help="the pack's, or all cores, by default")
    run.add_argument("--rounds", type=_from(1, MAX_ROUNDS), help="rounds of timing; the pack's by default")
    run.add_argument(
        "--memory-graphs",
        type=_from(0, MAX_MEMORY_GRAPHS),
        help="graphs run in processes of their own for their memory; the pack's by default",
    )
    return parser


def _from(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return parse


def run(arguments: argparse.Namespace) -> None:
    if arguments.cpus is not None:
        pin(arguments.cpus)
    device = detect()
    with Pack(arguments.pack) as pack:
        plan = pack.plan
        targets = chosen_targets(plan, arguments.runtime, arguments.precision)
        engines = {name: _engine(name) for name, _ in targets}
        with _scratch(arguments.output) as scratch:
            results = MeasuredFile(arguments.output, device, plan.reference)
            run_pack(
                pack,
                results,
                device,
                engines,
                targets,
                threads=arguments.threads or plan.threads or device.cores,
                rounds=arguments.rounds or plan.rounds,
                memory_graphs=plan.memory_graphs if arguments.memory_graphs is None else arguments.memory_graphs,
                scratch=scratch,
                progress=_progress(),
            )
    found = results.measured
    print(
        f"{arguments.output}: {len(found.measurements)} measurements of time and {len(found.memory)} of memory of "
        f"{device.name}, device {found.device.id}"
    )


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output, cleared of what a killed run left: a board's temporary folder is often memory.

    ValueError while another run has it: the output is rewritten whole by whoever adds to it.
    """
    folder = output.with_name(output.name + ".unpacked")
    folder.mkdir(exist_ok=True)
    with _locked(folder, f"another run writes {output}; wait for it, or give another --output"):
        for left in folder.iterdir():
            shutil.rmtree(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, refusal: str) -> Iterator[None]:
    """The lock goes with the process."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield
    finally:
        os.close(descriptor)


def _engine(name: str) -> Runtime:
    try:
        return runtime(name)
    except ImportError as error:
        raise ValueError(
            f"the pack has graphs for {name}, which cannot be imported here ({error}); install it, or name another "
            "with --runtime"
        ) from error


def _progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """A line on standard error for each batch; the time left goes by what was done since the first line."""
    first: list[tuple[float, int]] = []

    def tell(done: int, total: int, what: str) -> None:
        now_s = clock()
        if not first:
            first.append((now_s, done))
        start_s, start_done = first[0]
        left = ""
        if start_done < done < total:
            left_s = (now_s - start_s) * (total - done) / (done - start_done)
            left = f", about {left_s / 60:.0f} min left" if left_s >= 90 else f", about {left_s:.0f} s left"
        print(f"{done}/{total} graphs{left}: {what}", file=sys.stderr, flush=True)

    return tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code; every failure that a user can cause ends in one sentence, never a traceback."""
    try:
        run(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return _fail("stopped; run the same command again to go on from here", EXIT_INTERRUPTED)
    except (ValueError, RuntimeError, MemoryError) as error:  # the second is what runtimes raise for files they refuse
        return _fail(str(error) or "there is not memory enough; ask for less", EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), EXIT_BAD_INPUT)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"hw_profiles: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
