"""Both kinds of tokenizer behind one interface: opened by path or by backend, streamed, saved, used for a corpus."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from qwen3f.data.tokenizers.token_text import StreamDecoder
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.train import workdir as W

_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(params=["tiktoken", "sentencepiece"])
def either(request, small_qwen, tokenizer) -> Tokenizer:
    return {"tiktoken": small_qwen, "sentencepiece": tokenizer}[request.param]


@pytest.fixture
def path_of(small_qwen, tokenizer):
    return {"tiktoken": small_qwen.path, "sentencepiece": tokenizer.path}


def test_stop_ids_and_padding(small_qwen, tokenizer):
    for each in (small_qwen, tokenizer):
        assert each.stop_ids == (each.special_id("<|im_end|>"), each.special_id("<|endoftext|>"))
    assert small_qwen.pads_vocab
    assert not tokenizer.pads_vocab


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ids_one_by_one_give_the_same_text(small_qwen, tokenizer, data):
    for each in (small_qwen, tokenizer):
        # Most ids are single bytes, and many of their sequences are no UTF-8.
        ids = data.draw(st.lists(st.integers(0, each.vocab_size - 1), max_size=20))
        skip = data.draw(st.booleans())
        stream = StreamDecoder(each, skip_special=skip)
        pieces = [stream.push(i) for i in ids]
        assert "".join([*pieces, stream.finish()]) == each.decode(ids, skip_special=skip)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*_SPECIALS, "<|im_", "end|>", "a", " ", "\n", "\n    ", "é"]), st.booleans()))
)
def test_segments_read_special_tokens_in_markup_only(small_qwen, tokenizer, segments):
    text = "".join(part for part, _ in segments)
    for each in (small_qwen, tokenizer):
        ids = each.encode_segments(segments)
        assert each.decode(ids) == text
        for name in _SPECIALS:
            assert ids.count(each.special_id(name)) == segments.count((name, True))
        again = each.encode_segments_batch([segments, [], segments[::-1], segments], num_threads=2)
        assert [piece.tolist() for piece in again] == [ids, [], each.encode_segments(segments[::-1]), ids]
        assert all(piece.dtype == np.uint32 for piece in again)
        if all(text.count(name) == segments.count((name, True)) for name in _SPECIALS):
            assert ids == each.encode(text, allow_special=True)


def test_plain_text_is_encoded_across_segments(either):
    assert either.encode_segments([("\n", True), ("    ", False)]) == either.encode("\n    ")
    assert either.encode_segments([]) == []


def test_the_seed_s_call(path_of, monkeypatch):
    kinds = {"tiktoken": QwenTokenizer, "sentencepiece": SentencePieceTokenizer}
    for backend, kind in kinds.items():
        other = next(name for name in kinds if name != backend)
        assert type(Tokenizer(backend=backend, path=path_of[backend])) is kind
        monkeypatch.setenv("QWEN3F_TOKENIZER", str(path_of[backend]))
        assert type(Tokenizer(backend=backend)) is kind
        with pytest.raises(UserError, match=rf"is no tokenizer for {other}: write Tokenizer\(backend='{backend}'"):
            Tokenizer(backend=other)
        monkeypatch.setenv("QWEN3F_TOKENIZER", "")
        with pytest.raises(UserError, match=rf"backend='{backend}'\) needs its files: write path=.*QWEN3F_TOKENIZER"):
            Tokenizer(backend=backend)
    with pytest.raises(UserError, match="backend='bpe'.*: write one of tiktoken, sentencepiece"):
        Tokenizer(backend="bpe")


def test_load_takes_files_and_directories_of_both(path_of, tmp_path):
    qwen_file = path_of["tiktoken"] / "tokenizer.json"
    assert load_tokenizer(str(qwen_file)).vocab_size == 266
    assert load_tokenizer(path_of["sentencepiece"]).vocab_size == 340
    (tmp_path / "tokenizer.json").symlink_to(qwen_file)
    assert load_tokenizer(tmp_path).vocab_size == 266
    (tmp_path / "tokenizer.model").symlink_to(path_of["sentencepiece"])
    assert load_tokenizer(tmp_path).vocab_size == 340
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path / "sub", tmp_path / "absent", tmp_path / "absent.model", tmp_path / "notes.txt"):
        # export_hf and generate have no flag for a tokenizer, so the error first says what works for all
        with pytest.raises(
            UserError, match=rf"no tokenizer at {path}, .*: put one there; a run that trains may also w"
        ):
            load_tokenizer(path)


def test_saved_in_a_workdir_once_and_loaded_back(either, small_qwen, tokenizer, tmp_path):
    W.keep_tokenizer(tmp_path / "run", either)
    kept = load_tokenizer(tmp_path / "run" / W.TOKENIZER)
    assert type(kept) is type(either)
    assert kept.fingerprint == either.fingerprint
    for later in (small_qwen, tokenizer):
        W.keep_tokenizer(tmp_path / "run", later)
    assert load_tokenizer(tmp_path / "run" / W.TOKENIZER).fingerprint == either.fingerprint
    assert os.listdir(tmp_path / "run") == [W.TOKENIZER]  # no temporary directory is left


def test_a_corpus_takes_either(either, write_jsonl, tmp_path):
    texts = [f"the other {i}\n\n    the <|im_end|> 中文 {i}" for i in range(30)]
    write_jsonl([{"text": text} for text in texts])
    config = DataConfig(
        mixture=f"files@{tmp_path / 'corpus'}", cache=str(tmp_path / "cache"), holdout=0.2, tokenizer=str(either.path)
    )
    corpus = prepare(config, seq_len=16, progress=False)
    assert corpus.tokenizer.fingerprint == either.fingerprint
    (heldout,) = corpus.heldout.values()
    tokens = heldout.read(0, heldout.num_tokens).tolist()
    assert tokens.count(either.eos_id) == heldout.num_docs
    assert either.special_id("<|im_end|>") not in tokens
    documents = either.decode(tokens).split("<|endoftext|>")[:-1]
    assert documents
    assert set(documents) < set(texts)
