"""From a configuration to examples and held-out text, with the tokenizer and both caches reused."""

import argparse
import dataclasses
import gzip
import inspect

import numpy as np
import pytest

from qwen3f.data import corpus as module
from qwen3f.data.corpus import DataConfig, cache_directory, gzip_bits_per_byte, prepare
from qwen3f.data.loader import build_batch
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError


@pytest.fixture
def config(tmp_path, write_jsonl, code_texts):
    write_jsonl([{"text": text} for text in code_texts])
    return DataConfig(
        mixture=f"files@{tmp_path / 'corpus'}",
        holdout=0.3,
        cache=str(tmp_path / "cache"),
        vocab_size=350,
        num_threads=1,
    )


def test_prepare_end_to_end(config, code_texts, capfd):
    corpus = prepare(config, seq_len=16, progress=False)
    assert capfd.readouterr() == ("", "")
    assert corpus.tokenizer.vocab_size == 350
    (source,), (heldout,) = corpus.sources.values(), corpus.heldout.values()
    heldout_texts = [d.text for d in source.documents("heldout")]
    assert 0 < len(heldout_texts) < 25
    assert heldout.num_docs == len(heldout_texts)
    assert heldout.num_docs + corpus.train.cache.num_docs == len(code_texts)
    text = corpus.tokenizer.decode(heldout.read(0, heldout.num_tokens).tolist(), skip_special=True)
    assert text == "".join(heldout_texts)
    first = corpus.train[0]
    train_text = next(source.documents("train")).text
    assert train_text.startswith(corpus.tokenizer.decode(first["tokens"].tolist()))
    assert first["tokens"].shape == (16,)


def test_prepare_again_trains_and_tokenises_nothing(config, monkeypatch):
    first = prepare(config, 16, progress=False)

    def fail(*args, **kwargs):
        raise AssertionError("worked again")

    monkeypatch.setattr(module, "train_sentencepiece", fail)
    monkeypatch.setattr(type(first.sources[config.mixture]), "documents", fail)
    again = prepare(config, 32, progress=False)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.train.cache.path == first.train.cache.path


def test_the_tokenizer_never_sees_heldout_text(config, monkeypatch):
    seen = []
    train = module.train_sentencepiece

    def spy(texts, *args):
        texts = list(texts)
        seen.extend(texts)
        return train(texts, *args)

    monkeypatch.setattr(module, "train_sentencepiece", spy)
    corpus = prepare(config, 16, progress=False)
    assert seen == [d.text for d in corpus.sources[config.mixture].documents("train")]


def test_options_reach_the_dataset(config, tokenizer):
    config = DataConfig(**{**vars(config), "reset_positions": False, "cross_documents": True})
    corpus = prepare(config, 16, progress=False)
    assert (corpus.train.reset_positions, corpus.train.cross_documents) == (False, True)
    given = DataConfig(**{**vars(config), "tokenizer": str(tokenizer.path)})
    assert prepare(given, 16, progress=False).tokenizer.fingerprint == tokenizer.fingerprint


