from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export import (
    ArtefactError,
    Manifest,
    Parity,
    ProfiledReferences,
    Verification,
    dequantize,
    export_folder,
    quantize,
    read_manifest,
    verify,
)
from export.artefact import FORMATS, MANIFEST_FILE, Format
from export.generation import generate
from export.verify import MAX_LOGIT_DIFFERENCE, MAX_MEAN_KL, LogitAgreement, logit_agreement
from hw_profiles.references import DEPTHS, reference_shapes
from hw_profiles.runtimes import Session
from hw_profiles.shapes import PRECISIONS, Precision, Workload
from hw_profiles.timing import Timing, measure

from . import tiny_models

PROMPT = "the theme"
WORKLOADS = (Workload("prefill", 8), Workload("decode", 8))
POSITIONS = torch.tensor([9, 12, 15])
WEIGHTS_FILE: dict[Format, str] = {
    "huggingface": "model.safetensors",
    "onnx": "model.onnx.data",
    "openvino": "openvino_model.bin",
    "gguf": "model.gguf",
}
CASES = [
    (format_, precision) for format_ in FORMATS for precision in PRECISIONS if (format_, precision) != ("onnx", "bf16")
]


def _reference(precision: Precision) -> PreTrainedModel:
    return tiny_models.rounded(tiny_models.heterogeneous(), precision)


def _verify(directory: Path) -> Verification:
    return verify([directory], threads=1, workloads=WORKLOADS, prompt=PROMPT, new_tokens=12, rounds=1)[0]


@pytest.fixture(scope="module")
def exported(tokenizer: PreTrainedTokenizerFast, scratch: Path) -> dict[tuple[Format, Precision], Path]:
    """Every format at every precision, through the same call as `nas export`."""
    folders = {}
    for format_, precision in CASES:
        manifest = Manifest(format_, precision, tiny_models.shape(tied=True), "tiny", "0" * 16, "subnet")
        ids = tiny_models.tokens(16, batch=2, seed=8)
        logits = torch.from_numpy(tiny_models.torch_logits(_reference(precision), ids))[:, POSITIONS]
        folders[format_, precision] = export_folder(
            tiny_models.heterogeneous(),
            tokenizer,
            manifest,
            Parity(ids, POSITIONS, logits),
            scratch / f"{format_}-{precision}",
        )
    return folders


@pytest.mark.parametrize(("format_", "precision"), CASES)
def test_an_export_is_the_model_that_it_came_from(
    exported: dict[tuple[Format, Precision], Path],
    tokenizer: PreTrainedTokenizerFast,
    format_: Format,
    precision: Precision,
) -> None:
    result = _verify(exported[format_, precision])
    assert result.parity_holds
    assert result.exact.max_logit_difference < MAX_LOGIT_DIFFERENCE
    assert result.shipped.mean_kl < 0.02
    assert result.exact.positions == 6
    assert set(result.timings) == set(WORKLOADS)
    assert all(timing.median_ms > 0 for timing in result.timings.values())
    # the runtime's own generator, tokenizer and all; activations rounded to 8 or 16 bits may choose another token
    if format_ != "gguf" and (format_, precision) not in (("onnx", "int8"), ("onnx", "int4"), ("openvino", "bf16")):
        expected = tiny_models.greedy(_reference(precision), tokenizer(PROMPT, return_tensors="pt")["input_ids"], 12)
        assert tiny_models.EOS not in expected
        assert result.generated == tokenizer.decode(expected)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_halves_take_two_bytes(
    exported: dict[tuple[Format, Precision], Path], precision: Precision, dtype: torch.dtype
) -> None:
    tensors = load_file(exported["huggingface", precision] / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 2} == {dtype}
    assert f"torch.{json.loads((exported['huggingface', precision] / 'config.json').read_text())['dtype']}" == str(
        dtype
    )
    shape = tiny_models.shape(tied=True)
    saved = shape.weight_bytes("fp32") - shape.weight_bytes(precision)
    for format_ in ("openvino", "onnx", "gguf"):
        if (format_, precision) in exported:
            sizes = [(exported[format_, p] / WEIGHTS_FILE[format_]).stat().st_size for p in ("fp32", precision)]
            # onnx starts each at a page
            assert sizes[0] - sizes[1] == pytest.approx(saved, abs=0 if format_ == "openvino" else 0.1 * saved)


