"""Packing equals a naive loop over tokens, and the examples put together give the token stream again."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.packing.concat import PackedDataset, bits_per_byte, eval_coverage, eval_windows, limit_context
from qwen3f.errors import UserError

_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
_DTYPES = {
    "tokens": np.int64,
    "targets": np.int64,
    "loss_weights": np.float32,
    "positions": np.int64,
    "segments": np.int32,
    "index": np.int64,
}


def _document_of(lengths):
    return [d for d, length in enumerate(lengths) for _ in range(length)]


def _naive(cache, lengths, start, stop, reset_positions, cross_documents):
    """One window of inputs start … stop - 1, token by token."""
    document = _document_of(lengths)
    rows = []
    segment, position = 0, 0
    for n in range(start, stop):
        new_document = n == start or document[n] != document[n - 1]
        segment += new_document
        position = 0 if (new_document and reset_positions) or n == start else position + 1
        counted = cross_documents or document[n] == document[n + 1]
        rows.append(
            (
                cache.read(n, n + 1)[0],
                cache.read(n + 1, n + 2)[0] if counted else -100,
                float(counted),
                position,
                1 if cross_documents else segment,
            )
        )
    return rows


def _rows(example, stop=None):
    keys = ("tokens", "targets", "loss_weights", "positions", "segments")
    return list(zip(*(example[key][:stop].tolist() for key in keys), strict=True))


@settings(max_examples=200, deadline=None)
@given(_LENGTHS, st.integers(1, 10), st.booleans(), st.booleans())
def test_examples_equal_a_naive_loop(make_cache, lengths, seq_len, reset_positions, cross_documents):
    cache = make_cache(lengths)
    if cache.num_tokens < seq_len + 1:
        return
    dataset = PackedDataset(cache, seq_len, reset_positions, cross_documents)
    assert len(dataset) == (cache.num_tokens - 1) // seq_len
    for i in range(len(dataset)):
        example = dataset[i]
        assert {key: array.dtype for key, array in example.items()} == _DTYPES
        assert example["index"].shape == ()
        assert example["index"] == i
        start = i * seq_len
        assert _rows(example) == _naive(cache, lengths, start, start + seq_len, reset_positions, cross_documents)


@settings(max_examples=100, deadline=None)
@given(_LENGTHS, st.integers(1, 10))
def test_the_stream_is_the_concatenation_of_examples(make_cache, lengths, seq_len):
    cache = make_cache(lengths)
    if cache.num_tokens < seq_len + 1:
        return
    dataset = PackedDataset(cache, seq_len, cross_documents=True)
    inputs = np.concatenate([dataset[i]["tokens"] for i in range(len(dataset))])
    targets = np.concatenate([dataset[i]["targets"] for i in range(len(dataset))])
    covered = len(dataset) * seq_len
    assert np.array_equal(inputs, cache.read(0, covered))
    assert np.array_equal(targets, cache.read(1, covered + 1))
    assert cache.num_tokens - covered <= seq_len  # only an incomplete window is left out


@settings(max_examples=200, deadline=None)
@given(_LENGTHS, st.integers(1, 10), st.one_of(st.none(), st.integers(1, 14)))
def test_eval_windows_predict_each_token_once(make_cache, lengths, seq_len, max_docs):
    cache = make_cache(lengths)
    lengths = lengths[:max_docs]
    stop = sum(lengths)
    windows = list(eval_windows(cache, seq_len, max_docs))
    assert len(windows) == math.ceil((stop - 1) / seq_len)
    for i, window in enumerate(windows):
        assert {key: (a.dtype, a.shape) for key, a in window.items()} == {
            key: (dtype, () if key == "index" else (seq_len,)) for key, dtype in _DTYPES.items()
        }
        start, end = i * seq_len, min((i + 1) * seq_len, stop - 1)
        assert _rows(window, end - start) == _naive(cache, lengths, start, end, True, False)
        assert set(_rows(window)[end - start :]) <= {(0, -100, 0.0, 0, 0)}  # padding
    predicted = [t for window in windows for t in window["targets"].tolist() if t != -100]
    first_of_documents = np.cumsum([0, *lengths[:-1]])
    assert predicted == np.delete(cache.read(0, stop), first_of_documents).tolist()
    coverage = eval_coverage(cache, max_docs)
    assert coverage.predicted_tokens == len(predicted) == sum(w["loss_weights"].sum() for w in windows)
    assert (coverage.documents, coverage.text_bytes) == (len(lengths), 3 * stop)


def test_a_window_by_hand(make_cache):
    # Documents: 10 11 EOS | 13 EOS | 15 16 17 EOS; the second window starts inside the second document.
    dataset = PackedDataset(make_cache([3, 2, 4]), seq_len=4)
    assert len(dataset) == 2
    first, second = dataset[0], dataset[1]
    assert first["tokens"].tolist() == [10, 11, 1, 13]
    assert first["targets"].tolist() == [11, 1, -100, 1]
    assert first["loss_weights"].tolist() == [1, 1, 0, 1]
    assert first["positions"].tolist() == [0, 1, 2, 0]
    assert first["segments"].tolist() == [1, 1, 1, 2]
    assert second["tokens"].tolist() == [1, 15, 16, 17]
    assert second["targets"].tolist() == [-100, 16, 17, 1]
    assert second["positions"].tolist() == [0, 0, 1, 2]
    assert second["segments"].tolist() == [1, 2, 2, 2]


def test_boundaries_come_from_offsets_not_from_tokens(make_cache):
    cache = make_cache([6])
    cache.shards[0][2] = 1  # an end-of-text token inside a document changes nothing
    example = PackedDataset(cache, seq_len=5)[0]
    assert example["segments"].tolist() == [1] * 5
    assert example["targets"].tolist() == [11, 1, 13, 14, 1]


def test_bits_per_byte_convention(make_cache):
    coverage = eval_coverage(make_cache([3, 2]))
    assert (coverage.documents, coverage.text_bytes, coverage.predicted_tokens) == (2, 15, 3)
    # 3 predicted tokens at ln 8 nats each and 2 first tokens charged ln 16: 9 + 8 bits over 15 bytes.
    assert bits_per_byte(3 * math.log(8), coverage, vocab_size=16) == pytest.approx(17 / 15, rel=1e-12)


def test_bad_lengths(make_cache):
    cache = make_cache([3, 2])
    with pytest.raises(UserError, match=r"has 5 tokens in 2 documents, fewer than .* seq_len=5 needs \(6\): lower"):
        PackedDataset(cache, seq_len=5)
    assert len(PackedDataset(cache, seq_len=4)) == 1
    with pytest.raises(UserError, match="seq_len is 0"):
        PackedDataset(cache, seq_len=0)
    with pytest.raises(UserError, match="seq_len is 0"):
        next(eval_windows(cache, 0))
    with pytest.raises(UserError, match="max_docs=0 leaves nothing"):
        next(eval_windows(cache, 4, max_docs=0))
    with pytest.raises(IndexError, match="example 1 of 1"):
        PackedDataset(cache, seq_len=4)[1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 24))
def test_limited_context_keeps_apart_what_was_apart_and_cuts_every_length_places(segments, length):
    segments = sorted(segments, key=lambda s: (s == 0, s))  # padding comes last
    batch = {"segments": torch.tensor([segments], dtype=torch.int32), "tokens": torch.zeros(1, len(segments))}
    cut = limit_context(batch, length)["segments"][0].tolist()
    for i, a in enumerate(segments):
        for j, b in enumerate(segments):
            together = a == b and (a == 0 or i // length == j // length)
            assert (cut[i] == cut[j]) == together
        assert (cut[i] == 0) == (a == 0)
    numbers = [number for number in cut if number]
    assert numbers == sorted(numbers)  # as the segments do, they rise from 1 on
    assert min(numbers, default=1) >= 1
