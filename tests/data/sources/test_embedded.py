"""The standard library as a corpus: what is read, what is dropped, how it is split."""

import os
from collections import Counter

import pytest

from qwen3f.data.sources.embedded import SHINGLE_LINES, open_embedded, shingles
from qwen3f.errors import UserError


def _lines(prefix, count):
    return "".join(f"{prefix}_{i} = {i}\n" for i in range(count))


def _write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _names(source):
    return {split: [d.name for d in source.documents(split)] for split in ("train", "heldout")}


def test_reads_python_files_below_root_in_order(tmp_path):
    _write(
        tmp_path,
        {
            "b.py": b"\xef\xbb\xbfb = 1\r\n",
            "a/z.py": "z = 2\n",
            "a.py": "é = '▁'\n",
            "a/data.txt": "no",
            "site-packages/x.py": "x = 1\n",
            "a/tests/t.py": "t = 1\n",
            "a/__pycache__/y.py": "y = 1\n",
            "latin.py": b"# \xe9\n",
            "empty.py": " \n\n",
        },
    )
    source = open_embedded(str(tmp_path), holdout=0.0)
    counts = Counter()
    documents = list(source.documents("train", counts))
    assert [(d.name, d.text) for d in documents] == [
        ("a.py", "é = '▁'\n"),
        ("a/z.py", "z = 2\n"),
        ("b.py", "b = 1\n"),  # CR LF is one line end; the byte order mark is no text
    ]
    assert counts == {"near_duplicate_files": 0, "undecodable_files": 1, "empty_files": 1}
    assert list(source.documents("heldout")) == []


def test_near_duplicates_are_dropped_whichever_comes_first(tmp_path):
    _write(
        tmp_path,
        {
            "big.py": _lines("big", 60) + _lines("shared", 40),
            "a_part_of_big.py": _lines("shared", 40),
            "reindented.py": _lines("big", 50).replace("big", "  big").replace("\n", "\n\n"),
            "mostly_new.py": _lines("new", 30) + _lines("shared", 20),
            "mostly_old.py": _lines("other", 15) + _lines("shared", 25),
            "half_old.py": _lines("half", 9) + _lines("shared", 13),  # 9 of 18 shingles
            "tiny.py": "x = 1\n",
            "tiny_copy.py": "x = 1\n",
        },
    )
    source = open_embedded(str(tmp_path), holdout=0.0)
    counts = Counter()
    assert [d.name for d in source.documents("train", counts)] == ["big.py", "mostly_new.py", "tiny.py"]
    assert counts["near_duplicate_files"] == 5


def test_shingles_are_runs_of_lines():
    text = _lines("x", 10).encode()
    assert len(shingles(text)) == 10 - SHINGLE_LINES + 1
    assert shingles(b"a\nb\nc\nd\ne\n") == shingles(b"  a\n\n\tb\r\nc\nd\ne")
    assert not shingles(b"a\nb\nc\nd\ne\n") & shingles(b"b\na\nc\nd\ne\n")  # order matters
    assert not shingles(b"\n \n")


def test_split_is_by_file_disjoint_and_stable(tmp_path):
    _write(tmp_path, {f"m{i}.py": _lines(f"m{i}", 6) for i in range(200)})
    names = _names(open_embedded(str(tmp_path), holdout=0.25))
    assert sorted(names["train"] + names["heldout"]) == sorted(f"m{i}.py" for i in range(200))
    assert 30 <= len(names["heldout"]) <= 70  # 50 expected, standard deviation 6.1
    assert names["heldout"][:3] == ["m1.py", "m101.py", "m105.py"]  # the same on every machine
    (tmp_path / "zzz.py").write_text("another = 1\n")
    again = _names(open_embedded(str(tmp_path), holdout=0.25))
    assert [n for n in again["heldout"] if n != "zzz.py"] == names["heldout"]


def test_fingerprint_follows_files_and_options(tmp_path):
    _write(tmp_path, {"a.py": "a = 1\n", "b.py": "b = 1\n"})
    seen = [open_embedded(str(tmp_path), 0.1).fingerprint("train")]
    assert open_embedded(str(tmp_path), 0.1).fingerprint("train") == seen[0]
    seen.append(open_embedded(str(tmp_path), 0.1).fingerprint("heldout"))
    seen.append(open_embedded(str(tmp_path), 0.2).fingerprint("train"))
    os.utime(tmp_path / "a.py", ns=(1, 1))
    seen.append(open_embedded(str(tmp_path), 0.1).fingerprint("train"))
    (tmp_path / "c.py").write_text("c")
    seen.append(open_embedded(str(tmp_path), 0.1).fingerprint("train"))
    assert len(set(seen)) == 5


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"found no directory .*absent"):
        open_embedded(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"found no \*.py file below"):
        open_embedded(str(tmp_path))


def test_the_real_standard_library_is_there():
    source = open_embedded()
    heldout = list(source.documents("heldout"))
    assert 3 < len(heldout) < 150
    train = {d.name for d in source.documents("train")}
    assert {"argparse.py", "json/decoder.py"} <= train | {d.name for d in heldout}
    assert not train & {d.name for d in heldout}
    assert not any("site-packages" in name for name in train)