def test_two_vocabulary_sizes_live_side_by_side(config):
    other = DataConfig(**{**vars(config), "vocab_size": 360})
    assert prepare(config, 16, progress=False).tokenizer.vocab_size == 350
    assert prepare(other, 16, progress=False).tokenizer.vocab_size == 360
    assert prepare(config, 16, progress=False).tokenizer.vocab_size == 350


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mixture": "embedd"}, "did you mean 'embedded'"),
        ({"tokenizer": "/absent.model"}, "no tokenizer at /absent.model"),
        ({"holdout": 0.0}, "no document in its heldout split.*raise --config.data.holdout"),
        ({"vocab_size": 10**6}, "set model.vocab_size to"),
        ({"num_threads": 0}, "data.num_threads is 0: give at least 1"),
        ({"text_key": "body"}, r"rows.jsonl:1 has no column 'body'; it has 'text'"),
    ],
)
def test_user_errors(config, change, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**{**vars(config), **change}), 16, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packing": "best"}, "data.packing is 'best': write one of concat, best_fit"),
        (
            {"packing": "best_fit", "cross_documents": True},
            "keeps documents apart: write --config.data.cross_documents=False",
        ),
        ({"packing": "best_fit", "long_documents": "x"}, "long_documents is 'x': write one of cut, drop"),
        ({"max_samples": -1}, "data.max_samples is -1: give 0 or more"),
        ({"workers": -2}, "data.workers is -2"),
        ({"shuffle_buffer": 9}, "data.shuffle_buffer is for streams"),
        (
            {"streaming": True, "temperature": 1.0},
            "counts of a cache: write --config.data.streaming=False or --config.data.temperature=0.0",
        ),
        ({"streaming": True, "length_mix": "long=1"}, "data.streaming=False or --config.data.length_mix=''"),
        ({"streaming": True, "max_epochs": "1.5"}, "max_epochs='1.5': a stream is read whole; write whole numbers"),
        ({"max_epochs": "fineweb=1"}, "names 'fineweb', which is not in the mixture"),
        ({"length_mix": "huge=1"}, "names 'huge': write classes"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_settings_that_cannot_work(config, change, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**{**vars(config), **change}), 16, progress=False)


def test_max_samples_and_best_fit(config, code_texts):
    whole = prepare(config, 16, progress=False)
    (name,) = whole.names
    few = prepare(DataConfig(**{**vars(config), "max_samples": 5, "packing": "best_fit"}), 64, progress=False)
    assert few.train.cache.num_docs == 5 == few.heldout[name].num_docs
    text = few.tokenizer.decode(few.train.cache.read(0, few.train.cache.num_tokens).tolist(), skip_special=True)
    assert text == "".join(d.text for d in whole.sources[name].documents("train"))[: len(text)]
    line, held_out = few.describe()
    padding = np.mean([(few.train[i]["segments"] == 0).mean() for i in range(len(few.train))])
    assert line.endswith(f"in 5 documents to train on; {len(few.train)} examples, {padding:.2%} padding")
    assert held_out.endswith("in 5 documents held out")
    batch = build_batch(few.train, 0, np.arange(2), 0, 350)
    assert few.train_metrics(batch) == {"padding": pytest.approx((batch["segments"] == 0).float().mean().item())}
    assert whole.train_metrics(build_batch(whole.train, 0, np.arange(2), 0, 350)) == {}


def test_what_is_left_out_is_said(config, write_jsonl):
    long = [f"word{n} " * 400 for n in range(9)]
    write_jsonl([{"text": text} for text in ("", None, *long)], "more.jsonl")
    config = DataConfig(**{**vars(config), "packing": "best_fit", "long_documents": "drop"})
    corpus = prepare(config, 128, progress=False)
    train = [d.text for d in corpus.sources[config.mixture].documents("train")]
    _, dropped, empty, _ = corpus.describe()
    assert (
        f", {len(set(long) & set(train))} documents longer than seq_len are dropped (--config.data.long_docum"
        in dropped
    )
    assert empty.endswith(", left out while reading both splits: 2 empty_rows")


def test_caps_of_epochs_end_the_run_before_it_begins(config):
    corpus = prepare(DataConfig(**{**vars(config), "max_epochs": "2"}), 16, progress=False)
    examples = 2 * len(corpus.parts[0])
    corpus.check_covers(examples, seed=0)
    assert sorted(corpus.train.order(np.arange(examples), 0)) == sorted([*range(len(corpus.parts[0]))] * 2)
    with pytest.raises(
        UserError, match=rf"leaves {examples} examples and the run needs {examples + 1} up to its last step"
    ):
        corpus.check_covers(examples + 1, seed=0)


