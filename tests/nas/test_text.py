import json
from dataclasses import replace

import pytest
import torch
from jinja2 import TemplateError

from nas.protocol import protocol_on
from nas.text import CALIBRATION_FILES, SEARCH_FILES, TEST_FILES, all_windows, file_windows, read_text, token_windows


class _Letters:
    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def __call__(self, text, add_special_tokens=True, verbose=True):
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*first, *map(ord, text)]}


_letters = _Letters()


def test_windows_are_consecutive_or_a_seeded_choice():
    text = "abcdefghij"
    assert token_windows(_letters, text, 2, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    chosen = token_windows(_letters, text * 20, 5, 4, seed=3)
    assert torch.equal(chosen, token_windows(_letters, text * 20, 5, 4, seed=3))
    assert not torch.equal(chosen, token_windows(_letters, text * 20, 5, 4, seed=4))


def test_windows_begin_as_the_models_texts_do(tmp_path):
    tokenizer = _Letters(bos_token_id=2)
    assert token_windows(tokenizer, "abcdefgh", 2, 4).tolist() == [[2, 97, 98, 99], [2, 100, 101, 102]]
    file = tmp_path / "a"
    file.write_text("abcdefgh")
    assert all_windows(tokenizer, [file], 3).tolist() == [[2, 97, 98], [2, 99, 100], [2, 101, 102], [2, 103, 104]]
    assert file_windows(tokenizer, [file], 1, 3, after=(2, 3)).tolist() == [[2, 103, 104]]
    with pytest.raises(ValueError, match="wanted 3 windows of 4 tokens, got text for 2"):
        token_windows(tokenizer, "abcdefgh", 3, 4)


def test_too_short_a_text_says_so():
    with pytest.raises(ValueError, match="wanted 4 windows of 3 tokens, got text for 3"):
        token_windows(_letters, "abcdefghij", 4, 3)


def test_files_share_the_windows(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("a" * 20)
    files[1].write_text("b" * 20)
    assert file_windows(_letters, files, 3, 2).tolist() == [[97, 97], [97, 97], [98, 98]]
    with pytest.raises(ValueError, match="there is no"):
        file_windows(_letters, [tmp_path / "c"], 1, 1)


def test_windows_after_others_of_the_same_files(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("abcdefghij")
    files[1].write_text("klmnopqrst")
    assert file_windows(_letters, files, 2, 2, after=(3, 2)).tolist() == [[101, 102], [109, 110]]
    with pytest.raises(ValueError, match="wanted 2 windows of 4 tokens after 4 others, got text for 1"):
        file_windows(_letters, files, 4, 4, after=(2, 4))


@pytest.mark.parametrize("tokens", [32, 96, 128])
def test_tuning_windows_begin_anew_and_leave_the_searchs_text(tmp_path, monkeypatch, tokens):
    """Of a user's own files, with a model whose texts begin with a token of their own."""
    monkeypatch.setattr("nas.text._first", lambda tokenizer: [7])
    files = [tmp_path / name for name in "abc"]
    for number, file in enumerate(files):
        file.write_text("".join(chr(1000 * number + 100 + i) for i in range(600)))
    protocol = replace(
        protocol_on(files), calibration_windows=8, calibration_tokens=64, search_windows=3, search_tokens=32
    )
    windows = protocol.tuning(_letters, tokens)
    assert windows.shape[1] == tokens
    assert (windows[:, 0] == 7).all()
    assert not (windows[:, 1:] == 7).any()
    assert not set(windows[:, 1:].flatten().tolist()) & set(protocol.search(_letters)[:, 1:].flatten().tolist())


def test_windows_without_room_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("abc")
    with pytest.raises(ValueError, match="wanted windows of more than 0 tokens, got 0"):
        all_windows(_letters, [tmp_path / "a"], 0)


class _Chat:
    chat_template = "there is one"

    @staticmethod
    def apply_chat_template(messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "tool":
            raise TemplateError("a tool may not begin")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_records_are_read_as_the_model_reads_them(tmp_path):
    file = tmp_path / "own.jsonl"
    records = [
        {"text": "plain", "url": "unused"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Say\u2028it.", "output": "it"},
    ]
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    chatted = "plain\n\n<user>hi<assistant>yes\n\n<user>Add.\n1 + 1<assistant>2\n\n<user>Say\u2028it.<assistant>it"
    assert read_text(file, _Chat()) == chatted
    assert read_text(file, None) == "plain\n\nhi\nyes\n\nAdd.\n1 + 1\n2\n\nSay\u2028it.\nit"


def test_messages_that_the_template_refuses_are_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"messages": [{"role": "tool", "content": "42"}]}')
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1, got: a tool may not begin"):
        read_text(tmp_path / "own.jsonl", _Chat())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"text": "a"}\nnot json', r"JSON object in .*own\.jsonl, line 2"),
        (b'{"title": "a"}', "line 1, got none; rename its fields"),
        (b'["a"]', "line 1, got none"),
        (b'{"messages": [{"role": "user"}]}', "line 1, got none"),
        (b'{"text": "\xff"}', "got something else at byte 10; convert it"),
    ],
)
def test_other_files_are_refused(tmp_path, content, named):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=named):
        read_text(tmp_path / "own.jsonl", None)


def test_slices_share_no_paragraph():
    paragraphs = [
        {line for file in files for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 40}
        for files in (CALIBRATION_FILES, SEARCH_FILES, TEST_FILES)
    ]
    assert all(paragraphs)
    assert not paragraphs[0] & paragraphs[1] | paragraphs[0] & paragraphs[2] | paragraphs[1] & paragraphs[2]
