"""Examples from the rows of a mixture, divided among the workers of a DataLoader, with counts of what was left out.

The rows of a mixture stand in one order whatever the number of workers, numbered from 0. Worker w of W makes its
examples of the rows w, w + W, w + 2W, …, so each row is used once. Every worker reads all rows to count them, and does
the costly part, tokenising, for its own. (From the Hub each worker thus downloads everything: use few workers there, or
a local copy.)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from absl import logging
from torch.utils.data import IterableDataset, get_worker_info

from qwen3f.data.sources.adapters.interleave import interleave
from qwen3f.data.sources.adapters.opening import check_max_samples, raw_rows
from qwen3f.data.sources.adapters.registry import Part
from qwen3f.data.sources.adapters.rows import REASONS, BadRow, LeftOut, OnBadRow, Row, RowFault, check_policy
from qwen3f.errors import UserError

MAX_WORKERS = 64

LeaveOut = Callable[[str], None]
"""Called with a reason of `rows.REASONS` for each row or chat that gives no example."""


class Share(NamedTuple):
    """Worker `index` of `count`."""

    index: int = 0
    count: int = 1


class Item(NamedTuple):
    """What an adapter made of a row, and the row's number in the mixture."""

    number: int
    value: Any


Build = Callable[[Iterator[Item], Share, LeaveOut], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class RowStream:
    """The rows of a mixture and what becomes of them.

    Attributes:
        parts: the data sets with their weights.
        adapters: by short name, from a row to an item.
        size: of a row, what the weights share out: rows, or characters.
        split: "" is the training split of each.
        streaming: from the Hub, read as rows are asked for.
        max_samples: rows to read, at most; those left out are among them.
        on_bad_row: "error" or "skip".
    """

    parts: tuple[Part, ...]
    adapters: Mapping[str, Callable[[Row], Any]]
    size: Callable[[Row | BadRow], float]
    split: str
    streaming: bool
    max_samples: int | None
    on_bad_row: OnBadRow

    def __post_init__(self) -> None:
        check_policy(self.on_bad_row)
        check_max_samples(self.max_samples)

    def items(self, share: Share, leave_out: LeaveOut) -> Iterator[Item]:
        """The items of this share in order. Raises UserError for a bad row, unless they are skipped."""
        streams = [raw_rows(part.dataset, part.root, self.split, self.streaming) for part in self.parts]
        mixed = interleave(streams, [part.weight for part in self.parts], self.size)
        for number, (i, row) in islice(enumerate(mixed), share.index, self.max_samples, share.count):
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


def one_a_row(row: Row | BadRow) -> float:
    """Size of a row where weights share out rows."""
    return 1.0


def characters(row: Row | BadRow) -> float:
    """Size of a row where weights share out text: the characters of its column `text`."""
    text = row.values.get("text") if isinstance(row, Row) else None
    return float(len(text)) if isinstance(text, str) else 0.0


class ExampleStream(IterableDataset):
    """Examples for a `torch.utils.data.DataLoader` with any number of workers up to MAX_WORKERS.

    Iterating again begins anew. `counts` says what gave no example, by reason, over all passes and workers so far.

    Args:
        stream: the rows.
        build: from items to examples; a function that can be pickled, for workers that are spawned.
    """

    def __init__(self, stream: RowStream, build: Build) -> None:
        self._stream = stream
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
        left_out: Counter[str] = Counter()

        def leave_out(reason: str) -> None:
            left_out[reason] += 1
            line[REASONS.index(reason)] += 1

        yield from self._examples(share, leave_out)
        if left_out:
            logging.info("worker %d of %d left out %s", *share, dict(left_out))

    def _examples(self, share: Share, leave_out: LeaveOut) -> Iterator[dict[str, Any]]:
        for example in self._build(self._stream.items(share, leave_out), share, leave_out):
            yield {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in example.items()}


class CountedStream(ExampleStream):
    """Examples whose number can be asked: `len` makes one pass over the data and remembers."""

    _length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self._examples(Share(), lambda reason: None))
        return self._length
