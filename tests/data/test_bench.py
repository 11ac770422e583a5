"""The benchmark's parts run and print a figure each; the figures themselves are in qwen3f/data/README.md."""

import re

import pytest

from qwen3f.data import bench


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "_SEQ_LEN", 32)
    monkeypatch.setattr(bench, "_ROWS", 4)
    monkeypatch.setattr(bench, "_HOLDOUT", 0.2)


def test_tokenise(small_qwen, code_texts):
    lines = list(bench.tokenise(str(small_qwen.path), code_texts))
    assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == [
        f"tokenise and pack by {packing}: N (N) MB/s the first time, then N (N)" for packing in ("concat", "best_fit")
    ]


def test_cache(small_qwen, code_texts, forked_workers):
    lines = list(bench.cache(str(small_qwen.path), code_texts, shards=2, batches=2))
    numbers = r"[\d.]+ \([\d.]+\)"
    size = "0M tokens in 1 shard"
    assert [
        re.fullmatch(pattern, line) is not None
        for line, pattern in zip(
            lines,
            [
                *[
                    rf"build a cache of {size}, {threads}: {numbers} MB/s, peak \d+ MB"
                    for threads in ("1 thread", "1 thread", "2 threads", "2 worker processes")
                ],
                rf"read a cache of {size} into batches, 1 thread: {numbers}M tokens/s",
                rf"read a cache of {size} into batches, 2 worker processes: {numbers}M tokens/s",
            ],
            strict=True,
        )
    ] == [True] * 6


def test_stream(small_qwen, code_texts):
    """The state for four files is as long as for one, within 10 characters."""
    peaks = [line for shards in (1, 4) for line in bench.stream(str(small_qwen.path), code_texts, shards)]
    found = [re.search(r"stream (\d) shards: .*M tokens/s; peak \d+ MB .*; the state is (\d+) char", p) for p in peaks]
    assert [match[1] for match in found] == ["1", "4"]
    assert abs(int(found[0][2]) - int(found[1][2])) < 10
