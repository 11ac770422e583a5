"""Masks as runs of keys, against masks made pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import key_ranges


def duals_hold(ranges):
    """first and last say exactly what lo and hi say."""
    query = torch.arange(ranges.lo.shape[1])
    from_keys = (query >= ranges.first[..., None]) & (query < ranges.last[..., None])
    return torch.equal(from_keys.transpose(1, 2), key_ranges.dense_mask(ranges)[:, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3), st.booleans())
def test_segments(rows, causal):
    ranges = key_ranges.ranges_from_segments(torch.tensor(rows, dtype=torch.int32), causal)
    for row, mask in zip(rows, key_ranges.dense_mask(ranges)[:, 0]):
        for q in range(7):
            for k in range(7):
                together = all(row[i] == row[q] for i in range(min(q, k), max(q, k) + 1))
                assert mask[q, k] == (together and (k <= q or not causal))
    assert duals_hold(ranges)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 3), st.booleans())
def test_cu_seqlens(sizes, beyond, causal):
    """Empty documents, and tokens beyond the last one, which see nothing."""
    cu = torch.tensor([0, *sizes]).cumsum(0)
    document = [i for i, size in enumerate(sizes) for _ in range(size)] + [None] * beyond
    if not document:
        return
    ranges = key_ranges.ranges_from_cu_seqlens(cu, len(document), causal)
    mask = key_ranges.dense_mask(ranges)[0, 0]
    for q, a in enumerate(document):
        for k, b in enumerate(document):
            assert mask[q, k] == (a is not None and a == b and (k <= q or not causal))
    assert duals_hold(ranges)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=5, max_size=5), st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_any_bounds_that_move_forward(lo, hi):
    ranges = key_ranges.key_ranges(torch.tensor([sorted(lo)]), torch.tensor([sorted(hi)]), 6)
    assert duals_hold(ranges)


def test_cu_seqlens_of_the_wrong_shape():
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        key_ranges.ranges_from_cu_seqlens(torch.zeros(1, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        key_ranges.ranges_from_cu_seqlens(torch.zeros(0, dtype=torch.int32), 4)
