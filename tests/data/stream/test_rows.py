"""Best-fit rows of a stream: whole documents, every token once in groups of any size, and resuming after a row."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.stream import rows as module
from qwen3f.data.stream.rows import best_fit_rows
from qwen3f.errors import UserError


def _documents(lengths):
    first = 10
    for n, length in enumerate(lengths):
        yield np.array([*range(first, first + length - 1), 1], np.uint32), n
        first += length


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seq_len=st.integers(1, 12),
    policy=st.sampled_from(["cut", "drop"]),
    group_rows=st.integers(1, 4),
)
def test_every_token_once_and_going_on(lengths, seq_len, policy, group_rows):
    documents = list(_documents(lengths))
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", group_rows)
        made = list(best_fit_rows(documents, seq_len, long_documents=policy, counts=counts))
        for place in {0, len(made) // 2, len(made) - 1} if made else ():
            mark, skip = made[place][1]
            rest = list(best_fit_rows(documents[mark:], seq_len, long_documents=policy, skip=skip))
            assert [state for _, state in rest] == [state for _, state in made[place + 1 :]]
            for (ours, _), (theirs, _) in zip(rest, made[place + 1 :]):
                assert all(np.array_equal(a, b) for a, b in zip(ours(3).values(), theirs(3).values()))
    too_long = [n for n in lengths if n > seq_len + 1]
    assert counts == ({"too_long": len(too_long)} if policy == "drop" and too_long else {})
    kept = [document for document, _ in documents if policy == "cut" or len(document) <= seq_len + 1]
    examples = [make(0) for make, _ in made]
    targets = [t for example in examples for t in example["targets"].tolist() if t != -100]
    assert sorted(targets) == sorted(t for document in kept for t in document[1:].tolist())


def test_unknown_policy():
    with pytest.raises(UserError, match="long_documents is 'x'"):
        next(best_fit_rows([], 4, long_documents="x"))
