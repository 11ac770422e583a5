"""The rows of a data set, from the Hub or from a local copy: one order, each row with its origin."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice

from qwen3f.data.sources.adapters.files import split_files
from qwen3f.data.sources.adapters.hub import hub_rows
from qwen3f.data.sources.adapters.readers import read_file
from qwen3f.data.sources.adapters.registry import HubDataset, parse_mixture
from qwen3f.data.sources.adapters.rows import BadRow, Columns, OnBadRow, Row, check_policy
from qwen3f.errors import UserError


def rows(
    name: str,
    root: str = "",
    split: str = "",
    *,
    streaming: bool = True,
    max_samples: int | None = None,
    on_bad_row: OnBadRow = "error",
    counts: Counter[str] | None = None,
) -> Iterator[Row]:
    """The rows of one data set in a fixed order, a few in memory at a time.

    Args:
        name: a short name or Hub id of the registry, or "name@DIR" for a local copy.
        root: directory of a local copy; "" and no @DIR reads the Hub.
        split: "" is the one that training reads.
        streaming: True reads the Hub row by row; False downloads the data set first.
        max_samples: read at most this many rows; bad ones count too.
        on_bad_row: "error" raises at the first row or file that cannot be read; "skip" continues.
        counts: what was skipped, by reason (`rows.REASONS`), is added here.

    Raises:
        UserError: an unknown name, a directory without the split, no network, or a bad row (with file and row).
    """
    check_policy(on_bad_row)
    check_max_samples(max_samples)
    (part,) = parse_mixture(name, root)
    for row in islice(raw_rows(part.dataset, part.root, split, streaming), max_samples):
        if isinstance(row, Row):
            yield row
        elif on_bad_row == "error":
            raise UserError(row.message)
        elif counts is not None:
            counts[row.reason] += 1


def raw_rows(dataset: HubDataset, root: str, split: str, streaming: bool) -> Iterator[Row | BadRow]:
    """All rows, bad ones in their place. Raises UserError as `rows` does, but for bad rows."""
    return (row for row, _ in read_on(dataset, root, (0, 0), split, streaming))


def read_on(
    dataset: HubDataset, root: str, place: tuple[int, int], split: str = "", streaming: bool = True
) -> Iterator[tuple[Row | BadRow, tuple[int, int]]]:
    """The rows of `raw_rows` from a place on, each with the place after it.

    Args:
        place: (number of a file, how many of its rows to skip); the Hub's stream counts as one file.
    """
    split = split or dataset.split
    first, passed = place
    if root:
        files = split_files(dataset, root, split)
        columns = Columns(dataset.columns, dataset.optional)
        readers = [partial(read_file, path, columns) for path in files]
    else:
        readers = [partial(hub_rows, dataset, split, streaming)]
    for number in range(first, len(readers)):
        for row_number, row in enumerate(islice(readers[number](), passed, None), start=passed + 1):
            yield row, (number, row_number)
        passed = 0


def check_max_samples(max_samples: int | None) -> None:
    """Raises UserError unless it is None or at least 1."""
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples is {max_samples}: give at least 1, or None for all.")
