"""Several processes that start to work at the same moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])
_START = f"""
import sys
sys.path.insert(0, {_ROOT!r})
def wait():
    print("ready", flush=True)
    input()
"""


def run_at_once(programs: Sequence[str]) -> list[tuple[int, str]]:
    """Exit code and standard error of each; a program calls `wait()` when it has imported what it needs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", _START + program], **pipes) for program in programs]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        errors = [process.communicate(timeout=120)[1] for process in started]
        return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.communicate()
