"""Random choices for generated data: draw i is a hash of a key and i, equal on every machine and Python version."""

from collections.abc import Sequence
from typing import TypeVar

from qwen3f.data.sources.documents import stable_hash

T = TypeVar("T")


class Draws:
    """The random choices of one generated item, in order.

    The state is the number of draws so far, owned by the call that makes the item, so the item stays a pure function of
    the key. (`random.Random` promises the same numbers on other Python versions only for `random()`.)
    """

    def __init__(self, *key: int | str) -> None:
        self._key = repr(key).encode()
        self._count = 0

    def below(self, n: int) -> int:
        """An integer in [0, n), n ≥ 1; uniform up to a bias of n·2⁻⁶⁴."""
        self._count += 1
        return stable_hash(b"%s#%d" % (self._key, self._count)) % n

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def nonzero(self, low: int, high: int) -> int:
        """An integer in [low, high] other than 0, for low < 0 < high."""
        value = low + self.below(high - low)
        return value if value < 0 else value + 1

    def chance(self, numerator: int, denominator: int) -> bool:
        """True with probability numerator / denominator."""
        return self.below(denominator) < numerator

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, which is not empty."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different places of `items` in random order (Fisher–Yates)."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of `items` in random order."""
        return self.sample(items, len(items))
