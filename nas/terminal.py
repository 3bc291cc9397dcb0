"""What the commands share: progress on standard error, results on standard output, errors as one sentence."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

EXIT_UNMET = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# what is printed may hold a model's own words: no markup in it
_errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
_output = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 160)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields what long work calls with (done, total, what is going on); the bar appears with the first call."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    bar = Progress(*columns, console=_errors)
    with ExitStack() as stack:

        def update(done: int, total: int, what: str) -> None:
            if not bar.tasks:
                bar.add_task(title, what="")
                stack.enter_context(bar)
            bar.update(bar.tasks[0].id, completed=done, total=total, what=what)

        yield update
        for task in bar.tasks:  # what ended well is done, also where it took less than was thought
            bar.update(task.id, completed=task.total, what="")


def emit(result: dict[str, Any], as_json: bool, *renderables: Any) -> None:
    """Print the result as one JSON object, or the renderables for people; OSError where nobody can read them."""
    try:
        if as_json:
            print(json.dumps(result, allow_nan=False), flush=True)
            return
        for renderable in renderables:
            _output.print(renderable, soft_wrap=isinstance(renderable, str))
    except OSError:
        # what is left of it would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def note(text: str) -> None:
    _errors.print(text, style="dim", soft_wrap=True)


def fail(message: str, code: int, result: dict[str, Any] | None = None) -> int:
    """One clear sentence on standard error, as JSON too where that was asked for, and the exit code to end with."""
    if "--json" in sys.argv:
        print(json.dumps({"error": message, **(result or {})}))
    sentence = " ".join(message.split())
    _errors.print(f"nas: {sentence}", style="red" if code == EXIT_BAD_INPUT else "yellow", soft_wrap=True)
    return code


_DISK_FULL = "the disk is full; free some space and run the same command again, what was done is kept"


def safetensors_error_sentence(error: SafetensorError) -> str:
    """safetensors wraps the system's errors in its own and gives their number in the text alone."""
    return _DISK_FULL if f"os error {errno.ENOSPC})" in str(error) else str(error)


def os_error_sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return _DISK_FULL
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
