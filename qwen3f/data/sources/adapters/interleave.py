"""One stream from several, in fixed shares."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleave(
    streams: Sequence[Iterator[T]], weights: Sequence[float], size: Callable[[T], float]
) -> Iterator[tuple[int, T]]:
    """(number of the stream, item) of every item once; which stream comes next follows from the sizes alone.

    The next item is of the stream that has given the least for its weight, of equals the first. So while all streams
    last, the given sizes stand in the ratio of the weights up to one item a stream; then the others go on to their
    ends. Each stream keeps its order.

    Args:
        streams: read as items are asked for.
        weights: positive, one a stream.
        size: of an item, at least 0, e.g. the length of its text.
    """
    given = [0.0] * len(streams)
    alive = list(range(len(streams)))
    while alive:
        i = min(alive, key=lambda n: given[n] / weights[n])
        try:
            item = next(streams[i])
        except StopIteration:
            alive.remove(i)
            continue
        given[i] += size(item)
        yield i, item
