"""Text of Hugging Face data sets: their first rows, kept as .jsonl files that are read like a user's own.

A data set is named `hf:NAME`, `hf:NAME:CONFIG` or `hf:NAME:CONFIG:SPLIT`, where NAME is an id or a local folder, CONFIG
may be empty, and SPLIT is `train` unless it is given. Rows are read as they stream in, so of a large data set little is
fetched; none of its code is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

PREFIX = "hf:"
#: Calibration, search and an hour of tuning read less than a million tokens.
MOST_CHARACTERS = 4_000_000
#: What `nas.text` reads: the first of these whose first column a row has.
_COLUMNS = (("text",), ("messages",), ("instruction", "input", "output"))


def as_files(names: Sequence[Path], cache_dir: Path) -> list[Path]:
    """The names, with data sets replaced by files in `cache_dir`, written unless they are there.

    Raises ValueError where there is no such data set or no column of it that we read, or without the package datasets.
    """
    return [_file(str(name), cache_dir) if str(name).startswith(PREFIX) else name for name in names]


def _file(name: str, cache_dir: Path) -> Path:
    folder, stem = cache_dir / "text", sha256(name.encode()).hexdigest()[:16]
    if files := _local_files(name):
        stem += f"-{sha256(repr(files).encode()).hexdigest()[:8]}"
    elif earlier := sorted(folder.glob(f"{stem}*.jsonl"), key=lambda file: file.stat().st_mtime_ns):
        return earlier[-1]
    path = folder / f"{stem}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(_lines(_rows(name), name))
        part.replace(path)
    return path


def _local_files(name: str) -> list[tuple[str, int, int]]:
    """What changes with the content of a data set that is a folder here; empty for one that is not."""
    folder = Path(name.removeprefix(PREFIX).split(":")[0])
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _rows(name: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} needs the package datasets ({error}); pip install 'llm-nas[tasks]'") from error
    path, config, split = (*name.removeprefix(PREFIX).split(":"), "", "", "")[:3]
    if not path or name.count(":") > 3:
        raise ValueError(f"wanted {PREFIX}NAME, {PREFIX}NAME:CONFIG or {PREFIX}NAME:CONFIG:SPLIT, got {name}")
    try:
        yield from datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # not there, of another format, or it wants code of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"wanted a data set with that split at {name}, got: {reason}") from error


def _lines(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[str]:
    """A JSON object for each row that says something, as many as MOST_CHARACTERS hold."""
    characters = 0
    for row in rows:
        columns = next((columns for columns in _COLUMNS if columns[0] in row), None)
        if columns is None:
            raise ValueError(
                f"wanted a column text, messages or instruction in {name}, got {', '.join(row)}; take another data set "
                "or write a .jsonl file of it"
            )
        if row[columns[0]]:
            line = json.dumps({column: row[column] for column in columns if column in row}, ensure_ascii=False) + "\n"
            yield line
            characters += len(line)
        if characters >= MOST_CHARACTERS:
            return
