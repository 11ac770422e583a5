"""Best-fit packing keeps documents whole, has every token once, is deterministic and pads little."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data.packing.best_fit import best_fit
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import PackedDataset
from qwen3f.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.sampled_from(["cut", "drop"]))
def test_every_token_once_and_no_document_cut(lengths, seq_len, policy):
    rows = best_fit(lengths, seq_len, policy)
    pieces = [rows.pieces(r) for r in range(len(rows))]
    assert all(0 < sum(places for _, _, places in row) <= seq_len for row in pieces)
    covered = {}
    for document, begin, places in (piece for row in pieces for piece in row):
        covered.setdefault(document, []).append((begin, places))
    too_long = [d for d, n in enumerate(lengths) if n - 1 > seq_len]
    for d, n in enumerate(lengths):
        found = sorted(covered.get(d, []))
        if n == 1 or (policy == "drop" and d in too_long):
            assert not found
        elif d in too_long:  # cut into full rows and a rest
            assert [begin for begin, _ in found] == list(range(0, n - 1, seq_len))
            assert [places for _, places in found[:-1]] == [seq_len] * (len(found) - 1)
            assert sum(places for _, places in found) == n - 1
        else:
            assert found == [(0, n - 1)]
    assert rows.dropped == (len(too_long) if policy == "drop" else 0)
    assert rows.filled == sum(places for row in pieces for _, _, places in row)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
@example([6, 5, 5, 4, 4, 4, 2])
def test_each_document_goes_where_the_least_room_is_left(lengths):
    """Rows are as full as those of a plain search that follows the definition of best fit."""
    plain = []
    for d in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        if lengths[d] == 1:
            continue
        rooms = [(12 - sum(lengths[e] - 1 for e in row), r) for r, row in enumerate(plain)]
        fitting = [room for room, _ in rooms if room >= lengths[d] - 1]
        if fitting:  # among rows with equal room any will do, since only the sums of rows are compared
            plain[next(r for room, r in rooms if room == min(fitting))].append(d)
        else:
            plain.append([d])
    rows = best_fit(lengths, 12)
    found = [sorted(places for _, _, places in rows.pieces(r)) for r in range(len(rows))]
    assert sorted(map(sum, found)) == sorted(sum(lengths[d] - 1 for d in row) for row in plain)


def test_padding_is_small_on_lengths_of_real_text():
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 20_000).astype(int) + 2
    rows = best_fit(lengths, 4096)
    assert 1 - rows.filled / (4096 * len(rows)) < 0.002
    assert (best_fit(lengths, 4096).document == rows.document).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.booleans())
def test_examples(make_cache, lengths, seq_len, reset):
    cache = make_cache(lengths)
    if all(n == 1 for n in lengths):
        return
    data = BestFitDataset(cache, seq_len, reset, "cut", pad_id=7)
    documents = [cache.read(a, b).tolist() for a, b in zip(cache.doc_offsets, cache.doc_offsets[1:])]
    predicted, filled = [], 0
    for i in range(len(data)):
        row = data[i]
        assert {key: (array.shape, array.dtype) for key, array in row.items()} == {
            "tokens": ((seq_len,), np.int64),
            "targets": ((seq_len,), np.int64),
            "loss_weights": ((seq_len,), np.float32),
            "positions": ((seq_len,), np.int64),
            "segments": ((seq_len,), np.int32),
            "index": ((), np.int64),
        }
        real = row["segments"] > 0
        filled += real.sum()
        assert row["index"] == i
        assert (row["loss_weights"] == real).all()
        assert (row["tokens"][~real] == 7).all()
        assert (row["targets"][~real] == -100).all()
        assert not row["positions"][~real].any()
        assert real.tolist() == sorted(real, reverse=True)
        count = row["segments"].max()
        assert sorted(set(row["segments"][real].tolist())) == list(range(1, count + 1))
        for segment in range(1, count + 1):
            places = np.flatnonzero(row["segments"] == segment)
            text = [*row["tokens"][places].tolist(), int(row["targets"][places[-1]])]
            assert text[1:] == row["targets"][places].tolist()
            assert row["positions"][places].tolist() == (np.arange(len(places)) if reset else places).tolist()
            if len(text) < seq_len + 1 or text in documents:
                assert any(text == d or (len(d) > seq_len + 1 and text == d[-len(text) :]) for d in documents)
            predicted += text[1:]
    assert sorted(predicted) == sorted(t for d in documents for t in d[1:])
    assert data.padding == pytest.approx(1 - filled / (len(data) * seq_len), abs=1e-12)
    assert PackedDataset(make_cache([50]), 4).padding == 0


def test_a_row_by_hand(make_cache):
    # Documents 10 11 12 EOS | 14 EOS | 16 17 EOS; rows of 4 places: 3 + 1 and 2.
    data = BestFitDataset(make_cache([4, 2, 3]), 4, pad_id=5)
    assert [data[i]["tokens"].tolist() for i in range(2)] == [[10, 11, 12, 14], [16, 17, 5, 5]]
    assert [data[i]["targets"].tolist() for i in range(2)] == [[11, 12, 1, 1], [17, 1, -100, -100]]
    assert [data[i]["segments"].tolist() for i in range(2)] == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert [data[i]["positions"].tolist() for i in range(2)] == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert data.padding == 0.25
    assert sorted(data.order(np.arange(2), 3)) == [0, 1]
    with pytest.raises(IndexError, match="example 2 of 2"):
        data[2]


def test_user_errors(make_cache):
    with pytest.raises(UserError, match=r"None of the corpus's 2 documents fits .* \(2 are longer\): raise --config.s"):
        BestFitDataset(make_cache([9, 8]), 4, long_documents="drop")
    with pytest.raises(UserError, match="long_documents is 'skip': write one of cut, drop"):
        BestFitDataset(make_cache([9, 8]), 4, long_documents="skip")
    with pytest.raises(UserError, match="seq_len is 0"):
        BestFitDataset(make_cache([9, 8]), 0)
