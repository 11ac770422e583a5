"""The cut of a sequence over cp. Which keys of other ranks a rank sees, against the mask of the whole sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.key_ranges import dense_mask
from sharding.axes import Axis
from sharding.sequence_split import check_length, merge_sequence, ring_ranges, split_sequence
from tests.batches import random_batch


def axes(size):
    return [Axis("cp", size, rank, "any") for rank in range(size)]


def allowed(segments_L):
    """bool [L, L]: same document, not after the query."""
    return (segments_L[:, None] == segments_L[None]) & torch.ones(2 * [len(segments_L)], dtype=torch.bool).tril()


def test_places_of_each_rank():
    batch = {"tokens": torch.arange(12)[None], "index": torch.tensor([7])}
    parts = [split_sequence(batch, axis) for axis in axes(3)]
    assert [part["tokens"].tolist() for part in parts] == [[[0, 1, 10, 11]], [[2, 3, 8, 9]], [[4, 5, 6, 7]]]
    assert all(torch.equal(part["positions"], part["tokens"]) and not part["starts"].any() for part in parts)
    assert all(part["index"].tolist() == [7] for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_split_then_merge(size):
    batch = random_batch(2, 24, 50)
    batch["positions"] = batch["positions"].expand(3, 2, 24)  # a vision model's three axes
    parts = [split_sequence(batch, axis) for axis in axes(size)]
    for key, whole in batch.items():
        assert torch.equal(merge_sequence(torch.cat([part[key] for part in parts], -1), size), whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.data())
def test_ranges_are_the_mask_of_the_whole_sequence(size, chunk, data):
    length = 2 * size * chunk
    new = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    segments = torch.tensor([new], dtype=torch.int32).cumsum(1, dtype=torch.int32)  # begins with padding, or not
    places = torch.arange(length)[None]
    batch = {"tokens": places, "segments": segments}
    parts = [split_sequence(batch, axis) for axis in axes(size)]
    mask = allowed(segments[0])
    for axis, part in zip(axes(size), parts):
        queries = part["tokens"][0]
        ranges = ring_ranges(part["starts"], axis)
        for step in range(size):
            keys = parts[(axis.index - step) % size]["tokens"][0]
            seen, at = mask[queries][:, keys], ranges.at(step)
            assert torch.equal(dense_mask(at)[0, 0], seen)
            assert all((bound.diff() >= 0).all() for bound in (at.lo, at.hi))
            query = torch.arange(len(queries))[:, None]
            assert torch.equal((query >= at.first) & (query < at.last), seen)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_rank_has_equal_work(size):
    starts = torch.zeros(1, 6, dtype=torch.int32)
    work = [[dense_mask(ring_ranges(starts, axis).at(step)).sum() for step in range(size)] for axis in axes(size)]
    assert len({sum(steps).item() for steps in work}) == 1
    assert {sum(steps).item() for steps in work} == {6 * size * (6 * size + 1) // 2 / size}
    assert len({n.item() for steps in work for n in steps[1:]}) == 1  # equal also within a step, so no rank waits


@pytest.mark.parametrize(
    "length, size, write",
    [
        (4, 4, "config.seq_len=8"),
        (1, 2, "seq_len=4"),
        (30, 4, "seq_len=24"),  # not above: the model may have no more positions
        (34, 4, "seq_len=32"),
        (9, 3, "seq_len=6"),
    ],
)
def test_lengths_that_do_not_divide(length, size, write):
    with pytest.raises(
        ValueError, match=rf"config.seq_len={length} cannot be cut over cp={size}.*{write} .any multiple of {2 * size}"
    ):
        check_length(length, size)
    with pytest.raises(ValueError, match="cannot be cut"):
        split_sequence({"tokens": torch.zeros(1, length, dtype=torch.int64)}, axes(size)[0])


def test_lengths_that_divide():
    check_length(16, 4)
    check_length(5, 1)


def test_a_key_that_nobody_knows():
    batch = {"tokens": torch.zeros(1, 8), "rewards": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match="unknown keys: rewards;.*SEQUENCE_KEYS.*WHOLE_KEYS"):
        split_sequence(batch, axes(2)[0])
