"""The token cache holds exactly the split's tokens, is published whole or not at all, and notices damage."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from qwen3f.data import cache_build
from qwen3f.data.cache_files import token_dtype
from qwen3f.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from qwen3f.data.sources import open_source
from qwen3f.data.token_cache import build_or_open, open_cache, verify
from qwen3f.errors import UserError

TEXTS = ["return self", "▁é\n", "", "x", "    value == 7\n" * 3]


@pytest.fixture
def source(tmp_path, write_jsonl):
    write_jsonl([{"text": text} for text in TEXTS])
    return open_source(f"files@{tmp_path / 'corpus'}", holdout=0.0)


def _hidden(directory):
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


def test_holds_tokens_offsets_bytes_and_counts(source, tokenizer, tmp_path):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches", num_threads=2, progress=True)
    texts = [text for text in TEXTS if text]
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == [i for ids in expected for i in ids]
    assert cache.doc_offsets.dtype == cache.doc_bytes.dtype == np.int64
    assert cache.doc_offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert cache.doc_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (cache.num_docs, cache.num_tokens, cache.vocab_size) == (4, sum(map(len, expected)), 340)
    assert cache.stats == {"documents": 4, "tokens": cache.num_tokens, "bytes": 63, "empty_rows": 1}
    for d, text in enumerate(texts):
        ids = cache.tokens[cache.doc_offsets[d] : cache.doc_offsets[d + 1]].tolist()
        assert tokenizer.decode(ids, skip_special=True) == text
    with pytest.raises(ValueError, match="read-only"):
        cache.tokens[0] = 0
    verify(cache)
    assert _hidden(tmp_path / "caches") == []


def test_small_batches_and_threads_give_the_same_files(source, tokenizer, tmp_path, monkeypatch):
    first = build_or_open(source, "train", tokenizer, tmp_path / "one", num_threads=1)
    monkeypatch.setattr(cache_build, "_BATCH_CHARS", 1)
    second = build_or_open(source, "train", tokenizer, tmp_path / "two", num_threads=2)
    assert first.path.name == second.path.name
    for file in first.path.iterdir():
        assert file.read_bytes() == (second.path / file.name).read_bytes()


def test_large_vocabularies_use_four_bytes(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens[: cache.doc_offsets[1]].tolist() == [*tokenizer.encode(TEXTS[0]), tokenizer.eos_id]
    assert token_dtype(2**16) == np.uint16


def test_second_call_reads_no_document(source, tokenizer, tmp_path, monkeypatch):
    first = build_or_open(source, "train", tokenizer, tmp_path / "caches")

    def fail(*args):
        raise AssertionError("documents were read again")

    monkeypatch.setattr(type(source), "documents", fail)
    again = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert again.path == first.path
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.stats == first.stats


def test_another_source_split_or_tokenizer_is_another_cache(source, tokenizer, tmp_path, write_jsonl, code_texts):
    caches = tmp_path / "caches"
    paths = {build_or_open(source, "train", tokenizer, caches).path}
    other = train_sentencepiece(code_texts, 330, tmp_path / "other.model")
    paths.add(build_or_open(source, "train", other, caches).path)
    all_held_out = open_source(f"files@{tmp_path / 'corpus'}", holdout=0.999999)
    paths.add(build_or_open(all_held_out, "heldout", tokenizer, caches).path)
    write_jsonl([{"text": "new"}], "more.jsonl")
    changed = build_or_open(source, "train", tokenizer, caches)
    assert changed.num_docs == 5
    assert len({*paths, changed.path}) == 4


def test_empty_split_is_refused_and_leaves_nothing(source, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"Empty corpus: files@.* has no document in its heldout split .*raise data.holdout"
    ):
        build_or_open(source, "heldout", tokenizer, tmp_path / "caches")
    assert list((tmp_path / "caches").iterdir()) == []


def test_a_corpus_of_empty_rows_says_so(tmp_path, write_jsonl, tokenizer):
    write_jsonl([{"text": ""}, {"text": None}])
    source = open_source(f"files@{tmp_path / 'corpus'}")
    with pytest.raises(UserError, match=r"no document in its train split \(left out: 2 empty_rows\)"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")


def test_a_broken_source_leaves_nothing(source, tokenizer, tmp_path, write_jsonl):
    write_jsonl([{"wrong": "x"}], "z.jsonl")
    with pytest.raises(UserError, match=r"z.jsonl:1 has no key 'text'"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert list((tmp_path / "caches").iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_refused(source, tokenizer, tmp_path, write_jsonl, monkeypatch):
    encode = tokenizer.encode_batch

    def interfere(texts, num_threads):
        write_jsonl([{"text": "late"}], "late.jsonl")
        return encode(texts, num_threads)

    monkeypatch.setattr(tokenizer, "encode_batch", interfere)
    with pytest.raises(UserError, match=r"changed while they were tokenised: run again"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert list((tmp_path / "caches").iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.bin", "doc_offsets.bin", "doc_bytes.bin"])
def test_damaged_arrays_are_named(source, tokenizer, tmp_path, name):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    file = cache.path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}: delete the dir"
    ):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if name == "doc_offsets.bin":
        with pytest.raises(UserError, match=r"doc_offsets.bin is corrupt"):
            open_cache(cache.path)
    else:
        with pytest.raises(UserError, match=rf"{name} is corrupt \(sha256 differs\)"):
            verify(open_cache(cache.path))
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        open_cache(cache.path)


def test_damaged_meta_is_named(source, tokenizer, tmp_path):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    meta = cache.path / "meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match="is no token cache of format 1: delete the directory"):
        open_cache(cache.path)
    meta.write_text('{"format": 1}')
    with pytest.raises(UserError, match="is no token cache of format 1: delete the directory"):
        open_cache(cache.path)
    for broken in ("{", "[]", '"x"', '{"format": 1, "vocab_size": 1, "files": 1, "stats": 1}'):
        meta.write_text(broken)
        with pytest.raises(UserError, match=r"meta.json is unreadable: delete the directory"):
            open_cache(cache.path)
    meta.unlink()
    with pytest.raises(UserError, match=r"meta.json is unreadable: delete the directory"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")


def test_the_first_of_two_builders_wins(source, tokenizer, tmp_path, monkeypatch):
    """While one process builds, another publishes: the slower one uses what is there and leaves no litter."""
    caches = tmp_path / "caches"
    publish = cache_build._publish

    def publish_second(temporary, path):
        if not path.exists():
            publish_first = build_or_open(source, "train", tokenizer, tmp_path / "elsewhere")
            os.rename(publish_first.path, path)
            (path / "first").touch()
        publish(temporary, path)

    def only_once(temporary, path):
        monkeypatch.setattr(cache_build, "_publish", publish)
        publish_second(temporary, path)

    monkeypatch.setattr(cache_build, "_publish", only_once)
    cache = build_or_open(source, "train", tokenizer, caches)
    assert (cache.path / "first").exists()
    assert [p.name for p in caches.iterdir()] == [cache.path.name]


def _build_slowly(corpus: str, model: Path, caches: Path) -> None:
    """Two documents a batch; hangs in the second."""
    cache_build._BATCH_CHARS = 12
    tokenizer = SentencePieceTokenizer.load(model)
    encode, calls = tokenizer.encode_batch, []

    def hang(texts: list[str], num_threads: int) -> list[np.ndarray]:
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        return encode(texts, num_threads)

    tokenizer.encode_batch = hang
    build_or_open(open_source(corpus, holdout=0.0), "train", tokenizer, caches)


@pytest.fixture
def killed(source, tokenizer, tmp_path):
    """The directory of caches in which a build was killed after its first batch, two documents."""
    caches = tmp_path / "caches"
    arguments = (source.name, tokenizer.path, caches)
    process = multiprocessing.get_context("fork").Process(target=_build_slowly, args=arguments)
    process.start()
    deadline = time.monotonic() + 20
    while not (caches.is_dir() and any(caches.glob(".building-*/progress.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(_hidden(caches)) == 1
    assert list(caches.glob("tokens-*")) == []
    return caches


def test_a_killed_build_is_gone_on_with(source, tokenizer, tmp_path, killed, monkeypatch):
    (left,) = killed.iterdir()
    with (left / "tokens.bin").open("ab") as file:
        file.write(b"half a batch")  # written, but not recorded
    seen = []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts, n: seen.extend(texts) or encode(texts, n))
    cache = build_or_open(source, "train", tokenizer, killed)
    assert seen == ["x", TEXTS[4]]  # not the first two again
    monkeypatch.undo()
    whole = build_or_open(source, "train", tokenizer, tmp_path / "elsewhere")
    for file in whole.path.iterdir():
        assert file.read_bytes() == (cache.path / file.name).read_bytes()
    verify(cache)
    assert [p.name for p in killed.iterdir()] == [cache.path.name]


def test_a_build_of_another_cache_or_one_that_runs_is_left_alone(source, tokenizer, killed, code_texts, tmp_path):
    (left,) = killed.iterdir()
    other = train_sentencepiece(code_texts, 330, tmp_path / "other.model")
    build_or_open(source, "train", other, killed)
    assert left.is_dir()
    lock = cache_build._lock(left)
    assert build_or_open(source, "train", tokenizer, killed).num_docs == 4
    assert left.is_dir()
    os.close(lock)
