"""Files that are small on disk and huge in memory: every reader refuses them early, and the error names the limit."""

import gzip
import json
import os
import tracemalloc
from collections import Counter, deque

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen3f import limits
from qwen3f.data.sources.adapters import tables
from qwen3f.data.sources.adapters.arrow_sizes import decompressed_bytes
from qwen3f.data.sources.adapters.opening import rows
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError

MiB = 2**20


def sparse(path):
    """A file of 1 TB of zeros that takes no disk space."""
    path.touch()
    os.truncate(path, 2**40)


def gzipped(content):
    return lambda path: path.write_bytes(gzip.compress(content))


def parquet(columns, **options):
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path, **{"compression": "zstd", **options})


def arrow(columns, new=pyarrow.ipc.new_stream):
    def make(path):
        table = pyarrow.table(columns)
        with pyarrow.OSFile(str(path), "wb") as sink:
            options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
            with new(sink, table.schema, options=options) as writer:
                writer.write_table(table)

    return make


def endless_record(path):
    path.write_bytes(b'[{"text": "fine"}, {"text": "' + b"a" * (3 * MiB))


_DICTIONARY = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 9000, pyarrow.int32()), ["a" * 1000])
_LINE = json.dumps({"text": "a" * 3 * MiB}).encode() + b"\n"
_ROWS = "is over the limit of 2,097,152 bytes; if you trust the file, set QWEN3F_MAX_ROW_BYTES higher"
_GROWTH = r"bytes on disk grow to [\d,]+ or more, over the limit of 250 times; .* set QWEN3F_MAX_EXPANSION higher"
# Name -> what makes it, the words of the error, whether its sizes are known before any row is decoded.
BOMBS = {
    "line.jsonl": (lambda path: path.write_bytes(_LINE), f"after row 0: a line {_ROWS}", False),
    "sparse.jsonl": (sparse, f"after row 0: a line {_ROWS}", False),
    "line.jsonl.gz": (gzipped(b'{"text": "fine"}\n' + _LINE), f"after row 1: a line {_ROWS}", False),
    "blank.jsonl.gz": (gzipped(b" \n" * (3 * MiB // 4)), _GROWTH, False),
    "equal.jsonl.gz": (gzipped(b'{"text": "%s"}\n' % (b"a" * 200) * 20_000), _GROWTH, False),
    "list.json": (endless_record, "after row 1: a record is malformed, or over the limit of 2,097,152 bytes", False),
    "equal.json.gz": (gzipped(b"[%s{}]" % (b'{"text": "%s"},' % (b"a" * 200) * 20_000)), _GROWTH, False),
    "giant.parquet": (parquet({"text": ["a" * 9 * MiB]}), _GROWTH, True),
    "nulls.parquet": (parquet({"text": pyarrow.nulls(2 * MiB, pyarrow.string())}), _GROWTH, True),
    "list.parquet": (parquet({"text": pyarrow.array([np.ones(MiB, int)])}), _GROWTH, True),
    "equal.parquet": (parquet({"text": _DICTIONARY}), _GROWTH, False),
    "equal_text.parquet": (parquet({"text": _DICTIONARY}, store_schema=False), _GROWTH, False),
    "giant.arrow": (arrow({"text": ["a" * 9 * MiB]}), _GROWTH, True),
    "giant_file.arrow": (arrow({"text": ["a" * 9 * MiB]}, pyarrow.ipc.new_file), _GROWTH, True),
    "dictionary.arrow": (arrow({"text": pyarrow.array(["a" * 9 * MiB]).dictionary_encode()}), _GROWTH, True),
}
TEXT_BOMBS = {
    "sparse.txt": (sparse, f"after row 0: a line {_ROWS}", False),
    "line.txt.gz": (gzipped(b"fine\n" + _LINE), f"a line {_ROWS}", False),
    "blank.txt.gz": (gzipped(b" \n" * (3 * MiB // 4)), _GROWTH, False),
}


@pytest.fixture(autouse=True)
def low_limits(monkeypatch):
    """Lower the limits, so that small files exceed them and the tests are quick."""
    monkeypatch.setenv("QWEN3F_MAX_ROW_BYTES", str(2 * MiB))
    monkeypatch.setattr(limits, "EXPANSION_BYTES", MiB)


@pytest.mark.parametrize("name", BOMBS | TEXT_BOMBS)
def test_a_small_file_of_endless_rows(name, tmp_path, monkeypatch):
    make, words, known = (BOMBS | TEXT_BOMBS)[name]
    make(tmp_path / name)
    size = os.stat(tmp_path / name).st_blocks * 512
    assert size < 24 * 1024 or name in ("line.jsonl", "list.json", "nulls.parquet")
    if known:
        monkeypatch.setattr(tables, "_table_rows", lambda *args: pytest.fail("rows were decoded"))
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda *args: pytest.fail("was decoded"))
    readers = [lambda: open_source(f"files@{tmp_path}", holdout=0.0).documents("train")]
    if name in BOMBS:
        readers.append(lambda: rows(f"slimpajama@{tmp_path}"))
        counts = Counter()
        kept = list(rows(f"slimpajama@{tmp_path}", on_bad_row="skip", counts=counts))
        assert counts == {"broken_files": 1}
        assert len(kept) < 20_000
    for read in readers:
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=rf"{name} cannot be read.*{words}"):
                deque(read(), maxlen=0)
            assert tracemalloc.get_traced_memory()[1] < 40 * MiB
        finally:
            tracemalloc.stop()


def test_the_limits_can_be_raised(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(_LINE))
    monkeypatch.setenv("QWEN3F_MAX_ROW_BYTES", str(4 * MiB))
    parquet({"text": ["a" * 9 * MiB]})(tmp_path / "y.parquet")
    monkeypatch.setenv("QWEN3F_MAX_EXPANSION", "100000")
    found = [len(row.values["text"]) for row in rows(f"slimpajama@{tmp_path}")]
    assert found == [3 * MiB, 9 * MiB]
    for text in ("0", "-1", "many", "1" * 19):
        monkeypatch.setenv("QWEN3F_MAX_ROW_BYTES", text)
        with pytest.raises(UserError, match="variable QWEN3F_MAX_ROW_BYTES is .*: write a positive integer"):
            list(rows(f"slimpajama@{tmp_path}"))


def test_by_default_books_and_repetitive_files_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv("QWEN3F_MAX_ROW_BYTES")
    monkeypatch.undo()
    book = "It was a dark and stormy night. " * 10**6  # 32 MB, a thousandth of it when compressed
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": book}).encode() + b"\n"))
    parquet({"text": [book, None]})(tmp_path / "y.parquet")
    arrow({"text": [book]})(tmp_path / "z.arrow")
    assert [row.values["text"] == book for row in rows(f"slimpajama@{tmp_path}")] == [True, True, False, True]


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_what_an_arrow_file_grows_to_is_what_pyarrow_makes_of_it(new, tmp_path):
    """The size is the sum of pyarrow's buffers in the largest message, here the batch; 0 for an uncompressed file."""
    columns = {
        "text": pyarrow.array([f"{i % 7} " * 900 for i in range(50)]),
        "n": pyarrow.array(np.arange(50) // 9),
        "d": pyarrow.array(["x" * 5000, "y" * 5000] * 25).dictionary_encode(),
    }
    arrow(columns, new)(tmp_path / "x.arrow")
    plain = {name: column for name, column in columns.items() if name != "d"}
    buffers = [
        buffer.size for column in (*plain.values(), columns["d"].indices) for buffer in column.buffers() if buffer
    ]
    found = decompressed_bytes(tmp_path / "x.arrow")
    assert abs(found - sum(buffers)) < 64 * 8  # padded to 64 bytes in the file
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(tmp_path / "plain.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    assert decompressed_bytes(tmp_path / "plain.arrow") == 0
    (tmp_path / "broken.arrow").write_bytes((tmp_path / "x.arrow").read_bytes()[:200])
    assert decompressed_bytes(tmp_path / "broken.arrow") == 0  # the reader says what is wrong with it
