"""Tokenizers written into GGUF files against the ones that they came from, in llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from export.decoder import random_decoder
from export.gguf import write_gguf
from export.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_metadata

from . import tiny_models

TRAINING = (
    Path(__file__).read_text() + "The year 2024, it's 1,234.5 miles; WE'LL see — naïve café, 東京 and мир.\n\n" * 9
)
TEXTS = [
    "The capital of France is",
    "it's 12345 and I'll  pay 3.50\n\n\tfor   x=7;",
    "naïve café — 東京タワー, мир 🙂 and ½ of it",
    "def f(x):\n    return x ** 2  # squares\r\n",
    " leading and trailing ",
    "",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
GENERATION = GenerationConfig(eos_token_id=2, pad_token_id=2)


def byte_level(pre: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TRAINING], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def falling_back_on_bytes(prepends: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's tokenizer.json has it, where `prepends`, or Gemma's."""
    steps = [normalizers.Prepend("▁")] if prepends else []
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fallback = [AddedToken(f"<0x{byte:02X}>", special=True) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    backend.train_from_iterator(TRAINING.split("\n"), trainer)
    state = backend.to_str().replace('"byte_fallback":false', '"byte_fallback":true')
    backend = Tokenizer.from_str(state)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


TOKENIZERS = {
    **{pre: (byte_level, pre) for pre in PRE_TOKENIZERS},
    "bytes, prepended": (falling_back_on_bytes, True),
    "bytes": (falling_back_on_bytes, False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llamacpp_cuts_text_the_same(name: str, tmp_path: Path) -> None:
    make, argument = TOKENIZERS[name]
    tokenizer = make(argument)  # type: ignore[operator]
    vocab_size = len(tokenizer) + 3  # models often have more rows than there are tokens
    shape = replace(tiny_models.shape(tied=True), vocab_size=vocab_size)
    path = write_gguf(random_decoder(shape, "fp32"), tmp_path, tokenizer_metadata(tokenizer, vocab_size, GENERATION))
    loaded = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = tokenizer(text)["input_ids"]
        assert loaded.tokenize(text.encode()) == expected, text
        if not name.startswith("bytes"):
            assert loaded.detokenize(expected).decode() == text
    assert loaded.tokenize(b"</s>", add_bos=False, special=True) == [2]
    assert loaded.token_eos() == 2


def test_a_text_that_ends_in_one_of_several_ways() -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = "{{ messages }}"
    metadata = tokenizer_metadata(tokenizer, len(tokenizer), GenerationConfig(eos_token_id=[2, 1], pad_token_id=0))
    ids = {key.split(".")[-1]: value for key, value in metadata.items() if key.endswith("_id")}
    assert ids == {"eos_token_id": 2, "eot_token_id": 1, "padding_token_id": 0}
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_of_several_chat_templates_the_file_has_the_one_for_chats() -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    metadata = tokenizer_metadata(tokenizer, len(tokenizer), GENERATION)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"tool_use": "{{ tools }}"}
    assert "tokenizer.chat_template" not in tokenizer_metadata(tokenizer, len(tokenizer), GENERATION)


def test_tokenizers_that_llamacpp_does_not_know_are_named() -> None:
    generation = GenerationConfig(eos_token_id=2)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="by byte-pair encoding, got WordLevel"):
        tokenizer_metadata(words, 1, generation)
    cut_otherwise = byte_level("gpt-2")
    cut_otherwise.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"wanted text cut as by one of gpt-2, smollm.*Whitespace"):
        tokenizer_metadata(cut_otherwise, len(cut_otherwise), generation)
