"""A source that can be read on from any place: of documents, or of rows as they are."""

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
"""Where reading stands: a file's number and the rows of it that have been read."""

START: Place = (0, 0)


Item = TypeVar("Item", covariant=True)


class ItemsPart(Protocol[Item]):
    """A source in a fixed order."""

    @property
    def name(self) -> str:
        """What the user wrote in the mixture."""
        ...

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Item | None, Place]]:
        """What stands from `place` on, each with the place behind it; None for a row that is left out.

        What is left out by a rule is added to `counts` by reason; the held-out documents are left out without.
        """
        ...


class StreamPart(ItemsPart[Document], Protocol):
    """The documents of a source's training split."""

    def fingerprint(self) -> str:
        """Changes when what lies at a place may have changed."""
        ...


@dataclass(frozen=True)
class RowsPart:
    """A text data set of the registry, from the Hub or a local copy: read on from a file and a row.

    Files before the place are not opened; of its own file the rows before it are read and thrown away (of the Hub's
    stream, which is one file here, all rows).

    split: "" is the one to train on. streaming: from the Hub, read as rows are asked for. on_bad_row: "skip" counts
    rows that cannot be used.
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
    """Any other source: read from its beginning, and what lies before the place thrown away."""

    source: Source

    @property
    def name(self) -> str:
        """As in `StreamPart`."""
        return self.source.name

    def fingerprint(self) -> str:
        """As in `StreamPart`."""
        return self.source.fingerprint("train")

    def items(self, place: Place, counts: Counter[str]) -> Iterator[tuple[Document | None, Place]]:
        """As in `StreamPart`. `counts` is of the whole source, as often as it is read."""
        _, before = place
        numbered = enumerate(self.source.documents("train", counts), start=1)
        return ((document, (0, number)) for number, document in islice(numbered, before, None))


@dataclass(frozen=True)
class RawPart:
    """The rows of a data set as they are, bad ones in their place."""

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
