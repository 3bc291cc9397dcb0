import pytest
import torch

from nas.text import CALIBRATION_FILES, SEARCH_FILES, TEST_FILES, file_windows, token_windows


def _letters(text, add_special_tokens, verbose):
    assert not add_special_tokens
    return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_consecutive_or_a_seeded_choice():
    text = "abcdefghij"
    assert token_windows(_letters, text, 2, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    chosen = token_windows(_letters, text * 20, 5, 4, seed=3)
    assert torch.equal(chosen, token_windows(_letters, text * 20, 5, 4, seed=3))
    assert not torch.equal(chosen, token_windows(_letters, text * 20, 5, 4, seed=4))


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


def test_slices_share_no_paragraph():
    paragraphs = [
        {line for file in files for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 40}
        for files in (CALIBRATION_FILES, SEARCH_FILES, TEST_FILES)
    ]
    assert all(paragraphs)
    assert not paragraphs[0] & paragraphs[1] | paragraphs[0] & paragraphs[2] | paragraphs[1] & paragraphs[2]
