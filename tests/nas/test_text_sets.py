import json
import shutil
from pathlib import Path

import pytest

from nas import text_sets
from nas.text import read_text
from nas.text_sets import as_files


def _write(folder: Path, split: str, rows: list[dict[str, object]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def test_a_data_set_becomes_a_file_once(tmp_path):
    name = _write(
        tmp_path / "set", "train", [{"id": 1, "text": "One é."}, {"id": 2, "text": ""}, {"id": 3, "text": "Two."}]
    )
    plain = tmp_path / "notes.txt"
    files = as_files([Path(name), plain], tmp_path / "cache")
    assert files[1] == plain
    assert read_text(files[0], tokenizer=None) == "One é.\n\nTwo."
    _write(tmp_path / "set", "train", [{"text": "Three."}])
    files = as_files([Path(name), plain], tmp_path / "cache")
    assert read_text(files[0], tokenizer=None) == "Three."
    shutil.rmtree(tmp_path / "set")
    assert as_files([Path(name)], tmp_path / "cache") == files[:1]


def test_splits_and_conversations(tmp_path):
    asked = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}]
    told = [{"instruction": "Add 1 and 2.", "input": None, "output": "3", "source": "x"}]
    names = [_write(tmp_path / "told", "train", told), _write(tmp_path / "asked", "test", asked)]
    files = as_files([Path(names[0]), Path(f"{names[1]}::test")], tmp_path)
    assert [read_text(file, tokenizer=None) for file in files] == ["Add 1 and 2.\n3", "Why?\nBecause."]


def test_no_more_rows_than_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sets, "MOST_CHARACTERS", 100)
    (file,) = as_files([Path(_write(tmp_path / "set", "train", [{"text": "x" * 40}] * 50))], tmp_path)
    assert len(file.read_text().splitlines()) == 2


def test_what_cannot_be_read_says_so(tmp_path):
    name = _write(tmp_path / "set", "train", [{"prose": "x", "label": 1}])
    for wrong, message in (
        (name, "wanted a column text, messages or instruction in .*, got prose, label"),
        (f"{name}::nowhere", "wanted a data set with that split at .*nowhere"),
        (f"hf:{tmp_path / 'none'}", "wanted a data set with that split at .*none"),
        (f"{name}:a:b:c", "wanted hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
        ("hf:", "wanted hf:NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            as_files([Path(wrong)], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
