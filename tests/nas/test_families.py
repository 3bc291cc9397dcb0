from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from hw_profiles import Workload
from nas import families
from nas.distillation import capped
from nas.families import FAMILIES, load_config, load_model, within_window, wrap
from nas.fingerprint import fingerprint
from nas.profiling import profiled_space, workloads_of
from nas.space import model_shape
from nas.tokenizer import tokenizer_from_gguf

MERGES = ["h e", "l l", "he ll", "Ġ w"]


def _tokens():
    control = ["<unk>", "<s>", "</s>"]
    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    return control + letters + merged, [3] * len(control) + [1] * (len(letters) + len(merged))


def _metadata(**changes):
    tokens, types = _tokens()
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    } | changes


def _sentencepiece(**changes):
    """Bytes, letters and merges with scores; white space as Gemma's file has it, spaces spelled as such."""
    special = ["<unk>", "<s>", "</s>", "  ", "\n\n", "<tag>"]
    letters = ["▁", "\n", *"abchelow"]
    merged = ["bc", "ab", "he", "ll", "▁w", "hell"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters, *merged]
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4, 4, 4, *[6] * 256, *[1] * (len(letters) + len(merged))],
        "tokenizer.ggml.scores": [0.0] * 262 + [-1000.0] * len(letters) + [-float(i) for i in range(len(merged))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    } | changes


def _writer(path, architecture, config):
    """With the sizes that every architecture has."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    return writer


def _write_gguf(path, model, rotary_factors=(), ends=()):
    """A Llama as llama.cpp's converter writes it: q and k rows with the two rotary halves interleaved."""
    config, state = model.config, model.state_dict()
    writer = _writer(path, "llama", config)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens, types = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    for add, end in zip((writer.add_eos_token_id, writer.add_eot_token_id), ends, strict=False):
        add(end)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(tensor.numpy()))
    if rotary_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rotary_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gemma(path, model, period=2, without=()):
    """Norms hold what is multiplied by, not what is added to 1; a window is missing every `period` layers.

    Rotary embeddings of layers without one may be scaled linearly, as in the models from 4B on.
    """
    config = model.config
    gemma3 = config.model_type == "gemma3_text"
    writer = _writer(path, "gemma3" if gemma3 else "gemma2", config)
    rope = config.rope_parameters["full_attention"] if gemma3 else config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if "factor" in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_sliding_window(config.sliding_window)
    if not gemma3:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif period != 6:
        writer.add_sliding_window_pattern(period)
    for key, value in _sentencepiece().items():
        if key.startswith("tokenizer") and key not in without:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.GEMMA3 if gemma3 else gguf.MODEL_ARCH.GEMMA2, config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            values = tensor + 1 if "norm" in name else tensor
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, key, value):
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_is_the_model(tiny_model, windows, model_type, tied):
    original = tiny_model(model_type, tied=tied)
    loaded = wrap(original, None, model_type)
    with torch.no_grad():
        hidden = loaded.embed(windows)
        for layer in range(3):
            hidden = loaded.run_layer(layer, hidden)
        logits = capped(loaded.head(loaded.final_norm(hidden)), loaded.logit_cap)
        torch.testing.assert_close(logits, original(windows).logits, rtol=1e-5, atol=1e-5)


def test_phi3_is_loaded_as_a_llama(tiny_model, tmp_path):
    original = tiny_model("phi3")
    original.save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config.model_type == "llama"
    assert model_shape(load_config(str(tmp_path))) == loaded.shape
    assert loaded.fingerprint == wrap(original, None, "").fingerprint
    original.config.rope_parameters["partial_rotary_factor"] = 0.75
    with pytest.raises(ValueError, match=r"over whole heads, got partial_rotary_factor 0\.75"):
        wrap(original, None, "partial")


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_model_that_was_written(tiny, windows, tmp_path, tied):
    original = tiny(tied=tied, vocabulary=len(_tokens()[0])).model
    _write_gguf(tmp_path / "m.gguf", original)
    for place in (tmp_path / "m.gguf", tmp_path):
        loaded = load_model(str(place))
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(windows).logits, original(windows).logits)
    assert loaded.shape == wrap(original, None, "").shape


