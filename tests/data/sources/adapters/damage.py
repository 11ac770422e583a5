"""Damaged files: how each is made, what its error says, and what is counted if bad rows are skipped."""

import pyarrow
import pyarrow.parquet

from tests.data.sources.adapters.real_rows import write


def docs(n, start=0):
    return [{"text": f"document {i}", "meta": {"redpajama_set_name": "RedPajamaC4"}} for i in range(start, start + n)]


def _bad_utf8(path):
    column = pyarrow.array([b"fine", b"ab\xff", b"good"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)


def _cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))] if keep < 1 else content[:-keep])


def _lines(*lines):
    return lambda path: path.write_bytes(b"\n".join(lines) + b"\n")


def _table(path, names, *columns):
    """A parquet or an arrow file."""
    table = pyarrow.Table.from_arrays(list(columns), names)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def _twice(path):
    _table(path, ["text", "text"], pyarrow.array(["first"]), pyarrow.array(["second"]))


def _far(value, kind):
    whole = pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64()
    return lambda path: _table(path, ["text"], pyarrow.array([value], whole).view(kind))


FINE = b'{"text": "fine"}'
DAMAGE = {
    "a parquet file cut off": (
        "x.parquet",
        lambda path: _cut(write(docs(9), path), 0.5),
        r"x.parquet cannot be read after row 0 \(.+\): copy it again",
        {"broken_files": 1},
    ),
    "no parquet file": ("x.parquet", _lines(b"x"), "x.parquet cannot be read after row 0", {"broken_files": 1}),
    "an arrow file cut off": (
        "x.arrow",
        lambda path: _cut(write(docs(9), path), 0.7),
        r"x.arrow cannot be read after row [2468] ",
        {"broken_files": 1},
    ),
    "a zstd file cut off": (
        "x.jsonl.zst",
        lambda path: _cut(write(docs(9), path), 5),
        r"x.jsonl.zst cannot be read .*Truncated",
        {"broken_files": 1},
    ),
    "a gzip file cut off": (
        "x.jsonl.gz",
        lambda path: _cut(write(docs(9), path), 12),
        "x.jsonl.gz cannot be read",
        {"broken_files": 1},
    ),
    "a list cut off": (
        "x.json",
        lambda path: _cut(write(docs(3), path), 25),
        "x.json:3 cannot be read .*malformed here, or the file is cut off",
        {"broken_files": 1},
    ),
    "a list of other things": (
        "x.json",
        _lines(b'[{"text": "fine"}, 5]'),
        "x.json:2 is a JSON int",
        {"invalid_rows": 1},
    ),
    "a list that is not UTF-8": ("x.json", _lines(b'[{"text": "\xff"}]'), "x.json.* is not UTF-8", {"broken_files": 1}),
    "an empty file": ("x.jsonl", lambda path: path.write_text("\n"), "x.jsonl holds no row", {"empty_shards": 1}),
    "an empty table": (
        "x.parquet",
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path),
        "x.parquet holds no row: remove it",
        {"empty_shards": 1},
    ),
    "an empty zstd file": (
        "x.jsonl.zst",
        lambda path: write([], path),
        "x.jsonl.zst holds no row",
        {"empty_shards": 1},
    ),
    "a table without the column": (
        "x.parquet",
        lambda path: write([{"body": "a", "id": 1}], path),
        r"x.parquet has no column 'text'; it has 'body', 'id'",
        {"missing_columns": 1},
    ),
    "a batch without the column": (
        "x.arrow",
        lambda path: write([{"body": "a"}], path),
        "x.arrow has no column 'text'; it has 'body'",
        {"missing_columns": 1},
    ),
    "a line without the column": (
        "x.jsonl",
        _lines(FINE, b'{"body": 1}'),
        "x.jsonl:2 has no column 'text'; it has 'body'",
        {"missing_columns": 1},
    ),
    "a line that is not JSON": (
        "x.jsonl",
        _lines(FINE, b'{"text"'),
        "x.jsonl:2 is not valid JSON",
        {"invalid_rows": 1},
    ),
    "a line of another type": ("x.jsonl", _lines(FINE, b"[1]"), "x.jsonl:2 is a JSON list", {"invalid_rows": 1}),
    "a line that is not UTF-8": (
        "x.jsonl",
        _lines(FINE, b'{"text": "\xe9"}', FINE),
        "x.jsonl:2 is not UTF-8 at byte 10 of the line",
        {"invalid_rows": 1},
    ),
    "a parquet column twice": ("x.parquet", _twice, "x.parquet has the column 'text' 2 times", {"broken_files": 1}),
    "an arrow column twice": ("x.arrow", _twice, "x.arrow has the column 'text' 2 times", {"broken_files": 1}),
    "a day that is none of Python's": (
        "x.parquet",
        _far(2**30, pyarrow.date32()),
        r"x.parquet:1 holds a value that cannot be read \(",
        {"invalid_rows": 1},
    ),
    "a time that is none of Python's": (
        "x.arrow",
        _far(2**60, pyarrow.timestamp("s")),
        r"x.arrow:1 holds a value that cannot be read \(",
        {"invalid_rows": 1},
    ),
    "a text that is not UTF-8": ("x.parquet", _bad_utf8, "x.parquet:2 is not UTF-8 at byte 2", {"invalid_rows": 1}),
}
