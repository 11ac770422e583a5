"""The stream's windows equal those of `PackedDataset` over the same documents, and none of their tokens is lost."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.packing.concat import PackedDataset
from qwen3f.data.stream.windows import windows
from qwen3f.errors import UserError


def pack_stream(documents, seq_len, **options):
    unmarked = ((np.asarray(document, np.int64), None) for document in documents)
    for index, (make, _) in enumerate(windows(unmarked, seq_len, **options)):
        yield make(index)


def _documents(cache):
    return [cache.read(a, b).tolist() for a, b in pairwise(cache.doc_offsets)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 17),
    reset=st.booleans(),
    cross=st.booleans(),
)
def test_equals_packed_dataset(make_cache, lengths, seq_len, reset, cross):
    cache = make_cache(lengths)
    found = list(pack_stream(_documents(cache), seq_len, reset_positions=reset, cross_documents=cross, pad_id=7))
    full = (cache.num_tokens - 1) // seq_len
    if full:
        packed = PackedDataset(cache, seq_len, reset, cross)
        for i in range(full):
            for key, array in packed[i].items():
                np.testing.assert_array_equal(found[i][key], array)
                assert found[i][key].dtype == array.dtype
    rest = cache.num_tokens - 1 - full * seq_len  # pairs of input and target in the last window
    assert len(found) == full + (rest > 0)
    if rest:
        last = found[-1]
        assert last["tokens"].tolist() == [
            *cache.read(full * seq_len, cache.num_tokens - 1).tolist(),
            *[7] * (seq_len - rest),
        ]
        assert (last["segments"] > 0).sum() == rest
        assert last["targets"][rest:].tolist() == [-100] * (seq_len - rest)
        assert last["loss_weights"][rest:].sum() == last["positions"][rest:].sum() == 0
        # PackedDataset has no such window, so its weights are computed from the lengths of the documents.
        if not cross:
            wanted = [n for length in lengths for n in [*[1] * (length - 1), 0]][full * seq_len : -1]
            assert last["loss_weights"][:rest].tolist() == wanted


def test_one_token_gives_nothing_and_length_is_checked():
    assert list(pack_stream([[5]], 4)) == list(pack_stream([], 4)) == []
    with pytest.raises(UserError, match="seq_len is 0"):
        list(pack_stream([[5, 6]], 0))


def test_streams():
    """The first window comes before the third document is asked for."""
    asked = []

    def documents():
        for n in range(10):
            asked.append(n)
            yield [n] * 6

    next(pack_stream(documents(), 8))
    assert asked == [0, 1]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), seq_len=st.integers(1, 17))
def test_goes_on_from_every_window(make_cache, lengths, seq_len):
    documents = [(np.array(tokens), n) for n, tokens in enumerate(_documents(make_cache(lengths)))]
    whole = list(windows(documents, seq_len))
    for place in {0, len(whole) // 2, len(whole) - 1} if whole else ():
        mark, skip = whole[place][1]
        rest = list(windows(documents[mark:], seq_len, skip=skip))
        assert [state for _, state in rest] == [state for _, state in whole[place + 1 :]]
        for (ours, _), (theirs, _) in zip(rest, whole[place + 1 :]):
            assert all(np.array_equal(a, b) for a, b in zip(ours(3).values(), theirs(3).values()))
