"""The stateless shuffle gives one permutation for each epoch, a different one for each epoch and seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.sampler import example_index


@given(st.integers(1, 700), st.integers(0, 5), st.integers(-(2**70), 2**70))
def test_each_epoch_visits_every_example_once(size, epoch, seed):
    order = example_index(epoch * size + np.arange(size), size, seed)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1024, 1025])
def test_bijection_at_the_edges(size):
    assert sorted(example_index(np.arange(size), size, 0).tolist()) == list(range(size))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 2**33), st.integers(0, 9))
def test_vectorised_equals_scalar(positions, size, seed):
    together = example_index(np.array(positions), size, seed)
    alone = [example_index(p, size, seed) for p in positions]
    assert together.tolist() == alone
    assert all(type(i) is int and 0 <= i < size for i in alone)


def test_keeps_shape_and_spans_epochs():
    positions = np.arange(24).reshape(2, 3, 4)
    order = example_index(positions, 10, 3)
    assert order.shape == (2, 3, 4)
    assert sorted(order.reshape(-1)[10:20].tolist()) == list(range(10))
    assert example_index(np.array([], np.int64), 10, 3).shape == (0,)


def test_epochs_and_seeds_differ():
    orders = [
        tuple(example_index(epoch * 50 + np.arange(50), 50, seed).tolist()) for epoch in range(5) for seed in range(5)
    ]
    assert len(set(orders)) == 25


def test_orders_are_roughly_uniform():
    # All 24 orders of 4 examples: 4,800 epochs, 200 expected each, standard deviation 13.8; 5 of these are allowed.
    orders = Counter(tuple(row) for row in example_index(np.arange(4 * 4800), 4, 7).reshape(-1, 4).tolist())
    assert len(orders) == 24
    assert min(orders.values()) > 130
    assert max(orders.values()) < 270
    # Where each of 10 examples lands: 2,000 epochs, 200 expected a cell, standard deviation 13.4.
    rows = example_index(np.arange(10 * 2000), 10, 11).reshape(-1, 10)
    cells = np.array([np.bincount(rows[:, place], minlength=10) for place in range(10)])
    assert cells.min() > 130
    assert cells.max() < 270


def test_large_order_is_not_local():
    order = example_index(np.arange(1000), 10**9, 0)
    assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.12  # 0 ± 0.032 if independent
    assert 0.45e9 < order.mean() < 0.55e9


def test_golden_values_keep_old_runs_resumable():
    assert example_index(np.arange(10), 10, 0).tolist() == [7, 8, 4, 6, 1, 9, 5, 3, 2, 0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="size is 0: there must be at least one example"):
        example_index(0, 0, 0)
    with pytest.raises(ValueError, match="position -1 is negative"):
        example_index(np.array([3, -1]), 5, 0)
