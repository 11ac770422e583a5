"""From a configuration to examples and held-out text, with the tokenizer and both caches reused."""

import argparse
import gzip
import inspect

import numpy as np
import pytest

from qwen3f.data import corpus as module
from qwen3f.data.corpus import DataConfig, cache_directory, gzip_bits_per_byte, prepare
from qwen3f.data.sources import open_source
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
    text = corpus.tokenizer.decode(heldout.tokens.tolist(), skip_special=True)
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
        ({"holdout": 0.0}, "no document in its heldout split.*raise data.holdout"),
        ({"vocab_size": 10**6}, "set model.vocab_size to"),
        ({"num_threads": 0}, "data.num_threads is 0: give at least 1"),
        ({"text_key": "body"}, r"rows.jsonl:1 has no key 'body'; it has 'text'"),
    ],
)
def test_user_errors(config, change, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**{**vars(config), **change}), 16, progress=False)


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
    with pytest.raises(UserError, match=r"cache directory .*file/x cannot be made .*set data.cache"):
        cache_directory(str(tmp_path / "file" / "x"))


def test_gzip_bits_per_byte(tmp_path, write_jsonl):
    texts = [inspect.getsource(module) for module in (argparse, inspect)]
    write_jsonl([{"text": text} for text in texts])
    source = open_source(f"files@{tmp_path / 'corpus'}", holdout=0.999999)
    text = "".join(texts).encode()
    assert gzip_bits_per_byte([source]) == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=1e-12)
    assert gzip_bits_per_byte([source]) < 8 * len(gzip.compress(text, 6)) / len(text)
    with pytest.raises(UserError, match="no document is in a heldout split"):
        gzip_bits_per_byte([open_source(source.name, holdout=0.0)])


def test_a_mixture_of_two_sources(config, write_jsonl, tmp_path):
    """One tokenizer over both, a held-out split of each, and the shares of the weights."""
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
    texts = {corpus.tokenizer.decode(cache.tokens.tolist()) for cache in (*corpus.caches, *corpus.heldout.values())}
    assert sum("sentences about cats" in text for text in texts) == 2
    alone = prepare(config, 16, progress=False)
    assert alone.tokenizer.fingerprint != corpus.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"data\.root is the directory of one source"):
        prepare(DataConfig(**{**vars(mixed), "root": str(tmp_path)}), 16, progress=False)