@pytest.mark.parametrize("format_", FORMATS)
def test_matrices_that_were_rounded_before_are_written_as_they_are(
    tokenizer: PreTrainedTokenizerFast, format_: Format, tmp_path: Path
) -> None:
    """Other integers than the nearest, in one projection of each part."""
    reference, quantized = _reference("int4"), {}
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        packed = quantize(tiny_models.heterogeneous().state_dict()[name], 4)
        quantized[name] = replace(packed, integers=packed.integers.flip(0))
        reference.state_dict()[name].copy_(dequantize(quantized[name]))
    ids = tiny_models.tokens(16)
    logits = torch.from_numpy(tiny_models.torch_logits(reference, ids))[:, POSITIONS]
    manifest = Manifest(format_, "int4", tiny_models.shape(tied=True), "tiny", "0" * 16, "subnet")
    model, parity = tiny_models.heterogeneous(), Parity(ids, POSITIONS, logits)
    export_folder(model, tokenizer, manifest, parity, tmp_path / "out", quantized)
    assert _verify(tmp_path / "out").parity_holds
    export_folder(tiny_models.heterogeneous(), tokenizer, manifest, parity, tmp_path / "out")
    assert not _verify(tmp_path / "out").parity_holds


@pytest.mark.parametrize("format_", FORMATS)
def test_parts_of_an_int4_model_have_8_bits_where_they_are_given_so(
    tokenizer: PreTrainedTokenizerFast, format_: Format, tmp_path: Path
) -> None:
    reference, quantized = _reference("int4"), {}
    for name, exact in tiny_models.heterogeneous().state_dict().items():
        if exact.dim() == 2 and name.startswith(("model.layers.0.self_attn.", "model.layers.1.mlp.")):
            quantized[name] = quantize(exact, 8)
            reference.state_dict()[name].copy_(dequantize(quantized[name]))
    ids = tiny_models.tokens(16)
    logits = torch.from_numpy(tiny_models.torch_logits(reference, ids))[:, POSITIONS]
    attention, mlp, *others = tiny_models.BLOCKS
    blocks = (replace(attention, attention_bits=8), replace(mlp, mlp_bits=8), *others)
    shape = replace(tiny_models.shape(tied=True), blocks=blocks)
    manifest = Manifest(format_, "int4", shape, "tiny", "0" * 16, "subnet")
    model, parity = tiny_models.heterogeneous(), Parity(ids, POSITIONS, logits)
    export_folder(model, tokenizer, manifest, parity, tmp_path / "out", quantized)
    assert read_manifest(tmp_path / "out").shape == shape
    assert _verify(tmp_path / "out").parity_holds
    export_folder(tiny_models.heterogeneous(), tokenizer, manifest, parity, tmp_path / "out")
    assert not _verify(tmp_path / "out").parity_holds


def test_folders_are_timed_together(exported: dict[tuple[Format, Precision], Path]) -> None:
    folders = [exported["onnx", "int4"], exported["openvino", "fp32"]]
    results = verify(folders, threads=1, workloads=WORKLOADS, prompt=PROMPT, new_tokens=2, rounds=1)
    assert [result.directory for result in results] == folders
    for workload in WORKLOADS:
        assert results[0].timings[workload].ratio == 1
        assert results[0].timings[workload].references_ms == results[1].timings[workload].references_ms