@pytest.mark.parametrize(("period", "factor"), [(2, None), (0, None), (6, None), (2, 4.0)])
def test_a_gemma3_gguf_gives_the_model_that_was_written(tiny_model, windows, tmp_path, period, factor):
    vocabulary = len(_sentencepiece()["tokenizer.ggml.tokens"])
    plain, base = {"rope_type": "default", "rope_theta": 10_000.0}, {"rope_theta": 200.0}
    scaled = plain | base if factor is None else base | {"rope_type": "linear", "factor": factor}
    original = tiny_model(
        "gemma3_text",
        vocabulary=vocabulary,
        head_dim=24,
        sliding_window_pattern=period or 4,
        rope_parameters={"full_attention": scaled, "sliding_attention": plain},
    )
    _expect_gemma_through_gguf(original, windows, tmp_path / "m.gguf", period)


def test_a_gemma2_gguf_gives_the_model_that_was_written(tiny_model, windows, tmp_path):
    vocabulary = len(_sentencepiece()["tokenizer.ggml.tokens"])
    original = tiny_model("gemma2", vocabulary=vocabulary, head_dim=24)
    _expect_gemma_through_gguf(original, windows, tmp_path / "m.gguf", 2)


def _expect_gemma_through_gguf(original, windows, path, period):
    _write_gemma(path, original, period)
    loaded = load_model(str(path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(windows).logits, original(windows).logits)
    assert loaded.shape == wrap(original, None, "").shape == model_shape(load_config(str(path)))
    assert loaded.tokenizer("ab")["input_ids"] == tokenizer_from_gguf(_sentencepiece())("ab")["input_ids"]


@pytest.mark.parametrize("field", ["tokens", "token_type", "scores"])
def test_a_gguf_with_half_a_tokenizer_is_named(tiny_model, tmp_path, field):
    vocabulary = len(_sentencepiece()["tokenizer.ggml.tokens"])
    model = tiny_model("gemma3_text", vocabulary=vocabulary)
    _write_gemma(tmp_path / "m.gguf", model, without=[f"tokenizer.ggml.{field}"])
    with pytest.raises(ValueError, match=f"wanted a sound GGUF file, .*tokenizer.ggml.{field}"):
        load_model(str(tmp_path / "m.gguf"))


def test_a_folder_gives_the_model_that_was_saved(tiny, windows, tmp_path):
    original = tiny()
    original.model.save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.fingerprint == original.fingerprint
    with torch.no_grad():
        assert torch.equal(loaded.model(windows).logits, original.model(windows).logits)


def test_a_gguf_ends_texts_in_all_its_ways(tiny, tmp_path):
    _write_gguf(tmp_path / "m.gguf", tiny(vocabulary=len(_tokens()[0])).model, ends=(2, 1))
    assert load_config(str(tmp_path / "m.gguf")).eos_token_id == [2, 1]
    assert load_model(str(tmp_path / "m.gguf")).model.generation_config.eos_token_id == [2, 1]


def test_fingerprint_sees_one_changed_weight(tiny):
    model = tiny().model
    before = fingerprint(model)
    assert before == fingerprint(tiny().model)
    model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4
    assert fingerprint(model) != before


def test_a_model_that_would_fill_the_memory_stays_as_it_is_stored(tiny, tmp_path, monkeypatch):
    tiny(vocabulary=len(_tokens()[0])).model.bfloat16().save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    roomy = load_model(str(tmp_path))
    little = replace(families.detect(), memory_bytes=2**20)
    monkeypatch.setattr(families, "detect", lambda: little)
    short = load_model(str(tmp_path))
    assert (roomy.model.dtype, short.model.dtype) == (torch.float32, torch.bfloat16)
    assert short.fingerprint == roomy.fingerprint


def test_refusals_say_what_is_wanted(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nothing\.gguf; check the path"):
        load_model(str(tmp_path / "nothing.gguf"))
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match="without the GGUF mark"):
        load_model(str(tmp_path / "text.gguf"))
    _write_gguf(tmp_path / "whole", tiny(vocabulary=len(_tokens()[0])).model)
    whole = (tmp_path / "whole").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="wanted a sound GGUF file"):
            load_model(str(tmp_path / "cut.gguf"))
    _write_gguf(tmp_path / "scaled.gguf", tiny(vocabulary=len(_tokens()[0])).model, [1.0] * 16)
    damaged = whole.replace(
        b"llama.block_count" + (4).to_bytes(4, "little") + (3).to_bytes(4, "little"),
        b"llama.block_count" + (4).to_bytes(4, "little") + (4000).to_bytes(4, "little"),
    )
    assert damaged != whole
    (tmp_path / "deep.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match="it says 4000 layers, and has tensors of 3"):
        load_model(str(tmp_path / "deep.gguf"))
    for read in (load_config, load_model):
        with pytest.raises(ValueError, match=r"got rope_freqs\.weight .* load its Hugging Face folder"):
            read(str(tmp_path / "scaled.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"wanted a folder with config\.json or one \.gguf file"):
        load_model(str(tmp_path / "empty"))
    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=10)).save_pretrained(tmp_path / "bloom")
    families = "gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3"
    with pytest.raises(ValueError, match=f"families {families}, got model_type 'bloom'"):
        load_model(str(tmp_path / "bloom"))
    model = tiny("qwen3").model
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="heads that divide the hidden size, as transformers does, got 5 for 96"):
        wrap(model, None, "odd")
    model = tiny("mistral").model
    model.config.sliding_window = 16
    with pytest.raises(ValueError, match="full attention in every layer"):
        wrap(model, None, "windowed")


