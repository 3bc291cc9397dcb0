"""What the commands share: progress on standard error, results on standard output, errors as one sentence."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EXIT_UNMET = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_errors = Console(stderr=True)
_output = Console()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields what long work calls with (done, total, what is going on)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    with Progress(*columns, console=_errors) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield update


def emit(result: dict[str, Any], as_json: bool, *renderables: Any) -> None:
    """Print the result as one JSON object, or the renderables for people."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    for renderable in renderables:
        _output.print(renderable)


def note(text: str) -> None:
    _errors.print(text, style="dim", highlight=False)


def fail(message: str, code: int, result: dict[str, Any] | None = None) -> int:
    """One clear sentence on standard error, as JSON too where that was asked for, and the exit code to end with."""
    if "--json" in sys.argv:
        print(json.dumps({"error": message, **(result or {})}))
    _errors.print(f"nas: {message}", style="red" if code == EXIT_BAD_INPUT else "yellow", highlight=False, markup=False)
    return code


def os_error_sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and run the same command again, what was done is kept"
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
