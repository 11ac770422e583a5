"""Sources of documents, or of raw rows, that can be read from any place on."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from qwen3f.data.sources.adapters.opening import read_on
from qwen3f.data.sources.adapters.pretrain import DatasetSource, usable
from qwen3f.data.sources.adapters.registry import HubDataset
from qwen3f.data.sources.adapters.rows import BadRow, LeftOut, OnBadRow, Row
from qwen3f.data.sources.documents import Document, Source, is_heldout

Place = tuple[int, int]
"""Where reading stands: (number of a file, how many of its rows have been read)."""

START: Place = (0, 0)


Item = TypeVar("Item", covariant=True)


class ItemsPart(Protocol[Item]):
    """A source in a fixed order."""

    @property
    def name(self) -> str:
        """What the user wrote in the mixture."""
        ...

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Item | None, Place]]:
        """The items from `place` on, each with the place after it; the item is None for a row that is left out.

        Rows left out by a rule are added to `counts` by reason; held-out documents are left out without a count.
        """
        ...


class StreamPart(ItemsPart[Document], Protocol):
    """The documents of a source's training split."""

    def fingerprint(self) -> str:
        """Changes when the items may have changed, so that a place would mean another item."""
        ...


@dataclass(frozen=True)
class RowsPart:
    """A text data set of the registry, from the Hub or a local copy, read from any file and row on.

    Files before the place are not opened. In the place's own file, the rows before it are read and dropped. The Hub's
    stream counts as one file, so there all rows before the place are read.

    split: "" is the one to train on. streaming: read the Hub row by row instead of downloading first. on_bad_row:
    "skip" leaves out and counts rows that cannot be used.
    """

    source: DatasetSource
    split: str = ""
    streaming: bool = True
    on_bad_row: OnBadRow = "error"

    @property
    def name(self) -> str:
        """As in `StreamPart`."""
        return self.source.name

    def fingerprint(self) -> str:
        """As in `StreamPart`."""
        return self.source.fingerprint("train")

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """As in `StreamPart`. Raises UserError as `DatasetSource.documents` does, unless bad rows are skipped."""
        for row, behind in read_on(self.source.dataset, self.source.root, place, self.split, self.streaming):
            try:
                found = usable(row, self.on_bad_row)
            except LeftOut as left:
                counts[left.reason] += 1
                yield None, behind
            else:
                yield None if is_heldout(found.text.encode(), self.source.holdout) else found, behind


@dataclass(frozen=True)
class SourcePart:
    """Any other source: it is read from its beginning, and the documents before the place are dropped."""

    source: Source

    @property
    def name(self) -> str:
        """As in `StreamPart`."""
        return self.source.name

    def fingerprint(self) -> str:
        """As in `StreamPart`."""
        return self.source.fingerprint("train")

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """As in `StreamPart`. `counts` is of the whole source, and grows each time it is read."""
        _, before = place
        numbered = enumerate(self.source.documents("train", counts), start=1)
        return ((document, (0, number)) for number, document in islice(numbered, before, None))


@dataclass(frozen=True)
class RawPart:
    """The raw rows of a data set, bad rows in their place."""

    dataset: HubDataset
    root: str
    split: str
    streaming: bool

    @property
    def name(self) -> str:
        """As in `ItemsPart`."""
        return self.dataset.name

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Row | BadRow, Place]]:
        """As in `ItemsPart`; leaves nothing out. Raises UserError as `opening.rows`, but for bad rows."""
        return read_on(self.dataset, self.root, place, self.split, self.streaming)


def stream_part(source: Source) -> StreamPart:
    """The part that reads `source`."""
    return RowsPart(source) if isinstance(source, DatasetSource) else SourcePart(source)
