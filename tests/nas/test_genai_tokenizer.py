"""onnxruntime-genai's own tokenizer on the files that go with an exported folder, beside transformers'."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from export.decoder import decoder_from_model
from export.folder import generation_config
from export.genai_config import write_genai_config
from export.onnx import write_onnx
from export.tokenizer_files import genai_special_tokens, write_tokenizer
from nas.tokenizer import tokenizer_from_gguf

from .test_families import _metadata, _sentencepiece

genai = pytest.importorskip("onnxruntime_genai")

TEXTS = ["hello well", "a  b", "he ll\n\nwell", " cab", "it's 42", ""]
METADATA = {
    "byte-level": _metadata(),
    "byte-level with a first token": _metadata(**{"tokenizer.ggml.add_bos_token": True}),
    "with a template": _metadata(**{"tokenizer.chat_template": "{{ messages }}"}),
    "Gemma's": _sentencepiece(),
    "Gemma's with a first token": _sentencepiece(**{"tokenizer.ggml.add_bos_token": True}),
    "Llama 2's": _sentencepiece(**{"tokenizer.ggml.add_space_prefix": True}),
}


@pytest.mark.parametrize("name", METADATA)
def test_genai_and_transformers_read_the_same(tiny_model, tmp_path: Path, name: str) -> None:
    """Or it is known that they do not, and the card says so."""
    tokenizer = tokenizer_from_gguf(METADATA[name])
    model = tiny_model(vocabulary=len(METADATA[name]["tokenizer.ggml.tokens"]))
    decoder = decoder_from_model(model, "fp32")
    write_onnx(decoder, tmp_path)
    write_genai_config(decoder, generation_config(model, tokenizer), tmp_path)
    write_tokenizer(tokenizer, tmp_path)
    theirs = genai.Tokenizer(genai.Model(str(tmp_path)))
    special_tokens = genai_special_tokens(tokenizer)
    theirs.update_options(add_special_tokens="true" if special_tokens else "false")
    read_again = AutoTokenizer.from_pretrained(tmp_path)
    wanted = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [read_again(text)["input_ids"] for text in TEXTS] == wanted
    same = [[int(token) for token in theirs.encode(text)] for text in TEXTS] == wanted
    assert same == (special_tokens is not None) == (name != "Llama 2's")
