"""A source of text that can be read on from any place."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from qwen3f.data.sources.adapters.opening import read_on
from qwen3f.data.sources.adapters.pretrain import DatasetSource, usable
from qwen3f.data.sources.adapters.rows import LeftOut
from qwen3f.data.sources.documents import Document, Source, is_heldout

Place = tuple[int, int]
"""Where reading stands: a file's number and the rows of it that have been read."""

START: Place = (0, 0)


class StreamPart(Protocol):
    """A source in a fixed order, of its training split."""

    @property
    def name(self) -> str:
        """What the user wrote in `data.mixture`."""
        ...

    def fingerprint(self) -> str:
        """Changes when what lies at a place may have changed."""
        ...

    def documents(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """What stands from `place` on, each with the place behind it; None for a row that is left out.

        What is left out by a rule is added to `counts` by reason; the held-out documents are left out without.
        """
        ...


@dataclass(frozen=True)
class RowsPart:
    """A text data set of the registry, from the Hub or a local copy: read on from a file and a row.

    Files before the place are not opened; of its own file the rows before it are read and thrown away (of the Hub's
    stream, which is one file here, all rows).
    """

    source: DatasetSource

    @property
    def name(self) -> str:
        """As in `StreamPart`."""
        return self.source.name

    def fingerprint(self) -> str:
        """As in `StreamPart`."""
        return self.source.fingerprint("train")

    def documents(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """As in `StreamPart`. Raises UserError as `DatasetSource.documents` does."""
        for row, behind in read_on(self.source.dataset, self.source.root, place):
            try:
                found = usable(row)
            except LeftOut as left:
                counts[left.reason] += 1
                yield None, behind
            else:
                yield None if is_heldout(found.text.encode(), self.source.holdout) else found, behind


@dataclass(frozen=True)
class SourcePart:
    """Any other source: read from its beginning, and what lies before the place thrown away."""

    source: Source

    @property
    def name(self) -> str:
        """As in `StreamPart`."""
        return self.source.name

    def fingerprint(self) -> str:
        """As in `StreamPart`."""
        return self.source.fingerprint("train")

    def documents(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """As in `StreamPart`. `counts` is of the whole source, as often as it is read."""
        _, before = place
        numbered = enumerate(self.source.documents("train", counts), start=1)
        return ((document, (0, number)) for number, document in islice(numbered, before, None))


def stream_part(source: Source) -> StreamPart:
    """The part that reads `source`."""
    return RowsPart(source) if isinstance(source, DatasetSource) else SourcePart(source)
