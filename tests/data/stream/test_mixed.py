"""A mixture that is read once has shares exact to one item, loses nothing and keeps the order of each part."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.stream.order import mixed


@dataclass(frozen=True)
class Listed:
    """A part that is a list of items."""

    given: list
    name: str = "listed"

    def items(self, place, counts):
        return ((item, (0, n)) for n, item in enumerate(self.given, start=1))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_shares_order_and_completeness(spec, sizes):
    lengths, weights = zip(*spec)
    streams = [[(i, n, sizes[(i + n) % len(sizes)]) for n in range(length)] for i, length in enumerate(lengths)]
    order = list(mixed(list(map(Listed, streams)), weights, lambda item: item[2], Counter()))
    assert all(i == item[0] for i, item in order)
    for i, stream in enumerate(streams):
        assert [item for n, item in order if n == i] == stream
    given_sizes, left = [0.0] * len(spec), list(lengths)
    for i, item in order:
        if all(left):  # while all streams last, none is ahead of another by more than its largest item
            behind = min(g / w for g, w in zip(given_sizes, weights))
            assert (given_sizes[i] - 1e-9) / weights[i] <= behind + 1e-9
        given_sizes[i] += item[2]
        left[i] -= 1


def test_long_run_shares():
    parts = [Listed([1] * 10_000), Listed([1] * 10_000)]
    order = mixed(parts, [0.7, 0.3], lambda item: item, Counter())
    assert sum(next(order)[0] for _ in range(10_000)) == 3000
