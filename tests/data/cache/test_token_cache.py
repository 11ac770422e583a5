"""The token cache holds exactly the tokens of its split, is published only when it is complete, and reports damage."""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.cache import build as cache_build
from qwen3f.data.cache.build import token_dtype
from qwen3f.data.cache.token_cache import TokenCache, build_or_open, open_cache, verify
from qwen3f.data.sources.registry import open_source
from qwen3f.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from qwen3f.errors import UserError

TEXTS = ["return self", "▁é\n", "", "x", "    value == 7\n" * 3]


@pytest.fixture
def small_shards(monkeypatch):
    """Close a shard once it holds at least 20 bytes (10 tokens of two bytes): TEXTS fill two shards."""
    monkeypatch.setattr(cache_build, "SHARD_BYTES", 20)


@pytest.fixture
def source(tmp_path, write_jsonl):
    write_jsonl([{"text": text} for text in TEXTS])
    return open_source(f"files@{tmp_path / 'corpus'}", holdout=0.0)


def _hidden(directory):
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


def _all(cache):
    return cache.read(0, cache.num_tokens)


def _files(cache):
    return {file.name: file.read_bytes() for file in cache.path.iterdir()}


def test_holds_tokens_offsets_bytes_and_counts(source, tokenizer, tmp_path, small_shards):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches", num_threads=2, progress=True)
    texts = [text for text in TEXTS if text]
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert [len(ids) for ids in expected] == [7, 7, 2, 28]
    assert [shard.tolist() for shard in cache.shards] == [expected[0] + expected[1], expected[2] + expected[3]]
    assert cache.starts == [0, 14, 44]
    assert all(shard.dtype == np.uint16 for shard in cache.shards)
    assert _all(cache).tolist() == [i for ids in expected for i in ids]
    assert cache.doc_offsets.dtype == cache.doc_bytes.dtype == np.int64
    assert cache.doc_offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert cache.doc_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (cache.num_docs, cache.num_tokens, cache.vocab_size) == (4, sum(map(len, expected)), 340)
    assert cache.stats == {"documents": 4, "tokens": cache.num_tokens, "bytes": 63, "empty_rows": 1}
    for ids, text in zip(expected, texts):
        assert tokenizer.decode(ids, skip_special=True) == text
    with pytest.raises(ValueError, match="read-only"):
        cache.shards[0][0] = 0
    verify(cache)
    assert _hidden(tmp_path / "caches") == []


def test_the_index_says_what_each_shard_holds(source, tokenizer, tmp_path, small_shards):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    files = _files(cache)
    index = json.loads(files.pop("index.json"))
    assert sorted(files) == ["doc_bytes.bin", "doc_offsets.bin", "tokens-00000.bin", "tokens-00001.bin"]
    for n, (shard, texts) in enumerate(zip(index["shards"], (TEXTS[:2], TEXTS[3:]), strict=True)):
        content = files[f"tokens-{n:05}.bin"]
        assert shard == {
            "documents": 2,
            "tokens": len(content) // 2,
            "text_bytes": sum(len(text.encode()) for text in texts),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    for name, record in index["arrays"].items():
        assert record == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}


def test_small_batches_threads_and_workers_give_the_same_files(
    source, tokenizer, tmp_path, monkeypatch, small_shards, forked_workers
):
    first = build_or_open(source, "train", tokenizer, tmp_path / "one", num_threads=1)
    monkeypatch.setattr(cache_build, "_BATCH_CHARS", 1)
    second = build_or_open(source, "train", tokenizer, tmp_path / "two", num_threads=2)
    assert first.path.name == second.path.name
    third = build_or_open(source, "train", tokenizer, tmp_path / "three", workers=2)
    assert _files(first) == _files(second) == _files(third)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_reading_over_shards(lengths, data):
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    offsets = np.cumsum([0, *lengths])
    shards = tuple(np.split(tokens, offsets[1:-1]))
    cache = TokenCache(Path("in-memory"), shards, offsets, np.array(lengths), vocab_size=100, stats={})
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    found = cache.read(start, stop)
    assert found.dtype == np.uint16
    assert found.tolist() == tokens[start:stop].tolist()


