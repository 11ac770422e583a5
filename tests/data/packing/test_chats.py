"""Best-fit packing of chats: each conversation that fits is there once, in its own segment, with its trained bits."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data.length_mix import DocumentSubset
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import PackedDataset, eval_windows
from qwen3f.errors import UserError

# Prompts and answers alternate; a chat ends with an answer.
_CHAT = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(
    lambda turns: [bit for prompt, answer in turns for bit in [False] * prompt + [True] * answer]
)
_CHATS = st.lists(_CHAT, min_size=1, max_size=40)


def _answers_end(chat, most):
    """Tokens up to the end of the last answer that fits whole into `most`; 0 if none does."""
    ends = [n for n in range(1, len(chat) + 1) if chat[n - 1] and (n == len(chat) or not chat[n])]
    return max((n for n in ends if n <= most), default=0)


@settings(max_examples=200, deadline=None)
@given(_CHATS, st.integers(1, 33), st.sampled_from(["drop", "cut_end"]))
@example([[False, True], [False] * 3 + [True] * 3], 5, "drop")
@example([[False, True, False, True, True]], 2, "cut_end")
def test_every_conversation_once_with_its_bits(make_chat_cache, chats, seq_len, policy):
    cache = make_chat_cache(chats)
    kept = {}
    for number, chat in enumerate(chats):
        length = len(chat) if len(chat) <= seq_len + 1 else _answers_end(chat, seq_len + 1) * (policy == "cut_end")
        if length > 1:
            kept[number] = length
    if not kept:
        with pytest.raises(UserError, match=r"None of the corpus's .* documents fits .*: raise --config.seq_len\.$"):
            BestFitDataset(cache, seq_len, long_documents=policy)
        return
    data = BestFitDataset(cache, seq_len, long_documents=policy, pad_id=3)
    assert data.shortened == sum(length < len(chats[n]) for n, length in kept.items())
    assert data.rows.dropped == len(chats) - len(kept)
    found = []
    for row in map(data.__getitem__, range(len(data))):
        assert {key: value.dtype for key, value in row.items()} == {
            "tokens": np.int64,
            "targets": np.int64,
            "loss_weights": np.float32,
            "positions": np.int64,
            "segments": np.int32,
            "index": np.int64,
        }
        assert ((row["targets"] != -100) == (row["loss_weights"] == 1)).all()
        assert set(row["loss_weights"].tolist()) <= {0, 1}
        assert (row["tokens"][row["segments"] == 0] == 3).all()
        for segment in range(1, row["segments"].max() + 1):
            places = np.flatnonzero(row["segments"] == segment)
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert row["positions"][places].tolist() == list(range(len(places)))
            first = int(row["tokens"][places[0]]) - 10  # a token is 10 + its place in the stream
            number = int(np.searchsorted(cache.doc_offsets, first, side="right")) - 1
            assert first == cache.doc_offsets[number]
            length = kept[number]
            assert row["tokens"][places].tolist() == [10 + first + n for n in range(length - 1)]
            wanted = [10 + first + n if chats[number][n] else -100 for n in range(1, length)]
            assert row["targets"][places].tolist() == wanted
            assert wanted[-1] != -100  # no answer is cut: the last target is the last token of one
            found.append(number)
    assert sorted(found) == sorted(kept)


def test_some_documents_of_a_cache_keep_their_bits(make_chat_cache):
    chats = [[False, True], [False, False, True], [False, True, True, True]]
    cache = make_chat_cache(chats)
    subset = DocumentSubset(cache, np.array([0, 2]), np.array([0, 2, 6]))
    assert subset.has_trained
    assert subset.read_trained(1, 5).tolist() == [True, False, True, True]
    data = BestFitDataset(subset, 4, long_documents="drop")
    assert [data[0]["loss_weights"].tolist(), data.rows.document.tolist()] == [[1, 1, 1, 1], [1, 0]]


def test_chats_are_never_cut_or_joined(make_chat_cache):
    cache = make_chat_cache([[False, True]])
    with pytest.raises(ValueError, match="long_documents='cut' for chats: give 'drop' or 'cut_end'"):
        BestFitDataset(cache, 4)
    for build in (lambda: PackedDataset(cache, 1), lambda: next(eval_windows(cache, 1))):
        with pytest.raises(ValueError, match="chats are packed by BestFitDataset"):
            build()


def test_texts_have_no_last_answer(make_cache):
    with pytest.raises(UserError, match="data.long_documents is 'cut_end': write one of cut, drop"):
        BestFitDataset(make_cache([9, 8]), 4, long_documents="cut_end")
