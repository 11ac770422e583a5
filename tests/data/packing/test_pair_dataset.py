"""Rows of pairs: each pair once, its two answers in neighbouring segments; columns of numbers follow their tokens."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.cache.column import Column, new_column
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.errors import UserError

ANSWER = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda n: [False] * n[0] + [True] * n[1])
PAIRS = st.lists(st.tuples(ANSWER, ANSWER), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(PAIRS, st.integers(4, 40), st.booleans())
def test_every_pair_once_side_by_side(make_chat_cache, pairs, seq_len, scored):
    cache = make_chat_cache([chat for pair in pairs for chat in pair])
    needed = [sum(map(len, pair)) - (0 if scored else 2) for pair in pairs]
    kept = [number for number, size in enumerate(needed) if size <= seq_len]
    if not kept:
        with pytest.raises(UserError, match="pairs fits into seq_len"):
            PairDataset(cache, seq_len, scored=scored)
        return
    margins = np.arange(1, len(pairs) + 1, dtype=np.float32)
    data = PairDataset(cache, seq_len, 3, scored, margins=margins)
    assert data.rows.dropped == 2 * (len(pairs) - len(kept))
    padded = np.mean([data[i]["segments"] == 0 for i in range(len(data))])
    assert data.padding == pytest.approx(padded, abs=1e-12)
    with pytest.raises(IndexError, match=f"example {len(data)} of {len(data)}"):
        data[len(data)]
    found = []
    for row in map(data.__getitem__, range(len(data))):
        assert row["segments"].max() % 2 == 0
        for segment in range(1, row["segments"].max() + 1):
            places = np.flatnonzero(row["segments"] == segment)
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert row["positions"][places].tolist() == list(range(len(places)))
            weights, targets = row["loss_weights"][places], row["targets"][places]
            if scored:
                assert weights.tolist() == [0] * (len(places) - 1) + [1]
                assert (targets == -100).all()
                ids = row["tokens"][places].tolist()
            else:
                assert ((targets != -100) == (weights == 1)).all()
                ids = [*row["tokens"][places].tolist(), int(targets[-1])]
            margin = row["margins"][places]
            assert not margin[:-1].any()
            found.append((ids, segment, margin[-1], weights.sum()))
    assert sum(weights.sum() for weights in (data[i]["loss_weights"] for i in range(len(data)))) == sum(
        x[3] for x in found
    )
    seen = []
    for better, worse in zip(found[::2], found[1::2]):
        number = int(better[2]) - 1
        seen.append(number)
        assert (better[1] % 2, worse[1], worse[2]) == (1, better[1] + 1, 0)
        for side, (ids, _, _, weight) in enumerate((better, worse)):
            start, stop = cache.doc_offsets[2 * number + side : 2 * number + side + 2]
            assert ids == cache.read(start, stop).tolist()
            assert weight == (1 if scored else sum(pairs[number][side]))
    assert sorted(seen) == kept


def test_numbers_beside_the_tokens_go_with_them(make_chat_cache, tmp_path):
    """Each target gets its own number, also from a column that was pickled for a worker process."""
    cache = make_chat_cache([[False, True, True], [False, True], [False, False, True], [False, True]])
    with new_column(tmp_path / "x.npy", cache.num_tokens, np.dtype(np.float64)) as values:
        values[:] = np.arange(cache.num_tokens) / 7
    column = pickle.loads(pickle.dumps(Column(tmp_path / "x.npy", cache.num_tokens)))
    data = PairDataset(cache, 9, ref_logprobs=column)
    assert data.shortened == 0
    for row in map(data.__getitem__, range(len(data))):
        spans = data.spans(int(row["index"]))
        expected = np.concatenate([np.arange(start + 1, start + places + 1) for start, places in spans]) / 7
        assert row["ref_logprobs"].dtype == np.float64
        assert row["ref_logprobs"][: len(expected)].tolist() == expected.tolist()
        assert not row["ref_logprobs"][len(expected) :].any()
        assert not row["tokens"][len(expected) :].any()


def test_a_file_of_numbers_is_whole_or_not_there(tmp_path):
    def interrupted():
        with new_column(tmp_path / "x.npy", 3, np.dtype(np.float32)) as values:
            values[:] = 1
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not list(tmp_path.iterdir())
    with new_column(tmp_path / "x.npy", 3, np.dtype(np.float32)) as values:
        values[:] = 1
    with pytest.raises(UserError, match=r"holds \(3,\) numbers of float32, not 4 .*: delete it"):
        Column(tmp_path / "x.npy", 4)
    (tmp_path / "x.npy").write_bytes(b"no numbers")
    with pytest.raises(UserError, match="cannot be read .*: delete it"):
        Column(tmp_path / "x.npy", 3)


def test_what_is_no_stream_of_pairs_is_refused(make_chat_cache):
    with pytest.raises(ValueError, match="3 documents are no pairs of chats"):
        PairDataset(make_chat_cache([[False, True]] * 3), 9)
