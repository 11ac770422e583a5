"""`data.mixture=fineweb@DIR` reads a local copy of a text data set, through the token cache as any source."""

import os
from collections import Counter

import pytest

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.sources.adapters.registry import names
from qwen3f.data.sources.documents import Document
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError
from tests.data.sources.adapters.real_rows import ROWS, write


@pytest.mark.parametrize("name", names("pretrain"))
def test_documents_of_both_splits(name, tmp_path):
    path = write(ROWS[name], tmp_path / "data/train-0.parquet")
    write(ROWS[name], tmp_path / "data/test-0.parquet")  # the data set's own test split is never read
    source = open_source(f"{name}@{tmp_path}", holdout=0.0)
    wanted = [Document(row["text"], f"{path}:{n}") for n, row in enumerate(ROWS[name], start=1)]
    assert list(source.documents("train")) == wanted
    assert list(source.documents("heldout")) == []
    assert list(open_source(name, root=str(tmp_path), holdout=0.0).documents("train")) == wanted
    half = open_source(f"{name}@{tmp_path}", holdout=0.5)
    parts = [document for split in ("train", "heldout") for document in half.documents(split)]
    assert sorted(map(str, parts)) == sorted(map(str, wanted))


def test_what_is_left_out_and_what_is_an_error(tmp_path):
    write([{"text": None}, {"text": ""}, {"text": "a"}], tmp_path / "1.jsonl")
    write([], tmp_path / "2.jsonl.zst")
    counts = Counter()
    source = open_source(f"slimpajama@{tmp_path}", holdout=0.0)
    assert [document.text for document in source.documents("train", counts)] == ["a"]
    assert counts == {"null_values": 1, "empty_texts": 1, "empty_shards": 1}
    for line, message in (
        (b"{}", "3.jsonl:1 has no column 'text'"),
        (b'{"text": 1}', "3.jsonl:1 has a int under 'text'"),
    ):
        (tmp_path / "3.jsonl").write_bytes(line)
        with pytest.raises(UserError, match=message):
            list(source.documents("train"))


def test_fingerprint_follows_files_and_options(tmp_path):
    path = write(ROWS["pg19"], tmp_path / "train.parquet")
    seen = [open_source(f"pg19@{tmp_path}").fingerprint("train")]
    assert open_source("pg19", root=str(tmp_path)).fingerprint("train") == seen[0]
    seen.append(open_source(f"pg19@{tmp_path}").fingerprint("heldout"))
    seen.append(open_source(f"pg19@{tmp_path}", holdout=0.5).fingerprint("train"))
    seen.append(open_source(f"fineweb@{tmp_path}").fingerprint("train"))
    os.utime(path, ns=(1, 1))
    seen.append(open_source(f"pg19@{tmp_path}").fingerprint("train"))
    write(ROWS["pg19"], tmp_path / "test.parquet")  # another split: changes nothing
    assert open_source(f"pg19@{tmp_path}").fingerprint("train") == seen[-1]
    assert len(set(seen)) == 5


def test_token_cache(tmp_path, small_qwen):
    rows = [{"text": f"document {n}, the end", "meta": "m"} for n in range(40)]
    write(rows[:20], tmp_path / "copy/a.jsonl.zst")
    write(rows[20:], tmp_path / "copy/b.parquet")
    cfg = DataConfig(
        f"slimpajama@{tmp_path / 'copy'}", holdout=0.2, cache=str(tmp_path / "cache"), tokenizer=str(small_qwen.path)
    )
    corpus = prepare(cfg, seq_len=16, progress=False)
    texts, (heldout,) = set(), corpus.heldout.values()
    for cache in (corpus.train.cache, heldout):
        assert cache.num_docs > 1
        texts |= set(small_qwen.decode(cache.read(0, cache.num_tokens)).split("<|endoftext|>"))
    assert texts == {row["text"] for row in rows} | {""}
    assert corpus.train.cache.num_docs + heldout.num_docs == 40
    assert len(corpus.train) > 10


@pytest.mark.parametrize(
    "mixture, message",
    [
        ("fineweb", "data.mixture=fineweb needs a local copy: write fineweb@DIR or --config.data.root=DIR"),
        ("fineweb@absent", "There is no directory absent for fineweb"),
        ("finewbe@x", "did you mean 'fineweb'"),
        ("gsm8k@x", "Unknown config.data.mixture 'gsm8k@x'; there are .* and NAME@DIR for fineweb, slimpajama"),
    ],
)
def test_mixtures_at_fault(mixture, message):
    with pytest.raises(UserError, match=message):
        open_source(mixture)