@pytest.mark.parametrize(
    ("model_type", "field", "value", "message"),
    [
        (
            "gemma3_text",
            "use_bidirectional_attention",
            True,
            "a causal decoder, got use_bidirectional_attention = True",
        ),
        ("llama", "hidden_act", "mish", "wanted silu, gelu_pytorch_tanh, gelu, relu in the MLPs, got 'mish'"),
        ("gpt2", "activation_function", "mish", "in the MLPs, got 'mish'"),
        (
            "gpt2",
            "scale_attn_by_inverse_layer_idx",
            True,
            "a model of gpt2 without scale_attn_by_inverse_layer_idx = True",
        ),
        ("opt", "do_layer_norm_before", False, "a model of opt without do_layer_norm_before = False"),
        ("opt", "word_embed_proj_dim", 48, "embeddings of the hidden size 96, got 48"),
    ],
)
def test_what_a_family_may_have_and_we_do_not(tiny_model, model_type, field, value, message):
    model = tiny_model(model_type)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        wrap(model, None, "odd")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_a_window_becomes_the_number_of_positions(tmp_path, family, tiny_model):
    """Logits are the windowed model's own as far as the window reaches, and not beyond."""
    model = tiny_model(family)
    config = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    model.config.update(config if family.startswith("qwen") else {"sliding_window": 16})
    model.save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    windowed = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.window, loaded.config.max_position_embeddings) == (16, 16)
    assert load_config(str(tmp_path)).max_position_embeddings == 16
    assert not getattr(loaded.config, "sliding_window", None)
    ids = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        ours, theirs = loaded.model(ids).logits, windowed(ids).logits
    torch.testing.assert_close(ours[:, :16], theirs[:, :16], atol=1e-5, rtol=1e-5)
    assert (ours[:, 16:] - theirs[:, 16:]).abs().max() > 1e-2


def test_a_window_that_changes_nothing_and_one_that_changes_the_rotation(tiny_model):
    config = tiny_model("phi3").config
    config.sliding_window = config.max_position_embeddings
    assert (within_window(config)[0].sliding_window, within_window(config)[1]) == (None, None)
    config.sliding_window = 16
    config.rope_parameters = config.rope_parameters | {"rope_type": "longrope"}
    with pytest.raises(ValueError, match="got longrope, which depends on the number of positions"):
        within_window(config)