def test_open_shards_hold_no_descriptor(source, tokenizer, tmp_path, small_shards):
    """A process may have 1,024 open descriptors, but a terabyte of tokens has more shards than that."""
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    before = os.listdir("/proc/self/fd")
    caches = [open_cache(cache.path) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert all((_all(again) == _all(cache)).all() for again in caches)


def test_another_process_maps_the_files_itself(source, tokenizer, tmp_path, small_shards):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    pickled = pickle.dumps(cache)
    assert len(pickled) < 500
    assert _all(pickle.loads(pickled)).tolist() == _all(cache).tolist()


def test_large_vocabularies_use_four_bytes(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    (tokens,) = cache.shards
    assert tokens.dtype == np.uint32
    assert tokens[: cache.doc_offsets[1]].tolist() == [*tokenizer.encode(TEXTS[0]), tokenizer.eos_id]
    assert token_dtype(2**16) == np.uint16


def test_second_call_reads_no_document(source, tokenizer, tmp_path, monkeypatch):
    first = build_or_open(source, "train", tokenizer, tmp_path / "caches")

    def fail(*args):
        raise AssertionError("documents were read again")

    monkeypatch.setattr(type(source), "documents", fail)
    again = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert again.path == first.path
    assert _all(again).tolist() == _all(first).tolist()
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
        UserError, match=r"Empty corpus: files@.* has no document in its heldout split .*raise --config.data.holdout"
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
    with pytest.raises(UserError, match=r"z.jsonl:1 has no column 'text'"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")
    assert list((tmp_path / "caches").iterdir()) == []


def test_a_build_by_workers_that_fails_ends_them(source, tokenizer, tmp_path, write_jsonl, monkeypatch, forked_workers):
    monkeypatch.setattr(cache_build, "_BATCH_CHARS", 1)
    write_jsonl([{"wrong": "x"}], "z.jsonl")
    with pytest.raises(UserError, match=r"z.jsonl:1 has no column 'text'"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches", workers=2)
    assert multiprocessing.active_children() == []
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


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00001.bin", "doc_offsets.bin", "doc_bytes.bin"])
def test_damaged_files_are_named(source, tokenizer, tmp_path, small_shards, name):
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


def test_a_damaged_index_is_named(source, tokenizer, tmp_path, small_shards):
    cache = build_or_open(source, "train", tokenizer, tmp_path / "caches")
    file = cache.path / "index.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "stats": {**content["stats"], "tokens": 38}}))
    with pytest.raises(UserError, match=r"index.json is corrupt: delete the directory"):
        open_cache(cache.path)
    arrays = content["arrays"]
    others = [{"format": 99}, {"shards": [{}]}, {"arrays": {}}, {"arrays": {"../x": {"sha256": ""}}}]
    others += [{"arrays": {key: {} for key in arrays}}]
    for other in ({"format": 2}, *(content | changes for changes in others)):
        file.write_text(json.dumps(other))
        with pytest.raises(UserError, match="is no token cache of format 2: delete the directory"):
            open_cache(cache.path)
    wrong = [{"stats": 1}, {"shards": 1}, {"arrays": None}, {"vocab_size": None}, {"vocab_size": "x"}]
    wrong += [{"stats": {**content["stats"], "documents": n}} for n in (None, -1, 1.5, "2", [], 2**70)]
    wrong += [{"shards": [{**content["shards"][0], "tokens": n}]} for n in (None, True, 1e300)]
    for broken in ("{", "[]", '"x"', "[" * 10**5, *(json.dumps(content | changes) for changes in wrong)):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"index.json is unreadable: delete the directory"):
            open_cache(cache.path)
    file.unlink()
    with pytest.raises(UserError, match=r"index.json is unreadable: delete the directory"):
        build_or_open(source, "train", tokenizer, tmp_path / "caches")


def test_the_first_of_two_builders_wins(source, tokenizer, tmp_path, monkeypatch):
    """While one process builds, another publishes the same cache. The slower one uses that and leaves no files."""
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
    """Build with one document a batch and two a shard; hang in batch 4, when half of the second shard is written."""
    cache_build._BATCH_CHARS, cache_build.SHARD_BYTES = 1, 20
    tokenizer = SentencePieceTokenizer.load(model)
    encode, calls = tokenizer.encode_batch, []

    def hang(texts: list[str], num_threads: int) -> list[np.ndarray]:
        calls.append(1)
        if len(calls) == 4:
            (caches / "hangs").touch()
            time.sleep(60)
        return encode(texts, num_threads)

    tokenizer.encode_batch = hang
    build_or_open(open_source(corpus, holdout=0.0), "train", tokenizer, caches)


@pytest.fixture
def killed(source, tokenizer, tmp_path):
    """A directory of caches in which a build was killed.

    The build's first shard (two documents) is complete, and half of its second shard is written.
    """
    caches = tmp_path / "caches"
    arguments = (source.name, tokenizer.path, caches)
    process = multiprocessing.get_context("fork").Process(target=_build_slowly, args=arguments)
    process.start()
    deadline = time.monotonic() + 20
    while not (caches / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (caches / "hangs").unlink()
    assert len(_hidden(caches)) == 1
    assert list(caches.glob("tokens-*")) == []
    return caches


@pytest.mark.parametrize("torn", ["tokens-00001.bin", "doc_offsets.bin", "doc_bytes.bin"])
def test_a_killed_build_loses_one_shard_at_most(source, tokenizer, tmp_path, killed, monkeypatch, small_shards, torn):
    (left,) = killed.iterdir()
    first = (left / "tokens-00000.bin").stat()
    with (left / torn).open("ab") as file:
        file.write(b"half a shard")  # bytes that progress.json does not list
    seen = []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts, n: seen.extend(texts) or encode(texts, n))
    cache = build_or_open(source, "train", tokenizer, killed)
    assert seen == ["x", TEXTS[4]]  # the two documents of the first shard are not read again
    kept = (cache.path / "tokens-00000.bin").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert _files(cache) == _files(build_or_open(source, "train", tokenizer, tmp_path / "elsewhere"))
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
