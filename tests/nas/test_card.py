from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export import LatencyPrediction, Manifest
from export.artefact import FORMATS, Format, TextQuality, whole_or_absent
from hw_profiles import BlockShape, Device, ModelShape
from nas.card import CARD_FILE, VERIFICATION_FILE, record_verification, write_card

SHAPE = ModelShape(64, 16, 512, True, (BlockShape(4, 2, 96), BlockShape(4, 2, 0), BlockShape(0, 0, 0)))
MANIFEST = Manifest(
    "openvino", "int4", SHAPE, "tiny-llama", "0" * 16, "0123456789",
    predictions=(LatencyPrediction("decode", 128, 1, "here/openvino/int4/2 threads", 7.5, 6.5, 8.5),),
    quality=TextQuality(0.5, 33.25, 20.5, 2048), licence="apache-2.0", versions={"llm-nas": "1.2"},
)  # fmt: skip
FIELDS = {
    "prefill_tokens": 128, "decode_tokens": 128, "ttft_ms": 98.7, "tpot_ms": 7.654, "max_logit_difference": 2e-5,
    "shipped_mean_kl": 3e-3, "parity_holds": True, "within_budget": True,
}  # fmt: skip
DEVICE = Device("Fast CPU", 8, 2**34, (), "Linux", "x86_64")


def folder(parent: Path, manifest: Manifest = MANIFEST) -> Path:
    with whole_or_absent(parent / "chosen", manifest) as unfinished:
        (unfinished / "model").write_bytes(b"x" * 1_500_000)
    return parent / "chosen"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_card_says_what_the_manifest_knows(format_: Format, tmp_path: Path) -> None:
    directory = folder(tmp_path, replace(MANIFEST, format=format_))
    write_card(directory)
    card = (directory / CARD_FILE).read_text()
    assert card.startswith('---\nbase_model: "tiny-llama"\nlicense: "apache-2.0"\n')
    assert "1.5 MB: tiny-llama with 2 attention and 1 MLP parts in 3 layers, found and written by llm-nas 1.2." in card
    assert "perplexity 33.25, where tiny-llama has 20.50; mean KL divergence from it 0.500 nats" in card
    assert "| next token after 128 tokens | 7.50 ms (6.50 to 8.50) |  |" in card
    assert "Not measured yet: `nas verify chosen` does" in card
    assert '"chosen' in card or " chosen/model.gguf" in card
    assert card.endswith("That of the base model: apache-2.0.\n")
    assert "{" not in card.replace("{% ", "").replace('options = {"', "")


def test_what_verify_found_is_added_and_replaced(tmp_path: Path) -> None:
    directory = folder(tmp_path)
    for fields, said in (
        ({}, "parity holds. Logits"),
        ({"within_budget": False}, "parity holds, over the budget. Logits"),
        ({"parity_holds": False}, "PARITY DOES NOT HOLD. Logits"),
    ):
        record_verification(directory, FIELDS | fields, DEVICE, 4)
        card = (directory / CARD_FILE).read_text()
        assert f"on {DEVICE.title} with 4 threads: {said}" in card
        assert "| next token after 128 tokens | 7.50 ms (6.50 to 8.50) | 7.65 ms |" in card
        assert "| first token, prompt of 128 tokens |  | 98.70 ms |" in card
    record_verification(directory, FIELDS | {"decode_tokens": 64}, DEVICE, 4)  # of which nothing was predicted
    assert "| next token after 64 tokens |  | 7.65 ms |" in (directory / CARD_FILE).read_text()


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    directory = folder(tmp_path, replace(MANIFEST, predictions=(), quality=None, licence=None))
    write_card(directory)
    card = (directory / CARD_FILE).read_text()
    assert "license" not in card
    assert "Quality" not in card
    assert "predicted" not in card
    assert card.endswith("That of tiny-llama; see there.\n")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A folder from elsewhere may name a file of the user's README.md."""
    directory, own = folder(tmp_path), tmp_path / "own"
    own.write_text("mine")
    for name in (CARD_FILE, VERIFICATION_FILE):
        (directory / name).symlink_to(own)
    record_verification(directory, FIELDS, DEVICE, 4)
    assert own.read_text() == "mine"
    assert "7.65 ms" in (directory / CARD_FILE).read_text()
    assert sorted(path.name for path in directory.iterdir()) == [CARD_FILE, "llm-nas.json", "model", VERIFICATION_FILE]
