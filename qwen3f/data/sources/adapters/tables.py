"""Rows of parquet and arrow files, a few in memory at a time; what a file claims to hold is checked first.

Null fields of the records within a column are left out (`rows.without_nulls`); a column that is null stays.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwen3f.data.sources.adapters.arrow_sizes import decompressed_bytes
from qwen3f.data.sources.adapters.bounds import Growth
from qwen3f.data.sources.adapters.rows import BadRow, Columns, Row, without_nulls

Rows = Iterator[Row | BadRow]

_BATCH_ROWS = 64  # books have half a megabyte a row
_BATCH_BYTES = 2**28  # a batch has fewer rows where they may take more than this
_ROW_BYTES = 64  # memory that the smallest row takes
_VALUE_BYTES = 8
_UNREADABLE = (ValueError, OverflowError, KeyError)  # for values that Python cannot hold, such as the year 290000


def parquet_rows(path: Path, columns: Columns) -> Rows:
    """The rows of a parquet file. Raises pyarrow's errors and OSError for a damaged file, and TooLarge."""
    growth, number = Growth(path), 0
    with pyarrow.parquet.ParquetFile(path) as file:
        found = file.schema_arrow.names
        if wrong := columns.wrong_in(found, str(path)):
            yield wrong
            return
        wanted = [column for column in (*columns.needed, *columns.optional) if column in found]
        largest = max(_row_groups(file.metadata, wanted), default=0)
        growth.check(largest)
        # Fewer rows if a batch may be large: one value of a dictionary may stand in every row.
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
        for batch in file.iter_batches(batch_size=size, columns=wanted):
            yield from _table_rows(batch, path, number, growth)
            number += len(batch)


def _row_groups(metadata: pyarrow.parquet.FileMetaData, wanted: list[str]) -> Iterator[int]:
    """A lower bound on the decoded bytes of each row group's wanted columns: on disk a run of equal values takes almost
    none."""
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        leaves = [group.column(i) for i in range(group.num_columns)]
        yield sum(
            max(leaf.total_uncompressed_size, _VALUE_BYTES * leaf.num_values)
            for leaf in leaves
            if leaf.path_in_schema.split(".")[0] in wanted or leaf.path_in_schema in wanted
        )


def arrow_rows(path: Path, columns: Columns) -> Rows:
    """The rows of a file in Arrow's stream format, which `datasets` writes, or file format. Raises as
    `parquet_rows`."""
    growth, number = Growth(path), 0
    growth.check(decompressed_bytes(path))
    with pyarrow.OSFile(str(path)) as file:
        for table in _arrow_batches(file):
            found = table.schema.names
            if wrong := columns.wrong_in(found, str(path)):
                yield wrong
                return
            table = table.select([column for column in (*columns.needed, *columns.optional) if column in found])
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, table.nbytes)))
            for start in range(0, len(table), size):
                yield from _table_rows(table.slice(start, size), path, number + start, growth)
            number += len(table)


def _arrow_batches(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    is_file_format = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file_format:
        reader = pyarrow.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from pyarrow.ipc.open_stream(file)


def _table_rows(batch: pyarrow.RecordBatch, path: Path, before: int, growth: Growth) -> Rows:
    """Rows of a batch; `before` rows of the file precede it."""
    try:
        values: list[dict[str, Any] | BadRow] = list(batch.to_pylist())
    except _UNREADABLE:
        values = [_one_row(batch.slice(i, 1), f"{path}:{before + i + 1}") for i in range(len(batch))]
    for i, value in enumerate(values):
        if isinstance(value, BadRow):
            yield value
            continue
        growth.add(_ROW_BYTES + sum(len(text) for text in value.values() if isinstance(text, str)))
        yield Row({column: without_nulls(entry) for column, entry in value.items()}, f"{path}:{before + i + 1}")


def _one_row(batch: pyarrow.RecordBatch, name: str) -> dict[str, Any] | BadRow:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("invalid_rows", f"{name} is not UTF-8 at byte {error.start} of a text: write it as UTF-8.")
    except _UNREADABLE as error:
        return BadRow("invalid_rows", f"{name} holds a value that cannot be read ({error}): write another.")
