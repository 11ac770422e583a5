"""Directories of text: what is read from each format, the split, and an error for each kind of broken file."""

import gzip
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from qwen3f.data.sources.registry import Document, open_source
from qwen3f.errors import UserError


def _read(source, split="train", counts=None):
    return list(source.documents(split, counts))


def _open(tmp_path, **options):
    return open_source(f"files@{tmp_path / 'corpus'}", **{"holdout": 0.0, **options})


def test_all_formats_in_path_order(tmp_path, write_jsonl, write_parquet):
    jsonl = write_jsonl([{"text": "one"}, {"text": "two\n▁"}], "b.jsonl")
    with jsonl.open("a") as file:
        file.write("\n")  # a blank last line is no row
    parquet = write_parquet({"text": ["p1", "p2", "p3"], "id": [1, 2, 3]}, "a.parquet")
    text = tmp_path / "corpus" / "deep" / "er" / "c.TXT"
    text.parent.mkdir(parents=True)
    text.write_bytes(b"line\r\n\r\nend")
    for name in ("readme.md", "more.MD", "Makefile", "c.csv"):
        (tmp_path / "corpus" / name).write_text("not read")
    (tmp_path / "corpus" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "corpus" / ".hidden.txt").write_text("not read")
    (tmp_path / "corpus" / ".git").mkdir()
    (tmp_path / "corpus" / ".git" / "x.txt").write_text("not read")
    assert _read(_open(tmp_path)) == [
        Document("p1", f"{parquet}:1"),
        Document("p2", f"{parquet}:2"),
        Document("p3", f"{parquet}:3"),
        Document("one", f"{jsonl}:1"),
        Document("two\n▁", f"{jsonl}:2"),
        Document("line\n\nend", str(text)),  # CR LF is a line end
    ]
    others = {".md": 2, ".csv": 1, "no suffix": 1, ".jsonl, no file": 1, "hidden": 2}
    assert _open(tmp_path).other_files() == others
    same = open_source("files", root=str(tmp_path / "corpus"), holdout=0.0)
    assert _read(same) == _read(_open(tmp_path))


def test_linked_directories_are_read_once_and_circles_end(tmp_path):
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for directory in (root / "b", elsewhere / "deep"):
        directory.mkdir(parents=True)
    (root / "b" / "own.txt").write_text("own")
    (elsewhere / "deep" / "there.txt").write_text("there")
    (root / "a").symlink_to(elsewhere)
    (root / "c").symlink_to(elsewhere / "deep")  # read already, as a/deep
    (elsewhere / "back").symlink_to(root)
    assert [d.text for d in _read(_open(tmp_path))] == ["there", "own"]
    assert _open(tmp_path).other_files() == {"linked twice": 2}


def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "corpus" / "closed").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("a")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"corpus/closed cannot be read \(Permission denied\)"):
        _open(tmp_path)


