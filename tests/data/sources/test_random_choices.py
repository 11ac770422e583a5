"""Draws are uniform, in range, and functions of their key alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.sources.random_choices import Draws


@given(st.lists(st.integers() | st.text(), max_size=4), st.integers(1, 2**40), st.integers(-100, 100))
def test_ranges_and_purity(key, n, low):
    a, b = Draws(*key), Draws(*key)
    drawn = [a.below(n), a.between(low, low + n), a.nonzero(-n, n)]
    assert 0 <= drawn[0] < n
    assert low <= drawn[1] <= low + n
    assert drawn[2] != 0
    assert -n <= drawn[2] <= n
    assert drawn == [b.below(n), b.between(low, low + n), b.nonzero(-n, n)]


@given(st.integers(), st.lists(st.integers(), max_size=12), st.data())
def test_samples_keep_every_place_once(key, items, data):
    count = data.draw(st.integers(0, len(items)))
    assert Counter(Draws(key).shuffled(items)) == Counter(items)
    places = Draws(key).sample(range(len(items)), count)
    assert len(set(places)) == len(places) == count


def test_uniform():
    # 6,000 draws over 6 values: 1,000 expected each, standard deviation 28.9; 5 of these are allowed.
    draws = Draws("uniform")
    kinds = {
        "below": Counter(draws.below(6) for _ in range(6000)),
        "nonzero": Counter(draws.nonzero(-3, 3) for _ in range(6000)),
        "sample": Counter(tuple(draws.sample("abc", 2)) for _ in range(6000)),
        "shuffled": Counter(tuple(draws.shuffled("abc")) for _ in range(6000)),
    }
    for name, counted in kinds.items():
        assert len(counted) == 6, name
        assert min(counted.values()) > 855, name
        assert max(counted.values()) < 1145, name
    hits = sum(draws.chance(1, 3) for _ in range(6000))
    assert 1800 < hits < 2200  # 2,000 ± 5 · 36.5


def test_keys_and_places_are_told_apart():
    firsts = [Draws(*key).below(2**62) for key in ((), (1,), ("1",), (1, 2), (12,), ("1, 2",), (2, 1))]
    assert len(set(firsts)) == len(firsts)
    draws = Draws(1)
    assert draws.below(2**62) != draws.below(2**62)
