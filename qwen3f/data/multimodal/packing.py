"""Rows of chats with pictures: whole chats, within a number of places, of patches and of pictures."""

from collections.abc import Sequence
from typing import NamedTuple

OPEN_ROWS = 128  # that a chat may still go into; more would be slower and hardly fuller


class Needs(NamedTuple):
    """What a chat takes of a row, or a row has room for: places of tokens, patches, pictures."""

    places: int
    patches: int
    pictures: int

    def within(self, room: "Needs") -> bool:
        return all(need <= left for need, left in zip(self, room))


def pack(needs: Sequence[Needs], room: Needs) -> tuple[list[list[int]], list[int]]:
    """(rows of indices into needs, what fits into no row).

    The longest first, each into the open row where the fewest places are left behind it; a new row where it fits into
    none, for which the fullest is closed when OPEN_ROWS are open. The order is a function of the needs alone.
    """
    rows: list[list[int]] = []
    left: dict[int, Needs] = {}
    too_large = [index for index, need in enumerate(needs) if not need.within(room)]
    fitting = sorted(set(range(len(needs))) - set(too_large), key=lambda index: (-needs[index].places, index))
    for index in fitting:
        need = needs[index]
        open_rows = [row for row, free in left.items() if need.within(free)]
        if open_rows:
            row = min(open_rows, key=lambda row: (left[row].places, row))
        else:
            if len(left) == OPEN_ROWS:
                del left[min(left, key=lambda row: (left[row].places, row))]
            row, left[len(rows)] = len(rows), room
            rows.append([])
        rows[row].append(index)
        left[row] = Needs(*(free - taken for free, taken in zip(left[row], need)))
    return rows, too_large
