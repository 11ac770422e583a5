"""Mixtures: exact shares, every example of a part once an epoch, the same wherever one starts."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.mixture import CYCLE, make_mixture
from qwen3f.data.mixture_text import parse_weights
from qwen3f.errors import UserError


class Part(SimpleNamespace):
    """Stands for a PackedDataset: a length, and items that say where they come from."""

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        assert 0 <= i < self.length
        return (self.name, i)


def mixture(lengths, weights):
    return make_mixture([Part(name=n, length=length) for n, length in enumerate(lengths)], weights)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 50)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 10**7),
)
def test_shares_are_exact_in_every_cycle_and_do_not_depend_on_where_one_starts(parts, seed, start):
    lengths, weights = zip(*parts)
    mixed = mixture(lengths, weights)
    first = start // CYCLE * CYCLE
    order = mixed.order(np.arange(first, first + CYCLE), seed)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    counts = np.histogram(order, bounds)[0]
    exact = np.array(weights) / sum(weights) * CYCLE
    assert counts.sum() == CYCLE
    assert (np.abs(counts - exact) < 1).all()
    places = np.arange(start, start + 50)
    assert (mixed.order(places, seed) == [mixed.order(np.array([p]), seed)[0] for p in places]).all()
    if start + 50 <= first + CYCLE:
        assert (mixed.order(places, seed) == order[start - first : start - first + 50]).all()


def test_each_part_runs_through_its_epochs():
    """70% of 30,000 places over 700 examples are 30 epochs, 30% over 1,000 are 9: nothing more or less often."""
    mixed = mixture((700, 1000), (0.7, 0.3))
    order = mixed.order(np.arange(3 * CYCLE), 1)
    counts = np.bincount(order, minlength=1700)
    assert set(counts[:700]) == {30}
    assert set(counts[700:]) == {9}


def test_parts_are_interleaved_and_seeds_differ():
    mixed = mixture((5000, 5000), (1, 1))
    order = mixed.order(np.arange(2000), 1)
    runs = np.diff(np.flatnonzero(np.diff(order >= 5000)))
    assert runs.max() < 25  # of a fair coin over 2,000 throws
    assert (order != mixed.order(np.arange(2000), 2)).mean() > 0.9
    assert (order % 5000)[:100].tolist() != sorted((order % 5000)[:100])


def test_items_come_from_their_parts():
    mixed = mixture((3, 2), (1, 1))
    assert len(mixed) == 5
    assert [mixed[i] for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for i in (-1, 5):
        with pytest.raises(IndexError):
            mixed[i]


def test_a_weight_too_small_for_a_cycle():
    with pytest.raises(UserError, match=r"has the weight 1e-05 of .*at least 1/10000"):
        mixture((3, 3), (1, 1e-5))


def test_parsing(tmp_path):
    assert parse_weights("embedded") == [("embedded", 1.0)]
    assert parse_weights("fineweb@/a/b=0.7, reasoning=.3") == [("fineweb@/a/b", 0.7), ("reasoning", 0.3)]
    (tmp_path / "date=2026").mkdir()
    assert parse_weights(f"files@{tmp_path}/date=2026") == [(f"files@{tmp_path}/date=2026", 1.0)]
    assert parse_weights(f"files@{tmp_path}/date=2026=2,embedded") == [
        (f"files@{tmp_path}/date=2026", 2.0),
        ("embedded", 1.0),
    ]
    for wrong, words in (
        *((f"embedded={weight}", f"has the weight '{weight}'") for weight in ("much", "0", "-1", "nan", "inf", "")),
        ("", "must name one or more"),
        ("embedded,", "must name one or more"),
        ("embedded=1,embedded=2", "different sources"),
    ):
        with pytest.raises(UserError, match=words):
            parse_weights(wrong)
