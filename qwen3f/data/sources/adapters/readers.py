"""Rows of one local file: parquet, arrow, JSON lines, a JSON list, or text (these also .gz, .zst), a few at a time.

Every reader yields `Row`s, and a `BadRow` for what it cannot read: a row, or the rest of a file that is cut off or
larger than it may be (`qwen3f.limits`). A UTF-8 signature (BOM) at a file's beginning is no part of its content.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow

from qwen3f import limits
from qwen3f.data.sources.adapters.bounds import Growth, TooLarge, lines
from qwen3f.data.sources.adapters.rows import BadRow, Columns, Row
from qwen3f.data.sources.adapters.tables import arrow_rows, parquet_rows

Rows = Iterator[Row | BadRow]

TEXT_PART_BYTES = 2**20
"""A text file is one document; a larger one is cut at line ends into documents of about this size."""

_CHUNK_BYTES = 2**20
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SIGNATURE = b"\xef\xbb\xbf"
_LIST_START, _LIST_COMMA, _LIST_END = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]")


def read_file(path: Path, columns: Columns) -> Rows:
    """The rows of a file, by its suffix (see `files.SUFFIXES`, `files.TEXT_SUFFIXES`).

    Args:
        columns: the columns to check, and in tables to read. JSON rows come whole. A text file's text becomes the first
            needed column.
    """
    number, empty = 0, True
    try:
        for row in _reader(path)(path, columns):
            empty = False
            number += 1
            yield row
    except TooLarge as error:
        yield BadRow("broken_files", f"{path} cannot be read after row {number}: {error}.")
    except FileNotFoundError:
        yield BadRow("broken_files", f"{path} was removed while it was read, after row {number}: put it back.")
    except PermissionError:
        yield BadRow("broken_files", f"{path} must not be read: change its permissions.")
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        yield BadRow(
            "broken_files",
            f"{path} cannot be read after row {number} ({reason}): copy it again, it is damaged.",
        )
    else:
        if empty:
            yield BadRow("empty_shards", f"{path} holds no row: remove it, or skip it with on_bad_row='skip'.")


def _reader(path: Path) -> Callable[[Path, Columns], Rows]:
    readers = {".parquet": parquet_rows, ".arrow": arrow_rows, ".json": _read_json, ".txt": _read_text}
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((reader for suffix, reader in readers.items() if name.endswith(suffix)), _read_lines)


def _read_json(path: Path, columns: Columns) -> Rows:
    """A .json file: one list of records, or records line by line."""
    with _open_bytes(path)[0] as file:
        start = file.read(1024).lstrip()
    return (_read_list if start.startswith(b"[") else _read_lines)(path, columns)


def _read_lines(path: Path, columns: Columns) -> Rows:
    with _open_bytes(path)[0] as file:
        for number, line in enumerate(lines(file, Growth(path)), start=1):
            if line.strip():  # a blank line at the end is usual and holds no row
                yield _parsed(line, f"{path}:{number}", columns)


def _open_bytes(path: Path) -> tuple[BinaryIO, int]:
    """(the content after its UTF-8 signature, the signature's length in bytes: 0 if there is none)."""
    # pyarrow reports a compressed file that is cut off. It knows only lower-case suffixes: so the suffix is read here.
    stream = pyarrow.input_stream(str(path), compression=_COMPRESSIONS.get(path.suffix.lower()))
    file = io.BufferedReader(stream, _CHUNK_BYTES)
    signed = file.peek(len(_SIGNATURE)).startswith(_SIGNATURE)
    return file, len(file.read(len(_SIGNATURE) if signed else 0))


def _parsed(line: bytes, name: str, columns: Columns) -> Row | BadRow:
    try:
        return _record(json.loads(line.removeprefix(_SIGNATURE).decode()), name, columns)  # of files put together
    except UnicodeDecodeError as error:
        return BadRow("invalid_rows", f"{name} is not UTF-8 at byte {error.start} of the line: convert the file.")
    except (ValueError, RecursionError) as error:
        return BadRow("invalid_rows", f"{name} is not valid JSON ({error}): write one object a line.")


def _record(value: object, name: str, columns: Columns) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow("invalid_rows", f"{name} is a JSON {type(value).__name__}: write an object with the columns.")
    return columns.wrong_in(value, name) or Row(value, name)


def _read_list(path: Path, columns: Columns) -> Rows:
    """A file that is one JSON list, record by record; after a fault the rest cannot be read."""
    number = 0
    try:
        with io.TextIOWrapper(_open_bytes(path)[0], encoding="utf-8") as file:
            for number, value in enumerate(_list_records(file, Growth(path)), start=1):
                yield _record(value, f"{path}:{number}", columns)
    except UnicodeDecodeError as error:
        yield BadRow("broken_files", f"{path}, after row {number}, is not UTF-8 ({error.reason}): convert the file.")
    except (ValueError, RecursionError) as error:
        yield BadRow(
            "broken_files", f"{path}:{number + 1} cannot be read ({error}): copy the file again, or write one list."
        )


def _list_records(file: TextIO, growth: Growth) -> Iterator[object]:
    """The entries of a JSON list, which is all of the file.

    Raises ValueError where it is malformed or cut off, or when more follows; TooLarge for a long record.
    """
    decoder, most = json.JSONDecoder(), limits.ROW_BYTES.value()
    text, place, before = "", 0, _LIST_START
    while True:
        if before is not _LIST_START and (end := _LIST_END.match(text, place)):
            return _check_end(text[end.end() :], file, growth)
        if separator := before.match(text, place):
            if before is _LIST_START and (end := _LIST_END.match(text, separator.end())):
                return _check_end(text[end.end() :], file, growth)
            try:
                value, place = decoder.raw_decode(text, separator.end())
            except json.JSONDecodeError:
                pass  # cut off by the end of the text read so far, or malformed: the end of the file tells
            else:
                before = _LIST_COMMA
                yield value
                continue
        if len(text) - place > most:
            raise TooLarge(f"a record is malformed, or {limits.ROW_BYTES.exceeded('bytes')}")
        # Read at least as much again, so that a long record is parsed few times, not once for each chunk.
        more = file.read(max(_CHUNK_BYTES, len(text) - place))
        growth.add(len(more))
        if not more:
            raise ValueError("the list is malformed here, or the file is cut off")
        text, place = text[place:] + more, 0


def _check_end(rest: str, file: TextIO, growth: Growth) -> None:
    """Raises ValueError unless `rest` and what follows in the file are white space."""
    while not rest or rest.isspace():
        if not (rest := file.read(_CHUNK_BYTES)):
            return
        growth.add(len(rest))
    raise ValueError("more follows the end of the list")


def _read_text(path: Path, columns: Columns) -> Rows:
    """Parts of a text file. CR LF is a line end like LF, and becomes one."""
    (file, offset), growth, line = _open_bytes(path), Growth(path), 1
    with file:
        part, following = _part(file, growth), _part(file, growth)
        whole = not following
        while part:
            name = str(path) if whole else f"{path}:{line}"
            try:
                text = part.decode()
            except UnicodeDecodeError as error:
                place = offset + error.start
                yield BadRow("broken_files", f"{path} is not UTF-8 at byte {place}: convert the file to UTF-8.")
                return
            yield Row({columns.needed[0]: text.replace("\r\n", "\n")}, name)
            offset += len(part)
            line += part.count(b"\n")
            part, following = following, _part(file, growth)


def _part(file: BinaryIO, growth: Growth) -> bytes:
    """The next TEXT_PART_BYTES, and the rest of their last line."""
    part = file.read(TEXT_PART_BYTES)
    growth.add(len(part))
    return part if part[-1:] in (b"", b"\n") else part + next(lines(file, growth), b"")
