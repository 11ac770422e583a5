"""Examples of a mixture, divided among the workers of a DataLoader, with counts of what was left out.

The rows, or documents, of a mixture have one order, whatever the number of workers, and are numbered from 0. Worker w
of W makes examples of the numbers w, w + W, w + 2W, …, so each is used once. Every worker reads all rows to number
them, but tokenises, which is the costly part, only its own. (So each worker downloads everything from the Hub: use few
workers there, or a local copy.)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from absl import logging
from torch.utils.data import IterableDataset, get_worker_info

from qwen3f.data.sources.adapters.files import left_out
from qwen3f.data.sources.adapters.opening import check_max_samples
from qwen3f.data.sources.adapters.pretrain import DatasetSource
from qwen3f.data.sources.adapters.registry import Part
from qwen3f.data.sources.adapters.rows import REASONS, BadRow, LeftOut, OnBadRow, Row, RowFault, check_policy
from qwen3f.data.stream.order import mixed
from qwen3f.data.stream.parts import RawPart, RowsPart
from qwen3f.errors import UserError

MAX_WORKERS = 64

LeaveOut = Callable[[str], None]
"""Called with a reason of `rows.REASONS` for each row or chat that gives no example."""


class Share(NamedTuple):
    """Worker `index` of `count`."""

    index: int = 0
    count: int = 1


class Item(NamedTuple):
    """An example's raw material and its number in the mixture. value: what an adapter made of a row, or a document."""

    number: int
    value: Any


Build = Callable[[Iterator[Item], Share, LeaveOut], Iterator[dict[str, Any]]]


class Items(Protocol):
    """What examples are made of."""

    def items(self, share: Share, leave_out: LeaveOut) -> Iterator[Item]:
        """The items of this share in order. Raises UserError for a bad row, unless they are skipped."""
        ...


@dataclass(frozen=True)
class RowItems:
    """The rows of a mixture, turned into items by adapters.

    Attributes:
        parts: the data sets with their weights, which are shares of the rows.
        adapters: short name of a data set -> the function that makes an item of a row.
        split: "" is the training split of each.
        streaming: read the Hub row by row instead of downloading first.
        max_samples: read at most this many rows; those left out count too.
        on_bad_row: "error" or "skip".
    """

    parts: tuple[Part, ...]
    adapters: Mapping[str, Callable[[Row], Any]]
    split: str
    streaming: bool
    max_samples: int | None
    on_bad_row: OnBadRow

    def __post_init__(self) -> None:
        check_policy(self.on_bad_row)
        check_max_samples(self.max_samples)

    def items(self, share: Share, leave_out: LeaveOut) -> Iterator[Item]:
        """As in `Items`."""
        _tell_files(self.parts, self.split, share, leave_out)
        raw = [RawPart(part.dataset, part.root, self.split, self.streaming) for part in self.parts]
        rows = mixed(raw, [part.weight for part in self.parts], lambda row: 1, Counter())
        for number, (i, row) in islice(enumerate(rows), share.index, self.max_samples, share.count):
            try:
                if isinstance(row, BadRow):
                    raise RowFault(row.reason, row.message)
                value = self.adapters[self.parts[i].dataset.name](row)
            except RowFault as fault:
                if self.on_bad_row == "error":
                    raise UserError(fault.message) from None
                leave_out(fault.reason)
            except LeftOut as left:
                leave_out(left.reason)
            else:
                yield Item(number, value)


@dataclass(frozen=True)
class DocumentItems:
    """The documents of a mixture of text data sets, read as a streamed run reads them, once.

    Attributes: as in `RowItems`, but weights are shares of characters, and max_samples counts documents.
    """

    parts: tuple[Part, ...]
    split: str
    streaming: bool
    max_samples: int | None
    on_bad_row: OnBadRow

    def __post_init__(self) -> None:
        check_policy(self.on_bad_row)
        check_max_samples(self.max_samples)

    def items(self, share: Share, leave_out: LeaveOut) -> Iterator[Item]:
        """As in `Items`. Rows that give no document are seen by every worker, and counted by the first."""
        _tell_files(self.parts, self.split, share, leave_out)
        counts: Counter[str] = Counter()
        sources = [DatasetSource(part.dataset.name, part.dataset, part.root, 0.0) for part in self.parts]
        parts = [RowsPart(source, self.split, self.streaming, self.on_bad_row) for source in sources]
        documents = mixed(parts, [part.weight for part in self.parts], lambda document: len(document.text), counts)
        own = islice(enumerate(documents), share.index, self.max_samples, share.count)
        while True:
            found = next(own, None)
            for reason in counts.elements() if share.index == 0 else ():
                leave_out(reason)
            counts.clear()
            if found is None:
                return
            yield Item(found[0], found[1][1])


def _tell_files(parts: tuple[Part, ...], split: str, share: Share, leave_out: LeaveOut) -> None:
    """Count, in the first worker only, the files of local copies that are not read."""
    for part in parts if share.index == 0 else ():
        for _ in left_out(part.dataset, part.root, split or part.dataset.split).elements() if part.root else ():
            leave_out("other_files")


class ExampleStream(IterableDataset):
    """Examples for a `torch.utils.data.DataLoader` with any number of workers up to MAX_WORKERS.

    Iterating again begins anew. `counts` says what gave no example, by reason, over all passes and workers so far.

    Args:
        items: what the examples are made of.
        build: from items to examples; a function that can be pickled, for workers that are spawned.
    """

    def __init__(self, items: Items, build: Build) -> None:
        self._items = items
        self._build = build
        # Shared memory: the workers write a line each, the process that made the dataset reads.
        self._counts = torch.zeros(MAX_WORKERS + 1, len(REASONS), dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> Counter[str]:
        """How many rows or chats were left out, by reason; no entry for none."""
        totals = self._counts.sum(0).tolist()
        return Counter({reason: count for reason, count in zip(REASONS, totals) if count})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is None:
            share, line = Share(), self._counts[0]
        else:
            if worker.num_workers > MAX_WORKERS:
                raise UserError(f"num_workers is {worker.num_workers}: give at most {MAX_WORKERS}.")
            share, line = Share(worker.id, worker.num_workers), self._counts[worker.id + 1]
        without: Counter[str] = Counter()

        def leave_out(reason: str) -> None:
            without[reason] += 1
            line[REASONS.index(reason)] += 1

        yield from self._examples(share, leave_out)
        if without:
            logging.info("worker %d of %d left out %s", *share, dict(without))

    def _examples(self, share: Share, leave_out: LeaveOut) -> Iterator[dict[str, Any]]:
        for example in self._build(self._items.items(share, leave_out), share, leave_out):
            yield {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in example.items()}


class CountedStream(ExampleStream):
    """An ExampleStream with a length: the first `len` makes one pass over the data, and the result is kept."""

    _length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self._examples(Share(), lambda reason: None))
        return self._length
