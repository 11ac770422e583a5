"""Completions packed in rows: whole, without padding between, numbers at the position that predicts the token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.rl.packing import Document, own_rows, pack, pack_updates

PAD = 99
documents = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()).map(
        lambda x: Document(list(range(10, 10 + x[0])), list(range(50, 50 + x[1])), [-0.5] * x[1], x[0] - 2.5, x[2])
    ),
    max_size=12,
)


def read(rows):
    """(prompt + ids, loss weights, advantages, sampler's log-probabilities) of each document in rows."""
    out = []
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segments"][row].max() + 1):
            at = np.flatnonzero(rows["segments"][row] == segment)
            assert (np.diff(at) == 1).all()
            assert rows["positions"][row, at].tolist() == list(range(len(at)))
            ids = [*rows["tokens"][row, at].tolist(), int(rows["targets"][row, at[-1]])]
            assert rows["targets"][row, at].tolist() == ids[1:]
            out.append(
                (ids, *(rows[key][row, at].tolist() for key in ("loss_weights", "advantages", "sampler_logprobs")))
            )
    return out


@given(documents, st.integers(1, 3))
def test_every_document_is_there_once_and_whole(docs, multiple):
    rows, _ = pack(docs, 12, multiple, PAD)
    assert len(rows["tokens"]) % multiple == 0
    padding = rows["segments"] == 0
    assert (rows["tokens"][padding] == PAD).all()
    assert (rows["targets"][padding] == -100).all()
    assert not rows["loss_weights"][padding].any()
    expected = []
    for d in docs:
        before, after = [0.0] * (len(d.prompt) - 1), len(d.ids)
        marks = ([float(d.counts)] * after, [d.advantage] * after, [-0.5] * after)
        expected.append(([*d.prompt, *d.ids], *(before + mark for mark in marks)))
    assert sorted(map(str, read(rows))) == sorted(map(str, expected))


@given(documents, st.integers(1, 4), st.integers(1, 3))
def test_updates_have_equal_rows_and_ranks_share_them(docs, updates, ranks):
    groups = [docs[i : i + 2] for i in range(0, len(docs), 2)]
    packed = pack_updates(groups, updates, 12, ranks, PAD)
    assert len({len(part["tokens"]) for part in packed}) == 1
    flat = [item for part in packed for item in read(part)]
    assert len(flat) == len(docs)
    shares = [own_rows(packed, rank, ranks) for rank in range(ranks)]
    assert sorted(map(str, flat)) == sorted(str(item) for share in shares for item in read(share))
    size = len(shares[0]["tokens"]) // updates
    for number, part in enumerate(packed):  # part `number` of each rank belongs to update `number`
        own = [{k: v[number * size : (number + 1) * size] for k, v in share.items()} for share in shares]
        assert sorted(map(str, read(part))) == sorted(str(item) for share in own for item in read(share))


def test_an_update_that_lacks_many_rows_is_filled_up_at_once(monkeypatch):
    one, joined, real = Document([1] * 5, [2] * 7, [0.0] * 7, 0.0), [], np.concatenate

    def concatenate(parts):
        joined.extend([len(parts)] if np.ndim(parts[0]) == 2 else [])  # only joins of rows
        return real(parts)

    monkeypatch.setattr("numpy.concatenate", concatenate)
    long, short = pack_updates([[one] * 40, [one]], 2, 12, 1, PAD)
    assert len(long["tokens"]) == len(short["tokens"]) == 40
    assert not short["segments"][1:].any()
    assert joined == [40] * len(short)


def test_the_first_and_the_last_sampled_token_are_trained():
    """verl PR 3287, OpenRLHF 973: off by one, so that the first token or eos was not trained. MemGen PR 33: tokens
    after eos were trained."""
    rows, _ = pack([Document([1, 2, 3], [7, 8, 9], [-1, -2, -3], 0.5)], 8, 1, PAD)
    assert rows["tokens"][0].tolist() == [1, 2, 3, 7, 8, PAD, PAD, PAD]
    trained = rows["targets"][0][rows["loss_weights"][0] > 0]
    assert trained.tolist() == [7, 8, 9]
    assert rows["sampler_logprobs"][0].tolist() == [0, 0, -1, -2, -3, 0, 0, 0]


def test_a_document_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="1 documents do not fit"):
        pack([Document([1] * 5, [2] * 9, [0.0] * 9, 0.0)], 12, 1, PAD)
