"""A cache of chats stores for each token whether it is trained. Shards, threads, workers and kills change no bit."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.cache import build as cache_build
from qwen3f.data.cache.token_cache import build_or_open, open_cache, verify
from qwen3f.data.chat.samples import Sample
from qwen3f.data.chat.sources import open_chats
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.errors import UserError
from tests.data.chat.conversations import answer, user

ROWS = [
    {"messages": [user("a"), answer("b" * n), user(f"{n}"), answer("é" * (n % 7 + 1), "t" * n)]} for n in range(1, 25)
]


@pytest.fixture
def source(tmp_path, write_jsonl):
    write_jsonl(ROWS)
    return open_chats(f"chats@{tmp_path / 'corpus'}", "", ReasoningSource())


@pytest.fixture
def small_shards(monkeypatch):
    """Close a shard once it holds at least 300 bytes (150 tokens of two bytes)."""
    monkeypatch.setattr(cache_build, "SHARD_BYTES", 300)


def _files(cache):
    return {file.name: file.read_bytes() for file in cache.path.iterdir()}


def _expected(source, tokenizer):
    return Sample.tokenise(list(source.documents("train")), tokenizer, 1)


def test_holds_the_ids_and_bits_of_every_sample(source, small_qwen, tmp_path, small_shards):
    cache = build_or_open(source, "train", small_qwen, tmp_path / "caches")
    ids, trained = _expected(source, small_qwen)
    assert cache.has_trained
    assert len(cache.trained) == len(cache.shards) > 5
    assert cache.num_docs == len(ids) > 40
    for number, (start, stop) in enumerate(zip(cache.doc_offsets, cache.doc_offsets[1:])):
        assert cache.read(start, stop).tolist() == ids[number].tolist()
        assert cache.read_trained(start, stop).tolist() == trained[number].tolist()
    bits = np.concatenate(trained)
    found = cache.read_trained(0, cache.num_tokens)
    assert (found == bits).all()
    assert found.dtype == bool
    assert cache.stats == {
        "documents": len(ids),
        "tokens": len(bits),
        "bytes": sum(len(sample.text.encode()) for sample in source.documents("train")),
        "trained_tokens": int(bits.sum()),
    }
    verify(cache)


def test_a_bit_a_token_and_its_checksum(source, small_qwen, tmp_path, small_shards):
    cache = build_or_open(source, "train", small_qwen, tmp_path / "caches")
    files = _files(cache)
    index = json.loads(files["index.json"])
    assert index["format"] == 2  # trained bits did not raise the number: caches of text have the same format
    start = 0
    for n, shard in enumerate(index["shards"]):
        content = files[f"trained-{n:05}.bin"]
        assert len(content) == -(-shard["tokens"] // 8)
        assert shard["trained"] == {
            "tokens": int(cache.read_trained(start, start + shard["tokens"]).sum()),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        start += shard["tokens"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=21), min_size=1, max_size=8), st.data())
def test_reading_over_shards_and_bytes(make_chat_cache, trained, data):
    cache = make_chat_cache(trained)
    bits = [bit for document in trained for bit in document]
    start = data.draw(st.integers(0, len(bits) - 1))
    stop = data.draw(st.integers(start + 1, len(bits)))
    assert cache.read_trained(start, stop).tolist() == bits[start:stop]


def test_of_a_text_every_token_is_trained(make_cache):
    cache = make_cache([3, 4])
    assert not cache.has_trained
    assert cache.read_trained(1, 5).tolist() == [True] * 4


def test_threads_and_workers_give_the_same_files(
    source, small_qwen, tmp_path, monkeypatch, small_shards, forked_workers
):
    first = build_or_open(source, "train", small_qwen, tmp_path / "one")
    monkeypatch.setattr(cache_build, "_BATCH_CHARS", 1)
    second = build_or_open(source, "train", small_qwen, tmp_path / "two", num_threads=2)
    third = build_or_open(source, "train", small_qwen, tmp_path / "three", workers=2)
    assert _files(first) == _files(second) == _files(third)


def test_damage_is_named(source, small_qwen, tmp_path, small_shards):
    cache = build_or_open(source, "train", small_qwen, tmp_path / "caches")
    file = cache.path / "trained-00001.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"trained-00001.bin has {len(content) - 1} bytes instead of {len(content)}"):
        open_cache(cache.path)
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=r"trained-00001.bin is corrupt \(sha256 differs\)"):
        verify(open_cache(cache.path))
    index = json.loads((cache.path / "index.json").read_bytes())
    del index["shards"][1]["trained"]
    (cache.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json is corrupt: delete the directory"):
        open_cache(cache.path)


def _build_slowly(corpus: str, tokenizer: Path, caches: Path) -> None:
    """Build with one document a batch; hang in the twentieth batch, when a part of a shard is written."""
    cache_build._BATCH_CHARS, cache_build.SHARD_BYTES = 1, 300
    opened = QwenTokenizer.load(tokenizer)
    encode, calls = opened.encode_segments_batch, []

    def hang(*arguments: object) -> list[np.ndarray]:
        calls.append(1)
        if len(calls) == 20:
            (caches / "hangs").touch()
            time.sleep(60)
        return encode(*arguments)

    opened.encode_segments_batch = hang
    build_or_open(open_chats(corpus, "", ReasoningSource()), "train", opened, caches)


def test_a_build_that_was_killed_keeps_the_bits_of_its_shards(source, small_qwen, tmp_path, small_shards):
    caches = tmp_path / "caches"
    process = multiprocessing.get_context("fork").Process(
        target=_build_slowly, args=(source.name, small_qwen.path, caches)
    )
    process.start()
    deadline = time.monotonic() + 20
    while not (caches / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (caches / "hangs").unlink()
    (left,) = caches.iterdir()
    done = json.loads((left / "progress.json").read_bytes())
    assert len(done) >= 2
    for n in (len(done), len(done) + 1):  # files of shards that progress.json does not list are written anew
        (left / f"trained-{n:05}.bin").write_bytes(b"half a shard")
    before = (left / "trained-00000.bin").stat()
    cache = build_or_open(source, "train", small_qwen, caches)
    after = (cache.path / "trained-00000.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    verify(cache)
    assert _files(cache) == _files(build_or_open(source, "train", small_qwen, tmp_path / "elsewhere"))
    assert (cache.read_trained(0, cache.num_tokens) == np.concatenate(_expected(source, small_qwen)[1])).all()
