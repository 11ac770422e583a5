"""Pack whole chats with pictures into rows, within limits on tokens, patches and pictures."""

from collections.abc import Sequence
from typing import NamedTuple

OPEN_ROWS = 128  # rows that are tried for a chat; more would be slower and save hardly any padding


class Needs(NamedTuple):
    """What a chat takes of a row, or a row has room for: places of tokens, patches, pictures."""

    places: int
    patches: int
    pictures: int

    def within(self, room: "Needs") -> bool:
        return all(need <= left for need, left in zip(self, room))


def pack(needs: Sequence[Needs], room: Needs) -> tuple[list[list[int]], list[int]]:
    """(rows, each a list of indices into needs; indices of the chats that are too large for any row).

    Chats are placed longest first, each into the fullest open row that still has room for it. If none has, a new row is
    opened; when OPEN_ROWS are open, the fullest is closed first. The result is a function of needs and room alone.
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
