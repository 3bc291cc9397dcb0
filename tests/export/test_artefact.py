from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from export import ArtefactError, LatencyPrediction, Manifest, Parity, read_manifest
from export.artefact import MANIFEST_FILE, PARITY_FILE, model_bytes, whole_or_absent

from . import tiny_models

MANIFEST = Manifest(
    format="onnx",
    precision="int4",
    shape=tiny_models.shape(tied=True),
    base_model="tiny",
    base_fingerprint="0123456789abcdef",
    subnet_id="g4-w96",
    predictions=(LatencyPrediction("decode", 128, 1, "laptop", 7.5, 7.0, 8.25),),
    versions={"torch": "2"},
)


def _parity() -> Parity:
    logits = torch.randn(2, 2, 272, generator=torch.Generator().manual_seed(0))
    return Parity(tiny_models.tokens(8, batch=2), torch.tensor([5, 7]), logits)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    with whole_or_absent(tmp_path / "out", MANIFEST) as folder:
        (folder / "model.bin").write_bytes(b"weights")
        _parity().save(folder)
    return tmp_path / "out"


def _edit_manifest(directory: Path, **fields: Any) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_whole_folder_reads_back(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert {**vars(manifest), "files": {}} == vars(MANIFEST)
    assert set(manifest.files) == {"model.bin", PARITY_FILE}
    assert model_bytes(manifest) == len(b"weights")
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_or_absent(tmp_path / "out", MANIFEST) as folder:  # noqa: PT012
        (folder / "model.bin").write_bytes(b"wei")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_the_earlier_export(exported: Path) -> None:
    with pytest.raises(OSError, match="full"), whole_or_absent(exported, MANIFEST) as folder:  # noqa: PT012
        (folder / "model.bin").write_bytes(b"other")
        raise OSError("disk full")
    assert (exported / "model.bin").read_bytes() == b"weights"
    assert read_manifest(exported).files["model.bin"] == 7
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_name_leaves_the_earlier_export(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".unfinished":
            raise OSError("interrupted")
        return plain(path, target)

    plain = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="interrupted"), whole_or_absent(exported, MANIFEST) as folder:
        (folder / "model.bin").write_bytes(b"other")
    assert (exported / "model.bin").read_bytes() == b"weights"
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_a_kill_between_the_names_is_mended(exported: Path) -> None:
    exported.rename(exported.with_name("out.earlier"))
    with pytest.raises(OSError, match="full"), whole_or_absent(exported, MANIFEST):
        raise OSError("disk full")
    assert (exported / "model.bin").read_bytes() == b"weights"
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_a_link_to_an_export_stays_one(exported: Path) -> None:
    link = exported.with_name("link")
    link.symlink_to(exported)
    with whole_or_absent(link, MANIFEST) as folder:
        (folder / "model.bin").write_bytes(b"new")
    assert link.is_symlink()
    assert read_manifest(exported).files == {"model.bin": 3}


def test_while_it_is_written_nothing_looks_whole(tmp_path: Path) -> None:
    with whole_or_absent(tmp_path / "out", MANIFEST) as folder:
        (folder / "model.bin").write_bytes(b"wei")
        assert not (tmp_path / "out").exists()
        with pytest.raises(ArtefactError):
            read_manifest(folder)


def test_a_killed_export_is_no_obstacle(tmp_path: Path) -> None:
    unfinished = tmp_path / "out.unfinished"
    unfinished.mkdir()
    (unfinished / "stale").write_text("from the export that was killed")
    with whole_or_absent(tmp_path / "out", MANIFEST) as folder:
        (folder / "model.bin").write_bytes(b"weights")
    assert set(read_manifest(tmp_path / "out").files) == {"model.bin"}
    assert not unfinished.exists()


def test_an_earlier_export_is_replaced_whole(exported: Path) -> None:
    with whole_or_absent(exported, MANIFEST) as folder:
        (folder / "other.bin").write_bytes(b"more weights")
    assert read_manifest(exported).files == {"other.bin": 12}
    assert {path.name for path in exported.iterdir()} == {"other.bin", MANIFEST_FILE}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "a" / "b"):
        with whole_or_absent(directory, MANIFEST) as folder:
            (folder / "model.bin").write_bytes(b"weights")
        assert read_manifest(directory).files == {"model.bin": 7}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_not_replaced(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "thesis"
    kept = directory
    if kind == "folder":
        directory.mkdir()
        kept = directory / "chapter.tex"
    kept.write_text("years of work")
    with pytest.raises(ArtefactError, match="--output"), whole_or_absent(directory, MANIFEST):
        pytest.fail("nothing may be written for a folder that cannot be replaced")
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def _refused(directory: Path, *words: str) -> None:
    with pytest.raises(ArtefactError) as raised:
        read_manifest(directory)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "nowhere", MANIFEST_FILE)
    _refused(tmp_path, MANIFEST_FILE)
    (tmp_path / MANIFEST_FILE).mkdir()
    _refused(tmp_path, MANIFEST_FILE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '"llm-nas"',
        '{"manifest_version": 2}',
        "[" * 100_000,
        '{"manifest_version": 1, "format": "pickle"}',
    ],
    ids=["empty", "brace", "list", "null", "object", "string", "future", "deep", "format"],
)
def test_a_manifest_of_another_kind(exported: Path, text: str) -> None:
    (exported / MANIFEST_FILE).write_text(text)
    _refused(exported, MANIFEST_FILE, "export again")