def test_a_stream_holds_out_its_first_documents_and_reads_the_rest(config, monkeypatch):
    monkeypatch.setattr(module, "STREAM_HELDOUT_DOCUMENTS", 3)
    corpus = prepare(DataConfig(**{**vars(config), "streaming": True, "shuffle_buffer": 8}), 16, progress=False)
    (source,) = corpus.sources.values()
    assert [cache.num_docs for cache in corpus.heldout.values()] == [3]
    assert len(list(source.documents("heldout"))) == 3
    assert corpus.describe()[0].endswith("streamed")
    documents = {d.text for d in open_source(config.mixture, holdout=0.3).documents("train")}
    text = ""
    for _, (make, _) in zip(range(200), corpus.train.examples(0)):
        text += corpus.tokenizer.decode(make(0)["tokens"].tolist())
    assert {part for part in text.split("<|endoftext|>")[:-1]} == documents
    assert corpus.train_metrics({}) == {}
    corpus.check_covers(10**9, seed=0)


def test_corpus_shorter_than_an_example(config):
    with pytest.raises(UserError, match=r"fewer than one example of seq_len=1000000 needs"):
        prepare(config, 10**6, progress=False)


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "qwen3f"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "qwen3f"
    assert cache_directory("~/here") == tmp_path / "home" / "here"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache directory .*file/x cannot be made .*set --config.data.cache"):
        cache_directory(str(tmp_path / "file" / "x"))


def test_gzip_bits_per_byte(tmp_path, write_jsonl):
    texts = [inspect.getsource(module) for module in (argparse, inspect)]
    write_jsonl([{"text": text} for text in texts])
    source = open_source(f"files@{tmp_path / 'corpus'}", holdout=0.999999)
    text = "".join(texts).encode()
    assert gzip_bits_per_byte([source]) == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=1e-12)
    assert gzip_bits_per_byte([source]) < 8 * len(gzip.compress(text, 6)) / len(text)
    first = next(iter(source.documents("heldout"))).text.encode()
    assert gzip_bits_per_byte([source], 1) == pytest.approx(8 * len(gzip.compress(first, 9)) / len(first), rel=1e-12)
    with pytest.raises(UserError, match="no document is in a heldout split"):
        gzip_bits_per_byte([open_source(source.name, holdout=0.0)])


def test_a_mixture_of_two_sources(config, write_jsonl, tmp_path):
    """A mixture has one tokenizer for both sources, a held-out split of each, and shares by weight."""
    prose = [f"Number {n} of the sentences about cats, and some more words" for n in range(40)]
    (tmp_path / "prose").mkdir()
    write_jsonl([{"text": text} for text in prose], "../prose/rows.jsonl")
    other = f"files@{tmp_path / 'prose'}"
    mixed = DataConfig(**{**vars(config), "mixture": f"{config.mixture}=3,{other}"})
    corpus = prepare(mixed, 16, progress=False)
    assert list(corpus.sources) == list(corpus.heldout) == [config.mixture, other]
    assert corpus.shares == (0.75, 0.25)
    places = np.arange(10_000)
    from_prose = corpus.train.order(places, 5) >= len(corpus.train.parts[0])
    assert from_prose.sum() == 2_500
    texts = {
        corpus.tokenizer.decode(cache.read(0, cache.num_tokens).tolist())
        for cache in (*(part.cache for part in corpus.parts), *corpus.heldout.values())
    }
    assert sum("sentences about cats" in text for text in texts) == 2
    alone = prepare(config, 16, progress=False)
    assert alone.tokenizer.fingerprint != corpus.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"data\.root is the directory of one source"):
        prepare(DataConfig(**{**vars(mixed), "root": str(tmp_path)}), 16, progress=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_are_not_read_are_said_each_time(config, tmp_path, streaming):
    config, root = dataclasses.replace(config, streaming=streaming), tmp_path / "corpus"
    for name in ("a.csv", "b.csv", "notes.md"):
        (root / name).write_text("x")
    line = f"data: {config.mixture}, files that are not read: 2 .csv, 1 .md"
    assert line in prepare(config, 16, progress=False).describe()
    (root / "notes.md").unlink()  # the same cache is used
    assert line.replace(", 1 .md", "") in prepare(config, 16, progress=False).describe()