@pytest.mark.parametrize(("limit_ms", "timings"), [(10.1, 3), (14.0, 1), (6.0, 1)])
def test_a_close_limit_is_timed_again(
    exported: dict[tuple[Format, Precision], Path], monkeypatch: pytest.MonkeyPatch, limit_ms: float, timings: int
) -> None:
    """Of 10 ms with a standard error of 0.925 in the first timing. Each timing is of a session of its own."""

    def around_10_ms(
        sessions: dict[str, Session], *arguments: Any, **options: Any
    ) -> dict[tuple[str, Workload], Timing]:
        seeds.append(options["seed"])
        loaded.extend(sessions.values())
        found = measure(sessions, *arguments, **options)
        return {key: replace(t, median_ms=10.0, spread_ms=1.0, repeats=4) for key, t in found.items()}

    seeds: list[int] = []
    loaded: list[Session] = []
    monkeypatch.setattr(sys.modules["export.verify"], "measure", around_10_ms)
    folder, workload = exported["onnx", "int4"], WORKLOADS[0]
    (result,) = verify(
        [folder], threads=1, workloads=WORKLOADS, prompt=PROMPT, new_tokens=2, rounds=1,
        limits_ms={(folder, workload): limit_ms},
    )  # fmt: skip
    assert len(set(seeds)) == len(seeds) == timings
    assert len(set(map(id, loaded))) == timings
    assert result.timings[workload].repeats == 4 * timings
    latency_ms, error_ms = result.judged_ms(workload)
    assert latency_ms == 10.0
    assert error_ms == pytest.approx(0.925 / timings**0.5)


def test_a_folder_is_timed_beside_what_its_profile_knows(exported: dict[tuple[Format, Precision], Path]) -> None:
    """The first is the model itself, so at a million milliseconds in the profile the folder takes about as long."""
    folders = [exported["openvino", "int8"], exported["onnx", "int8"], exported["huggingface", "int8"]]
    shapes = reference_shapes(tiny_models.shape(tied=True))
    profile_ms = {shape.id: 1e6 * depth for shape, depth in zip(shapes, DEPTHS, strict=False)}
    known = ProfiledReferences(shapes, dict.fromkeys(WORKLOADS, profile_ms))
    results = verify(
        folders,
        threads=1,
        workloads=WORKLOADS,
        prompt=PROMPT,
        new_tokens=2,
        rounds=3,
        references={("openvino", "int8"): known, ("onnx", "int8"): known},
    )
    for result in results[:2]:
        for workload in WORKLOADS:
            timing, value_ms = result.timings[workload], result.at_profile_speed_ms(workload)
            assert set(timing.references_ms) == {shape.id for shape in shapes}
            assert value_ms == result.judged_ms(workload)[0]
            assert value_ms is not None
            assert 1e5 < value_ms < 1e7
    assert results[2].at_profile_speed_ms(WORKLOADS[0]) is None


def test_size_is_that_of_what_the_runtime_needs(exported: dict[tuple[Format, Precision], Path]) -> None:
    directory = exported["openvino", "int4"]
    on_disk = {path.name: path.stat().st_size for path in directory.iterdir()}
    evidence = on_disk.pop(MANIFEST_FILE) + on_disk.pop("parity.safetensors")
    assert _verify(directory).size_bytes == sum(on_disk.values())
    assert evidence > 0