def test_a_truncated_or_binary_manifest(exported: Path) -> None:
    path = exported / MANIFEST_FILE
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        _refused(exported, MANIFEST_FILE, "export again")
    path.write_bytes(b"\xff\xfe\x00" + whole)
    _refused(exported, MANIFEST_FILE, "export again")


@pytest.mark.parametrize(
    "fields",
    [
        {"format": ["onnx"]},
        {"precision": "int2"},
        {"shape": None},
        {"shape": {"hidden_size": 64}},
        {"predictions": [{"phase": "decode"}]},
        {"predictions": 3},
        {"files": ["model.bin"]},
        {"files": {"model.bin": "many"}},
        {"files": {"model.bin": float("inf")}},
        {"files": {"model.bin": None}},
        {"surprise": 1},
        {"versions": {"llm-nas": 1}},
        {"licence": 3},
        {"quality": {"kl": "a", "perplexity": 1.0, "full_perplexity": 1.0, "tokens": 4}},
        {"predictions": [{**asdict(MANIFEST.predictions[0]), "value_ms": "7"}]},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_a_manifest_with_a_wrong_field(exported: Path, fields: dict[str, Any]) -> None:
    _edit_manifest(exported, **fields)
    _refused(exported, MANIFEST_FILE, "export again")


def test_blocks_that_no_model_has(exported: Path) -> None:
    shape = json.loads((exported / MANIFEST_FILE).read_text())["shape"]
    shape["blocks"][0]["num_key_value_heads"] = 3
    _edit_manifest(exported, shape=shape)
    _refused(exported, "num_key_value_heads", "export again")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "a\0b", "gone.bin"])
def test_names_outside_the_folder(exported: Path, name: str) -> None:
    (exported.parent / "secret").write_bytes(b"weights")
    (exported / "sub").mkdir()
    (exported / "sub" / "file").write_bytes(b"weights")
    _edit_manifest(exported, files={name: 7})
    _refused(exported, repr(name), "export again")


def test_symbolic_links(exported: Path) -> None:
    outside = exported.parent / "outside.bin"
    (exported / "model.bin").rename(outside)
    (exported / "model.bin").symlink_to(outside)
    _refused(exported, "model.bin", "export again")


@pytest.mark.parametrize("content", [b"", b"weight", b"weights!"])
def test_a_file_of_another_size(exported: Path, content: bytes) -> None:
    (exported / "model.bin").write_bytes(content)
    _refused(exported, "model.bin", f"{len(content)} bytes where 7", "export again")


def test_parity_reads_back(exported: Path) -> None:
    loaded, written = Parity.load(exported), _parity()
    for name in ("token_ids", "positions", "logits"):
        assert torch.equal(getattr(loaded, name), getattr(written, name))
    assert loaded.prompt_tokens == 6


def _damaged(parity: Parity, **changes: torch.Tensor) -> Parity:
    return Parity(**{**vars(parity), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": torch.zeros(2, 8)},
        {"token_ids": torch.zeros(16, dtype=torch.int64)},
        {"token_ids": torch.zeros(0, 8, dtype=torch.int64), "logits": torch.zeros(0, 2, 272)},
        {"token_ids": torch.full((2, 8), -1)},
        {"token_ids": torch.full((2, 8), 272)},
        {"positions": torch.tensor([5, 8])},
        {"positions": torch.tensor([-1, 7])},
        {"positions": torch.tensor([7, 5])},
        {"positions": torch.tensor([], dtype=torch.int64), "logits": torch.zeros(2, 0, 272)},
        {"positions": torch.tensor([5])},
        {"logits": torch.zeros(1, 2, 272)},
        {"logits": torch.zeros(2, 2, dtype=torch.int64)},
        {"logits": torch.full((2, 2, 272), torch.nan)},
    ],
    ids=lambda changes: "-".join(f"{name}{list(t.shape)}" for name, t in changes.items()),
)
def test_parity_that_does_not_fit_together(exported: Path, changes: dict[str, torch.Tensor]) -> None:
    _damaged(_parity(), **changes).save(exported)
    with pytest.raises(ArtefactError, match="export again"):
        Parity.load(exported)


def test_corrupt_parity(exported: Path) -> None:
    path = exported / PARITY_FILE
    whole = path.read_bytes()
    for content in (b"", whole[:100], b"\xff" * 64, whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=r"^[^\n]*export again$"):
            Parity.load(exported)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"^[^\n]*export again$"):
        Parity.load(exported)


def test_parity_with_other_tensors(exported: Path) -> None:
    from safetensors.torch import save_file

    save_file({"logits": torch.zeros(1)}, exported / PARITY_FILE)
    with pytest.raises(ArtefactError, match="export again"):
        Parity.load(exported)