def test_signatures_between_files_that_were_put_together(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n' * 2)
    assert [d.text for d in _read(_open(tmp_path))] == ["1", "1"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("signature", [b"", b"\xef\xbb\xbf"])
def test_every_format_with_a_signature_and_either_line_end(signature, end, tmp_path):
    """The signature (BOM) is no part of the first text, nor of JSON; CR LF ends a line."""
    root = tmp_path / "corpus"
    root.mkdir()
    records = [json.dumps({"text": f"text {i}"}) for i in range(3)]
    lines, listed = "".join(record + end for record in records), f"[{(',' + end).join(records)}{end}]{end}"
    text = f"a{end}b{end}"
    for name, content in (
        ("a.jsonl", lines), ("b.jsonl.gz", lines), ("c.jsonl.zst", lines), ("d.json", listed), ("e.json", lines),
        ("f.txt", text), ("g.txt.gz", text), ("h.txt.zst", text), ("i.json.gz", listed), ("j.json.zst", lines),
    ):  # fmt: skip
        compression = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
        with pyarrow.output_stream(str(root / name), compression=compression) as sink:
            sink.write(signature + content.encode())
    documents = _read(_open(tmp_path))
    three = ["text 0", "text 1", "text 2"]
    assert [d.text for d in documents] == three * 5 + ["a\nb\n"] * 3 + three * 2
    assert documents[3].name == f"{root / 'b.jsonl.gz'}:1"
    (root / "f.txt").write_bytes(signature + b"ab\xff")
    with pytest.raises(UserError, match=f"f.txt is not UTF-8 at byte {len(signature) + 2}: convert"):
        _read(_open(tmp_path))


@pytest.mark.parametrize("first", ['[{"text": "a"}, {"text": "b"}]', "[]"])
@pytest.mark.parametrize(
    "rest", ['\n[{"text": "lost"}]', '{"text": "lost', "]", pytest.param(" " * 3 * 2**20 + "x", id="far")]
)
def test_what_follows_a_list_is_not_lost(first, rest, tmp_path):
    (tmp_path / "all.json").write_text(first + rest)
    with pytest.raises(UserError, match=r"all.json:\d cannot be read \(more follows the end of the list\)"):
        list(open_source(f"files@{tmp_path}").documents("train"))
    (tmp_path / "all.json").write_text('[{"text": "a"}, {"text": "b"}]' + " \r\n" * 2**20)
    texts = [d.text for split in ("train", "heldout") for d in open_source(f"files@{tmp_path}").documents(split)]
    assert sorted(texts) == ["a", "b"]


def test_upper_case_suffixes_are_decompressed_too(tmp_path):
    line = json.dumps({"text": "row"}).encode()
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(line))
    (tmp_path / "B.JSON.Gz").write_bytes(gzip.compress(b"[%s]" % line))
    (tmp_path / "C.TXT.ZST").write_bytes(pyarrow.compress(b"text", "zstd", asbytes=True))
    (tmp_path / "D.TXT").write_text("plain")
    texts = [document.text for document in open_source(f"files@{tmp_path}", holdout=0.0).documents("train")]
    assert texts == ["row", "row", "text", "plain"]


def test_what_lies_beside_is_read_or_named(tmp_path, write_jsonl):
    """`a.jsonl`, `b.jsonl.gz` and `c.json` are read; a file that is not is named with its kind."""
    write_jsonl([{"text": "one"}], "a.jsonl")
    root = tmp_path / "corpus"
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (root / "c.json").write_text(json.dumps([{"text": f"row {i}"} for i in range(1000)]))
    table = pyarrow.table({"text": ["arrow"]})
    with pyarrow.OSFile(str(root / "d.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "state.json").write_text("{}")  # what `datasets` writes beside the data
    (root / "notes.md").write_text("x")
    texts = [d.text for d in _read(_open(tmp_path))]
    assert texts == ["one", "two", *(f"row {i}" for i in range(1000)), "arrow"]
    assert _open(tmp_path).other_files() == {".md": 1}


def test_large_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3f.data.sources.adapters.readers.TEXT_PART_BYTES", 100)
    path = tmp_path / "corpus" / "x.txt"
    path.parent.mkdir()
    content = "".join(f"zeile é {i}\n" for i in range(100)) + "end"
    path.write_text(content)
    documents = _read(_open(tmp_path))
    assert "".join(d.text for d in documents) == content
    assert len(documents) > 8
    assert all(d.text.endswith("\n") for d in documents[:-1])
    line = 1 + documents[0].text.count("\n")
    assert documents[1].name == f"{path}:{line}"
    path.write_bytes(content.encode() + b"\xff")
    with pytest.raises(UserError, match=f"x.txt is not UTF-8 at byte {len(content.encode())}: convert"):
        _read(_open(tmp_path))


def test_null_and_empty_rows_are_counted(tmp_path, write_jsonl, write_parquet):
    write_jsonl([{"text": None}, {"text": ""}, {"text": "a"}])
    write_parquet({"text": ["b", None, "", "c"]})
    (tmp_path / "corpus" / "empty.txt").write_text("")
    counts = Counter()
    assert [d.text for d in _read(_open(tmp_path), counts=counts)] == ["a", "b", "c"]
    assert counts == {"empty_rows": 4, "empty_shards": 1}


def test_split_is_by_text_disjoint_and_stable(tmp_path, write_jsonl):
    rows = [{"text": f"document {i % 150}"} for i in range(300)]  # each text twice
    write_jsonl(rows)
    source = _open(tmp_path, holdout=0.2)
    train, heldout = ([d.text for d in _read(source, split)] for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(row["text"] for row in rows)
    assert not set(train) & set(heldout)
    assert 15 <= len(set(heldout)) <= 45  # 30 expected, standard deviation 4.9
    assert heldout[:3] == ["document 15", "document 26", "document 27"]  # the same on every machine


def test_fingerprint_follows_files_and_options(tmp_path, write_jsonl):
    path = write_jsonl([{"text": "a"}])
    seen = [_open(tmp_path).fingerprint("train")]
    assert _open(tmp_path).fingerprint("train") == seen[0]
    seen.append(_open(tmp_path).fingerprint("heldout"))
    seen.append(_open(tmp_path, text_key="body").fingerprint("train"))
    seen.append(_open(tmp_path, holdout=0.5).fingerprint("train"))
    os.utime(path, ns=(1, 1))
    seen.append(_open(tmp_path).fingerprint("train"))
    path.rename(path.with_name("other.jsonl"))
    seen.append(_open(tmp_path).fingerprint("train"))
    assert len(set(seen)) == 6


@pytest.mark.parametrize(
    "mixture, hint",
    [
        ("embeded", "did you mean 'embedded'?"),
        ("file@x", "did you mean 'files'?"),
        ("c4", "there are 'embedded', 'reasoning' and 'files@DIR'"),
        ("resoning", "did you mean 'reasoning'?"),
        ("embedded@x", "did you mean 'embedded'?"),
    ],
)
def test_unknown_mixture(mixture, hint):
    with pytest.raises(UserError) as error:
        open_source(mixture)
    assert str(error.value).startswith(f"Unknown config.data.mixture {mixture!r}")
    assert hint in str(error.value)


def test_directory_errors(tmp_path):
    with pytest.raises(UserError, match=r"There is no directory .*absent: give --config.data.mixture=files@DIR"):
        open_source(f"files@{tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"No .txt, .*, .parquet, .arrow, .jsonl, .* file lies below"):
        open_source(f"files@{tmp_path}")
    file = tmp_path / "x.txt"
    file.write_text("a")
    with pytest.raises(UserError, match=f"x.txt is a file: give .* --config.data.mixture=files@{tmp_path}"):
        open_source(f"files@{file}")
    for mixture, root in (("files", ""), ("files@", ""), (f"files@{tmp_path}", str(tmp_path))):
        with pytest.raises(UserError, match=r"must name one directory: write --config.data.mixture=files@DIR"):
            open_source(mixture, root=root)
    for holdout in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"data.holdout is {holdout}: give a share"):
            open_source("embedded", holdout=holdout)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"x.jsonl:2 is not valid JSON \(.*\): write one object a line"),
        (b'["text"]', r"x.jsonl:2 is a JSON list: write an object with"),
        (b'{"body": "a", "id": 1}', r"x.jsonl:2 has no column 'text'; it has 'body', 'id': set --config.data.text_key"),
        (b"{}", r"x.jsonl:2 has no column 'text'; it has none"),
        (b'{"text": 5}', r"x.jsonl:2 has a int under 'text': write a string"),
        (b'{"text": "\xe9"}', r"x.jsonl:2 is not UTF-8 at byte 10 of the line"),
        (b'{"text": "ab\\ud800"}', r"x.jsonl:2 holds the lone surrogate U\+D800 under 'text': remove it"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "corpus" / "x.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        _read(_open(tmp_path))


def test_broken_text_names_the_byte(tmp_path):
    path = tmp_path / "corpus" / "x.txt"
    path.parent.mkdir()
    path.write_bytes(b"abc\n\xe9\n")
    with pytest.raises(UserError, match=r"x.txt is not UTF-8 at byte 4: convert the file to UTF-8"):
        _read(_open(tmp_path))


def test_parquet_errors(tmp_path, write_parquet):
    path = write_parquet({"body": ["a"], "id": [1]})
    with pytest.raises(UserError, match=r"rows.parquet has no column 'text'; it has 'body', 'id': set --config.data"):
        _read(_open(tmp_path))
    assert [d.text for d in _read(_open(tmp_path, text_key="body"))] == ["a"]
    with pytest.raises(UserError, match=r"rows.parquet:1 has a int under 'id'"):
        _read(_open(tmp_path, text_key="id"))
    content = path.read_bytes()
    for broken in (content[:-20], content[:3], b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"rows.parquet cannot be read after row 0 \(.+\): copy it again"):
            _read(_open(tmp_path, text_key="body"))


def test_parquet_with_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "corpus" / "x.parquet"
    path.parent.mkdir()
    column = pyarrow.array([b"fine", b"ab\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(UserError, match=r"x.parquet:2 is not UTF-8 at byte 2 of a text"):
        _read(_open(tmp_path))


def test_parquet_streams_over_row_groups(tmp_path, write_parquet, monkeypatch):
    monkeypatch.setattr("qwen3f.data.sources.adapters.tables._BATCH_ROWS", 3)
    texts = [f"row {i}" for i in range(20)]
    path = write_parquet({"text": pyarrow.array(texts, pyarrow.large_string())})
    documents = _read(_open(tmp_path))
    assert [d.text for d in documents] == texts
    assert documents[-1].name == f"{path}:20"