@pytest.mark.parametrize(("format_", "precision"), CASES)
def test_other_weights_of_the_same_size_hold_no_parity(
    exported: dict[tuple[Format, Precision], Path], format_: Format, precision: Precision, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported[format_, precision], tmp_path / "copy"))
    weights = directory / WEIGHTS_FILE[format_]
    content = bytearray(weights.read_bytes())
    # two stretches of the embedding change places, so that every value is still a sound one
    first, second = slice(8192, 9216), slice(10240, 11264)
    content[first], content[second] = content[second], content[first]
    assert content != weights.read_bytes()
    assert len(content) == weights.stat().st_size
    weights.write_bytes(content)
    assert not _verify(directory).parity_holds


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_logits_that_are_not_numbers_hold_no_parity(
    exported: dict[tuple[Format, Precision], Path], precision: Precision, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported["huggingface", precision], tmp_path / "copy"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert not _verify(directory).parity_holds


class _Scripted:
    """A session that says what it is told to, one [V] after the other."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def reset(self) -> None:
        self._next = 0

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        self._next += token_ids.shape[1]
        return self._logits[self._next - 1][None].numpy()


def test_agreement_by_hand() -> None:
    """Two outcomes, 1/2 and 1/2 against 1/4 and 3/4: KL = ln 2 - ln 3 / 2 at one position, 0 at the other."""
    log = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]).log()
    parity = Parity(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([1, 3]), torch.full((1, 2, 2), 0.5).log())
    agreement = logit_agreement(_Scripted(log), parity)
    assert agreement.positions == 2
    assert agreement.max_logit_difference == pytest.approx(np.log(2))
    assert agreement.mean_kl == pytest.approx((np.log(2) - np.log(3) / 2) / 2, rel=1e-5)
    assert logit_agreement(_Scripted(log), parity, token_by_token=False) == agreement
    log[1] = torch.nan
    assert np.isnan(logit_agreement(_Scripted(log), parity).max_logit_difference)
    assert np.isnan(logit_agreement(_Scripted(log), parity).mean_kl)


@pytest.mark.parametrize(
    ("precision", "difference", "kl", "holds"),
    [
        ("fp32", 0.9 * MAX_LOGIT_DIFFERENCE, 1.0, True),
        ("fp32", 1.1 * MAX_LOGIT_DIFFERENCE, 0.0, False),
        ("int4", 1.0, 0.9 * MAX_MEAN_KL, True),
        ("int4", 0.0, 1.1 * MAX_MEAN_KL, False),
        ("int4", 0.0, np.nan, False),
        ("fp32", np.nan, 0.0, False),
    ],
)
def test_what_counts_as_parity(
    exported: dict[tuple[Format, Precision], Path], precision: Precision, difference: float, kl: float, holds: bool
) -> None:
    manifest = replace(read_manifest(exported["onnx", "int4"]), precision=precision)
    exact, shipped = LogitAgreement(difference, kl, 6), LogitAgreement(9.0, 9.0, 6)
    assert Verification(Path(), manifest, 1, shipped, exact, {}, "").parity_holds == holds


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_of_noise_is_refused(
    exported: dict[tuple[Format, Precision], Path], format_: Format, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported[format_, "int4"], tmp_path / "copy"))
    name = (WEIGHTS_FILE | {"onnx": "model.onnx", "openvino": "openvino_model.xml"})[format_]
    size = (directory / name).stat().st_size
    (directory / name).write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(ArtefactError, match="does not load"):
        _verify(directory)


def test_parity_of_another_vocabulary_is_refused(
    exported: dict[tuple[Format, Precision], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported["onnx", "int4"], tmp_path / "copy"))
    parity = Parity.load(directory)
    replace(parity, logits=parity.logits[:, :, :260].contiguous()).save(directory)
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    manifest["files"]["parity.safetensors"] = (directory / "parity.safetensors").stat().st_size
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="260"):
        _verify(directory)


def test_code_in_the_folder_is_not_run(exported: dict[tuple[Format, Precision], Path], tmp_path: Path) -> None:
    """Neither in place of our own class, nor for a class of its own; and nobody is asked whether it may."""
    directory = Path(shutil.copytree(exported["huggingface", "int4"], tmp_path / "copy"))
    code = directory / "heterogeneous.py"
    size = code.stat().st_size
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n".ljust(size, "#"))
    assert _verify(directory).parity_holds
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "evil_llama"
    (directory / "config.json").write_text(json.dumps(config))
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    manifest["files"]["config.json"] = (directory / "config.json").stat().st_size
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="does not load"):
        _verify(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("format_", FORMATS)
def test_generation_ends_with_the_text(
    exported: dict[tuple[Format, Precision], Path], tokenizer: PreTrainedTokenizerFast, format_: Format
) -> None:
    """Of many prompts, one that the model ends early: nothing after the end, and the end itself unsaid."""
    model = _reference("fp32")
    for text in (f"{first}{second}" for first in "abcdefghijklm" for second in "nopqrstuvwxyz"):
        expected = tiny_models.greedy(model, tokenizer(text, return_tensors="pt")["input_ids"], 10)
        if tiny_models.EOS in expected[1:9]:
            break
    else:
        pytest.fail("no prompt ends early: the model or the prompts must change")
    said = tokenizer.decode(expected[: expected.index(tiny_models.EOS)])
    assert generate(exported[format_, "fp32"], format_, 1, text, 10) == said
