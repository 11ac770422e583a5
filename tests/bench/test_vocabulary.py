"""The generated tokenizer gives the same ids in our code and in transformers."""

import pytest

from qwen3f.bench.vocabulary import transformers_tokenizer, write_tokenizer
from qwen3f.errors import UserError

TEXT = "<|im_start|>user\nWhat is 17 + 25, in one word? Ünïcode ☃\n<|im_end|>"


@pytest.mark.parametrize("size", [300, 4096, 70_000])
def test_ids_are_those_of_transformers(tmp_path, size):
    ours = write_tokenizer(tmp_path, size)
    theirs = transformers_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs) == size
    ids = ours.encode(TEXT, allow_special=True)
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == TEXT
    assert {theirs.eos_token_id, theirs.pad_token_id} == set(ours.stop_ids)
    assert all(ours.decode([i]) is not None for i in range(size))


def test_a_letter_of_an_answer_is_one_token(tmp_path):
    ours = write_tokenizer(tmp_path, 4096)
    assert [len(ours.encode(f" {letter}")) for letter in "ABCD"] == [1] * 4


def test_too_small_is_refused(tmp_path):
    with pytest.raises(UserError, match="300 or more"):
        write_tokenizer(tmp_path, 299)
