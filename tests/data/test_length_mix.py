"""Documents by length: the classes' bounds, a subset read like a cache, and exact shares of tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.length_mix import DocumentSubset, of_class, parse_length_mix
from qwen3f.data.packing.concat import PackedDataset
from qwen3f.errors import UserError


def test_classes_and_their_bounds(make_cache):
    cache = make_cache([2, 4, 5, 16, 17, 40, 3])  # at T = 32: medium is over 4, long over 16
    found = {name: of_class(cache, name, 32).documents.tolist() for name in ("short", "medium", "long")}
    assert found == {"short": [0, 1, 6], "medium": [2, 3], "long": [4, 5]}
    assert of_class(make_cache([40]), "medium", 32) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_a_subset_is_a_cache_of_its_documents(make_cache, lengths, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    cache = make_cache(lengths)
    offsets = np.concatenate([[0], np.cumsum([lengths[d] for d in chosen])])
    subset = DocumentSubset(cache, np.array(chosen), offsets)
    stream = np.concatenate([cache.read(*cache.doc_offsets[[d, d + 1]]) for d in chosen])
    assert (subset.num_tokens, subset.num_docs) == (len(stream), len(chosen))
    start = data.draw(st.integers(0, len(stream) - 1))
    stop = data.draw(st.integers(start + 1, len(stream)))
    assert subset.read(start, stop).tolist() == stream[start:stop].tolist()
    if len(stream) > 4:
        other = replace(cache, shards=(stream,), doc_offsets=offsets, doc_bytes=np.ones(len(chosen), np.int64))
        for ours, theirs in zip(PackedDataset(subset, 4), PackedDataset(other, 4), strict=True):
            assert all((ours[key] == theirs[key]).all() for key in ours)


def test_parsing():
    assert parse_length_mix("") == {}
    assert parse_length_mix("long=3,medium=1") == {"long": 0.75, "medium": 0.25}
    with pytest.raises(UserError, match="names 'longest': write classes of short, medium, long"):
        parse_length_mix("longest=1")


@pytest.fixture
def corpus(tmp_path, write_jsonl, small_qwen):
    """Two sources, of which only the first has long documents; the second is the larger. About a token a character."""
    (tmp_path / "other").mkdir()
    write_jsonl([{"text": f"{n:03} " * size} for n, size in enumerate([30] * 20 + [5] * 60 + [1] * 60)])
    write_jsonl([{"text": f"{n:04} " * 6} for n in range(200)], "../other/x.jsonl")
    return DataConfig(
        mixture=f"files@{tmp_path}/corpus,files@{tmp_path}/other=3",
        holdout=0.1,
        tokenizer=str(small_qwen.path),
        cache=str(tmp_path / "cache"),
        num_threads=1,
        length_mix="long=0.75,medium=0.25",
    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_shares_of_tokens_are_exact_and_shared_within_a_class(corpus, packing):
    made = prepare(replace(corpus, packing=packing), 128, progress=False)
    first, second = made.sources
    assert made.names == (f"{first}, long", f"{first}, medium", f"{second}, medium")
    assert made.shares == (0.75, 0.0625, 0.1875)
    short = 340 - sum(cache.num_docs for cache in made.heldout.values()) - sum(p.cache.num_docs for p in made.parts)
    assert made.left_out == (f"data: {first}, {short} documents are of no class of --config.data.length_mix",)
    lengths = [np.diff(part.cache.doc_offsets) for part in made.parts]
    assert lengths[0].min() > 64
    assert all(n.min() > 16 and n.max() <= 64 for n in lengths[1:])
    places = made.train.order(np.arange(10_000), 3)
    assert (places < len(made.parts[0])).sum() == 7_500
    if packing == "concat":
        tokens = sum((made.train[i]["segments"] > 0).sum() for i in places[:400].tolist())
        assert tokens == 400 * 128  # no padding: shares of examples are shares of tokens


def test_a_class_without_documents(corpus):
    with pytest.raises(UserError, match=r"'long=1': no source has a long document at seq_len=4096"):
        prepare(replace(corpus, length_mix="long=1"), 4096, progress=False)
