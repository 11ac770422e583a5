"""The command that checks token caches names each damaged file, and prints what each intact cache holds."""

import pytest

from qwen3f.data.cache import build as cache_build
from qwen3f.data.cache import check as check_cache
from qwen3f.data.cache.token_cache import build_or_open
from qwen3f.data.sources.registry import open_source


@pytest.fixture
def caches(tmp_path, write_jsonl, tokenizer, code_texts, monkeypatch):
    """The caches of both splits, [heldout, train], in one directory; the training cache has several shards."""
    monkeypatch.setattr(cache_build, "SHARD_BYTES", 1000)
    write_jsonl([{"text": text} for text in code_texts])
    source = open_source(f"files@{tmp_path / 'corpus'}", holdout=0.3)
    return [build_or_open(source, split, tokenizer, tmp_path / "caches") for split in ("heldout", "train")]


def test_says_what_each_cache_holds(caches, capsys):
    assert len(caches[1].shards) > 2
    assert check_cache.main(["check_cache", str(caches[0].path.parent)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"{cache.path}: {cache.num_tokens:,} tokens in {cache.num_docs} documents, shards: {len(cache.shards)}, every "
        "checksum as written"
        for cache in caches
    ]


def test_names_a_shard_with_one_bit_changed(caches, capsys):
    path = caches[1].path / "tokens-00001.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert check_cache.main(["check_cache", str(caches[0].path.parent)]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {path} is corrupt (sha256 differs): delete the directory {path.parent}.\n"
    assert out.count("every checksum as written") == 1
