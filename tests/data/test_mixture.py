"""Mixtures have exact shares, give each example of a part once an epoch, and are the same wherever reading starts."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data import mixture as module
from qwen3f.data.mixture import CYCLE, make_mixture, parse_caps, parse_weights, temper
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
    """70% of 30,000 places over 700 examples are exactly 30 epochs, and 30% over 1,000 examples exactly 9."""
    mixed = mixture((700, 1000), (0.7, 0.3))
    order = mixed.order(np.arange(3 * CYCLE), 1)
    counts = np.bincount(order, minlength=1700)
    assert set(counts[:700]) == {30}
    assert set(counts[700:]) == {9}


def test_parts_are_interleaved_and_seeds_differ():
    mixed = mixture((5000, 5000), (1, 1))
    order = mixed.order(np.arange(2000), 1)
    runs = np.diff(np.flatnonzero(np.diff(order >= 5000)))
    assert runs.max() < 25  # a fair coin has no such run in 2,000 throws
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

    with pytest.raises(UserError, match=r"has the weight 1e\+308 of inf"):
        mixture((3, 3), (1e308, 1e308))


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
        *(
            (f"embedded={weight}", rf"^--config\.data\.mixture: .* has the weight '{weight}': write")
            for weight in ("much", "0", "-1", "nan", "inf", "")
        ),
        ("", "must name one or more"),
        ("embedded,", "must name one or more"),
        ("embedded=1,embedded=2", "different ones"),
    ):
        with pytest.raises(UserError, match=words):
            parse_weights(wrong)


# -- caps of epochs and temperature ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9), st.floats(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_caps_are_reached_exactly_and_the_others_renormalised(parts, seed):
    lengths, weights, epochs = zip(*parts)
    made = [Part(name=n, length=length) for n, length in enumerate(lengths)]
    mixed = make_mixture(made, weights, max_epochs=epochs)
    caps = [int(e * n) for e, n in zip(epochs, lengths)]
    total = mixed.total(seed)
    assert total == sum(caps)
    order = mixed.order(np.arange(total), seed)
    part = np.searchsorted(np.cumsum(lengths), order, side="right")
    assert np.bincount(part, minlength=len(parts)).tolist() == caps
    offset = 0
    for n, (length, cap) in enumerate(zip(lengths, caps)):  # whole epochs, then a part of one without repetitions
        counts = np.bincount(order[part == n] - offset, minlength=length)
        assert set(counts) <= {cap // length, -(-cap // length)}
        offset += length
    with pytest.raises(UserError, match=f"max_epochs leaves {total} examples and example {total} is asked for"):
        mixed.order(np.array([0, total]), seed)
    for start in (0, total // 2, max(total - 7, 0)):  # a place's example does not depend on what is asked with it
        assert (mixed.order(np.arange(start, min(start + 7, total)), seed) == order[start : start + 7]).all()


def test_a_capped_source_is_dropped_and_the_rest_go_on_for_ever():
    """700 examples, twice, at 70% last for 2,000 places. Then the others share 2 to 1, exactly in each cycle."""
    made = [Part(name=n, length=length) for n, length in enumerate((700, 500, 300))]
    mixed = make_mixture(made, (0.7, 0.2, 0.1), max_epochs=(2, None, None))
    assert mixed.total(5) is None
    order = mixed.order(np.arange(40_000), 5)
    last = np.flatnonzero(order < 700)[-1]
    assert (order < 700).sum() == 1400
    assert 1800 < last < 2200
    start = mixed_start(mixed, 5)
    assert last < start <= last + 40  # the source is dropped at its next place
    for cycle in range(3):
        after = order[start + cycle * CYCLE : start + (cycle + 1) * CYCLE]
        assert (after >= 1200).sum() == 3333
        assert (after >= 700).all()
    assert (mixed.order(np.arange(1900, 2300), 5) == order[1900:2300]).all()


@settings(max_examples=50, deadline=None)
@given(
    small=st.lists(st.floats(1e-5, 1e-3), min_size=1, max_size=4),
    large=st.lists(st.floats(0.1, 1), min_size=1, max_size=3),
    data=st.data(),
)
@example(small=[0.4], large=[3000.3, 6999.3], data=None)  # 0.4 of a place, rounded up at first and down later
def test_whoever_is_dropped_every_other_source_keeps_a_place(small, large, data):
    weights = [*small, *large]
    made = [Part(name=n, length=3) for n in range(len(weights))]
    caps = [1] * len(weights) if data is None else [data.draw(st.sampled_from([None, 1, 2])) for _ in weights]
    if min(weights) / sum(weights) < 1 / CYCLE:
        with pytest.raises(UserError, match=f"has the weight {min(weights)} of .*at least 1/10000"):
            make_mixture(made, weights, max_epochs=caps)
        return
    mixed = make_mixture(made, weights, max_epochs=caps)
    phases, _ = module._phases(mixed.weights, mixed.caps, 0)
    alive = [sum(slots > 0 for slots in phase.slots) for phase in phases]
    assert alive == [len(weights) - n for n in range(len(phases))]


def mixed_start(mixed, seed):
    """Where the second phase begins."""
    phases, _ = module._phases(mixed.weights, mixed.caps, seed)
    return phases[1].start


def test_caps_written_by_the_user():
    sources = ["embedded", "fineweb@/a/b", "reasoning"]
    assert parse_caps("", sources) == dict.fromkeys(sources)
    assert parse_caps("4", sources) == dict.fromkeys(sources, 4.0)
    assert parse_caps("fineweb=2,reasoning=0.5", sources) == {
        "embedded": None,
        "fineweb@/a/b": 2.0,
        "reasoning": 0.5,
    }
    with pytest.raises(UserError, match="names 'fine', which is not in the mixture: write embedded, fineweb@/a/b, rea"):
        parse_caps("fine=2", sources)
    with pytest.raises(UserError, match=r"^--config\.data\.max_epochs=0: write a positive number"):
        parse_caps("0", sources)
    with pytest.raises(UserError, match=r"^--config\.data\.max_epochs: 'reasoning=x' has the number 'x': write a pos"):
        parse_caps("reasoning=x", sources)
    with pytest.raises(UserError, match="max_epochs=0.01 leaves none of 3 examples"):
        make_mixture([Part(name=0, length=3)], [1.0], max_epochs=[0.01])


@pytest.mark.parametrize("epochs", [1e15, 1e18, 1e308])
def test_a_cap_that_no_run_reaches_changes_nothing(epochs):
    parts = [Part(name=0, length=3), Part(name=1, length=5)]
    free, capped = (make_mixture(parts, [1.0, 2.0], max_epochs=caps) for caps in (None, [epochs, epochs]))
    places = np.arange(CYCLE)
    assert (capped.order(places, 1) == free.order(places, 1)).all()
    assert capped.total(1) > 2**40


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0, 1e9])
def test_temperature(temperature):
    weights, sizes = {"a": 1.0, "b": 1.0, "c": 2.0}, {"a": 100, "b": 10_000, "c": 100}
    found = temper(weights, sizes, temperature)
    raw = [w * (s ** (1 / temperature) if temperature else 1) for w, s in zip(weights.values(), sizes.values())]
    assert list(found.values()) == pytest.approx([r / sum(raw) for r in raw], rel=1e-12)
    if temperature == 2:  # by hand: 10 : 100 : 20
        assert found["b"] == pytest.approx(100 / 130, rel=1e-12)
    with pytest.raises(UserError, match="temperature is -1"):
        temper(weights, sizes, -1)


def test_an_order_imports_nothing(monkeypatch):
    """A loader's thread computes the order, and another thread may import JAX at the same time.

    JAX adds types to numpy. np.unique imports numpy.ma, which goes through these types and may then fail.
    """
    mixed = mixture([3, 5], [1, 2])
    expected = mixed.order(np.arange(20), 0).tolist()
    monkeypatch.delattr(np, "ma", raising=False)
    monkeypatch.setitem(sys.modules, "numpy.ma", None)
    assert mixed.order(np.arange(20), 0).tolist() == expected
