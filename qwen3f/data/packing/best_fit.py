"""Best-fit packing: choose which documents share a row, so that none is cut and little is padding.

Documents are placed longest first, each into the fullest row that still has room for it (Ding et al. 2024, "Fewer
truncations improve language modeling", arXiv:2404.10830). A document that is longer than a row is cut into full rows
and a rest, or dropped, as the caller's policy says; no other document is cut.

Legend: T = places of a row. A document of n tokens takes n − 1 places, each an input with its target. Its last
token, <|endoftext|>, is only a target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen3f.errors import UserError

LongDocuments = Literal["cut", "drop"]
LONG_DOCUMENTS = ("cut", "drop")


@dataclass(frozen=True, eq=False)
class Rows:
    """Pieces of documents in rows. Row r has the pieces starts[r] : starts[r + 1].

    Attributes:
        document, begin, places: int64 [pieces]: a piece's inputs are tokens begin … begin + places − 1 of a document,
            its targets are the tokens one place later.
        starts: int64 [rows + 1].
        dropped: number of documents that were left out because they are too long.
    """

    document: np.ndarray
    begin: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def filled(self) -> int:
        """Places of all rows that are not padding."""
        return int(self.places.sum())

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, begin, places) of each piece of a row."""
        span = slice(self.starts[row], self.starts[row + 1])
        return list(zip(self.document[span].tolist(), self.begin[span].tolist(), self.places[span].tolist()))


def best_fit(lengths: Sequence[int] | np.ndarray, seq_len: int, long_documents: LongDocuments = "cut") -> Rows:
    """Pack documents of `lengths` tokens into rows of T places. The same list of lengths always gives the same rows.

    It takes one to five microseconds a document. A document of one token has nothing to predict and is in no row.

    Args:
        lengths: tokens of each document, its end-of-text token among them.
        seq_len: T.
        long_documents: what to do with documents of more than T + 1 tokens: "cut" keeps every token, "drop" leaves them
            out.

    Raises:
        UserError: `long_documents` is neither.
    """
    check_policy(long_documents)
    needed = np.asarray(lengths, np.int64) - 1
    too_long = needed > seq_len
    documents = np.flatnonzero((needed > 0) & ~too_long)
    begins, dropped = np.zeros_like(documents), int(too_long.sum())
    full = np.zeros(0, np.int64)
    if long_documents == "cut":
        long = np.flatnonzero(too_long)
        pieces, rests = np.divmod(needed[long], seq_len)
        full = np.repeat(long, pieces)
        with_rest = rests > 0
        documents = np.concatenate([documents, long[with_rest]])
        begins = np.concatenate([begins, (pieces * seq_len)[with_rest]])
        dropped = 0
    places = needed[documents] - begins
    order = np.lexsort((documents, -places))  # longest first; among equal lengths the earlier document
    rows = _fit(places[order].tolist(), seq_len)

    # The full pieces of long documents come first, a row each.
    within = np.arange(len(full)) - np.searchsorted(full, full)
    members = [n for row in rows for n in row]
    packed = order[np.array(members, np.int64)]
    counts = np.concatenate([np.ones(len(full), np.int64), [len(row) for row in rows]])
    return Rows(
        document=np.concatenate([full, documents[packed]]),
        begin=np.concatenate([within * seq_len, begins[packed]]),
        places=np.concatenate([np.full(len(full), seq_len), places[packed]]),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        dropped=dropped,
    )


def check_policy(long_documents: str) -> None:
    """Raises UserError for a policy that does not exist."""
    if long_documents not in LONG_DOCUMENTS:
        raise UserError(f"config.data.long_documents is {long_documents!r}: write one of {', '.join(LONG_DOCUMENTS)}.")


def _fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `sizes`: each piece goes into the fullest row that still has room for it.

    sizes: in falling order, each at most `capacity`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    rooms = 0  # bit r is set where with_room[r] is not empty
    for index, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - size
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows
