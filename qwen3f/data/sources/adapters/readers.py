"""Rows of one local file: parquet, arrow, JSON lines (also .gz, .zst) or a JSON list; a few rows in memory at a time.

Every reader yields `Row`s, and a `BadRow` for what it cannot read: a row, or the rest of a file that is cut off.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from qwen3f.data.sources.adapters.rows import BadRow, Row, check_columns, missing_columns

Rows = Iterator[Row | BadRow]

_BATCH_ROWS = 64  # of tables; books have half a megabyte a row
_CHUNK_BYTES = 2**20
_MAX_RECORD_CHARS = 2**25  # of a JSON list: a longer record is taken for a malformed one
_LIST_START, _LIST_COMMA, _LIST_END = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]")


def read_file(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """The rows of a file, by its suffix (see `files.SUFFIXES`).

    Args:
        path: the file.
        columns: columns that each row must have.
        optional: columns that are also read where there are any. JSON rows come whole.
    """
    name = path.name.lower()
    readers = {".parquet": _read_parquet, ".arrow": _read_arrow, ".json": _read_json}
    reader = next((reader for suffix, reader in readers.items() if name.endswith(suffix)), _read_lines)
    empty = True
    for row in reader(path, columns, optional):
        empty = False
        yield row
    if empty:
        yield BadRow("empty_shards", f"{path} holds no row: remove it, or skip it with on_bad_row='skip'.")


def _read_parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            if missing := [column for column in columns if column not in found]:
                yield missing_columns(str(path), missing, found)
                return
            wanted = [column for column in (*columns, *optional) if column in found]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                yield from _table_rows(batch, path, number)
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        yield _broken(path, number, error)


def _read_arrow(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    number = 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            for table in _arrow_batches(file):
                found = table.schema.names
                if missing := [column for column in columns if column not in found]:
                    yield missing_columns(str(path), missing, found)
                    return
                table = table.select([column for column in (*columns, *optional) if column in found])
                for start in range(0, len(table), _BATCH_ROWS):
                    yield from _table_rows(table.slice(start, _BATCH_ROWS), path, number + start)
                number += len(table)
    except (pyarrow.ArrowException, OSError) as error:
        yield _broken(path, number, error)


def _arrow_batches(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    is_file_format = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file_format:
        reader = pyarrow.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from pyarrow.ipc.open_stream(file)


def _table_rows(batch: pyarrow.RecordBatch, path: Path, before: int) -> Rows:
    """Rows of a batch; `before` rows of the file precede it."""
    try:
        values: list[dict[str, Any] | BadRow] = list(batch.to_pylist())
    except UnicodeDecodeError:
        values = [_one_row(batch.slice(i, 1), f"{path}:{before + i + 1}") for i in range(len(batch))]
    for i, value in enumerate(values):
        yield value if isinstance(value, BadRow) else Row(value, f"{path}:{before + i + 1}")


def _one_row(batch: pyarrow.RecordBatch, name: str) -> dict[str, Any] | BadRow:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("invalid_rows", f"{name} is not UTF-8 at byte {error.start} of a text: write it as UTF-8.")


def _read_json(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
    """A .json file: one list of records, or records line by line."""
    with path.open("rb") as file:
        start = file.read(1024).lstrip()
    reader = _read_list if start.startswith(b"[") else _read_lines
    yield from reader(path, columns, optional)


def _read_lines(path: Path, columns: Sequence[str], _: Sequence[str]) -> Rows:
    number = 0
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():  # a blank line at the end is usual and holds no row
                    yield _parsed(line, f"{path}:{number}", columns)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        yield _broken(path, number, error)


def _open_bytes(path: Path) -> BinaryIO:
    # pyarrow decompresses by the suffix, .gz or .zst, and says when a file is cut off.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"), _CHUNK_BYTES)


def _parsed(line: bytes, name: str, columns: Sequence[str]) -> Row | BadRow:
    try:
        return _record(json.loads(line.decode()), name, columns)
    except UnicodeDecodeError as error:
        return BadRow("invalid_rows", f"{name} is not UTF-8 at byte {error.start} of the line: convert the file.")
    except (ValueError, RecursionError) as error:
        return BadRow("invalid_rows", f"{name} is not valid JSON ({error}): write one object a line.")


def _record(value: object, name: str, columns: Sequence[str]) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow("invalid_rows", f"{name} is a JSON {type(value).__name__}: write an object with the columns.")
    row = Row(value, name)
    return check_columns(row, columns) or row


def _read_list(path: Path, columns: Sequence[str], _: Sequence[str]) -> Rows:
    """A file that is one JSON list, record by record; after a fault the rest cannot be read."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, value in enumerate(_list_records(file), start=1):
                yield _record(value, f"{path}:{number}", columns)
    except UnicodeDecodeError as error:
        yield BadRow("broken_files", f"{path}, after row {number}, is not UTF-8 ({error.reason}): convert the file.")
    except (ValueError, RecursionError) as error:
        yield BadRow("broken_files", f"{path}:{number + 1} cannot be read ({error}): copy the file again.")


def _list_records(file: TextIO) -> Iterator[object]:
    """The entries of a JSON list. Raises ValueError where it is malformed or cut off."""
    decoder = json.JSONDecoder()
    text, place, before = "", 0, _LIST_START
    while True:
        if before is not _LIST_START and _LIST_END.match(text, place):
            return
        if separator := before.match(text, place):
            if _LIST_END.match(text, separator.end()) and before is _LIST_START:
                return
            try:
                value, place = decoder.raw_decode(text, separator.end())
            except json.JSONDecodeError:
                pass  # cut off by the end of the text read so far, or malformed: the limit below tells
            else:
                before = _LIST_COMMA
                yield value
                continue
        more = file.read(_CHUNK_BYTES)
        if not more or len(text) - place > _MAX_RECORD_CHARS:
            raise ValueError("the list is malformed here, or the file is cut off")
        text, place = text[place:] + more, 0


def _broken(path: Path, number: int, error: Exception) -> BadRow:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return BadRow("broken_files", f"{path} cannot be read after row {number} ({reason}): copy it again, it is cut off.")