def test_tokenizer_splits_digits_adds_nothing_and_survives_saving(tmp_path):
    tokenizer = tokenizer_from_gguf(_metadata())
    ids = tokenizer("hell world 12")["input_ids"]
    tokens, _ = _tokens()
    assert [tokens[i] for i in ids] == ["hell", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2"]
    odd = "tabs\t\n\n  é漢🙂 don't </s>x\r\n 2024"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert 2 in tokenizer(odd)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(odd) == tokenizer(odd)
    assert set(again(odd)) == {"input_ids", "attention_mask"}


def test_tokenizer_adds_a_bos_only_where_the_file_says_so():
    tokenizer = tokenizer_from_gguf(_metadata(**{"tokenizer.ggml.add_bos_token": True}))
    assert tokenizer("hell")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", ["a", "bc"]),  # the better score first, not the left pair
        ("hello world", ["hell", "o", "▁w", "o", "<0x72>", "l", "<0x64>"]),
        ("a  b", ["a", "▁▁", "b"]),
        ("a\n\n\nb", ["a", "\n\n", "\n", "b"]),
        ("a<tag>b</s>", ["a", "<tag>", "b", "</s>"]),
        ("é", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_on_bytes(text, expected, tmp_path):
    tokenizer = tokenizer_from_gguf(_sentencepiece())
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == expected
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == tokenizer(text)


def test_sentencepiece_begins_as_the_file_says():
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": True}
    tokenizer = tokenizer_from_gguf(_sentencepiece(**changes))
    ids = tokenizer("we")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁w", "e"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "we"


def test_an_unknown_pre_tokenizer_is_refused():
    with pytest.raises(ValueError, match="got gpt2 and deepseek-llm; load the model's Hugging Face folder"):
        tokenizer_from_gguf(_metadata(**{"tokenizer.ggml.pre": "deepseek-llm"}))


@pytest.mark.parametrize(
    ("card", "licence"), [("---\nlicense: mit\n---\n# Tiny\n", "mit"), ("# Tiny\n", None), (None, None)]
)
def test_the_licence_is_that_of_the_models_own_card(tiny, tmp_path, card, licence):
    tiny().model.save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert load_model(str(tmp_path)).licence == licence


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00"])
def test_damaged_files_are_told_in_a_sentence(tiny, tmp_path, name, content):
    tiny().model.save_pretrained(tmp_path)
    tokenizer_from_gguf(_metadata()).save_pretrained(tmp_path)
    assert (tmp_path / name).exists()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"wanted a Hugging Face model with its tokenizer at .*, got: "):
        load_model(str(tmp_path))
    if name == "config.json":
        with pytest.raises(ValueError, match=r"wanted a Hugging Face model with its tokenizer at .*, got: "):
            load_config(str(tmp_path))


def test_texts_longer_than_learned_positions_are_refused(tiny):
    loaded = tiny("opt")
    assert loaded.embed(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 96)
    with pytest.raises(ValueError, match="at most 64 tokens, which tiny-opt has positions for, got 65"):
        loaded.embed(torch.zeros(1, 65, dtype=torch.int64))


def test_a_profile_reaches_as_far_as_learned_positions(tiny_model, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    gpt2, llama = (profiled_space(str(tmp_path / name)) for name in ("gpt2", "llama"))
    works = workloads_of(gpt2, None, None, [1, 2])
    assert {(w.phase, w.tokens, w.batch_size) for w in works} == {
        (phase, tokens, batch)
        for batch in (1, 2)
        for phase, tokens in (("prefill", 16), ("prefill", 64), ("decode", 0), ("decode", 63))
    }
    assert workloads_of(gpt2, [64], [63], [1]) == [Workload("prefill", 64), Workload("decode", 63)]
    for prompts, contexts in (([65], None), (None, [64])):
        with pytest.raises(
            ValueError, match=r"prompts of at most 64 tokens and contexts of at most 63, .* got 65 tokens"
        ):
            workloads_of(gpt2, prompts, contexts, [1])
    lengths = [work.tokens for work in workloads_of(llama, None, None, [1])]
    assert lengths == [16, 128, 512, 0, 128, 1024]
    with pytest.raises(ValueError, match=r"contexts of at most 32767, .* got 32769 tokens"):
        workloads_of(llama, None, [2**15], [1])
