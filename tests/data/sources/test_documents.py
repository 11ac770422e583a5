"""A corpus of few documents, such as one long text, is split by position; an error names a file of blanks alone."""

from collections import Counter

import pytest

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.sources.documents import Document, is_heldout, split_documents
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError

LINES = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(400))


def splits(documents, holdout):
    return [list(split_documents(iter(documents), split, holdout)) for split in ("train", "heldout")]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("holdout", [0.02, 0.05, 0.3])
def test_the_last_part_of_a_few_documents_is_held_out(count, holdout):
    size = len(LINES) // count + 1
    documents = [Document(LINES[i : i + size], f"x:{i}") for i in range(0, len(LINES), size)]
    hashed = {is_heldout(document.text.encode(), holdout) for document in documents}
    train, heldout = splits(documents, holdout)
    assert train
    assert heldout
    if len(hashed) == 2:
        return
    texts = [document.text for document in (*train, *heldout)]
    assert "".join(texts) == LINES
    assert abs(sum(len(document.text) for document in heldout) / len(LINES) - holdout) < 0.01
    assert heldout[0].text.startswith(("def", "    return"))


@pytest.mark.parametrize("copies", [1, 5])
def test_no_text_of_a_few_documents_is_in_both_splits(copies):
    texts = [text for text in (f"text number {n}\n" * 3 for n in range(40)) if not is_heldout(text.encode(), 0.05)][:6]
    documents = [Document(text, f"x:{n}") for n, text in enumerate([*texts, *texts[:copies]])]
    train, heldout = splits(documents, 0.05)
    assert heldout
    assert train[:5] == documents[:5]
    assert "".join(document.text for document in (*train, *heldout)) == "".join(texts)


def test_many_documents_are_split_by_their_hash_alone():
    documents = [Document(f"text {n}", f"x:{n}") for n in range(3000)]
    train, heldout = splits(documents, 0.05)
    assert heldout == [d for d in documents if is_heldout(d.text.encode(), 0.05)]
    assert len(train) + len(heldout) == 3000
    assert splits(documents, 0.0) == [documents, []]
    assert splits([Document("one line", "x")], 0.25)[1] == [Document("ne", "x#2")]


def test_one_long_text_is_a_corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text(LINES)
    config = DataConfig(mixture=f"files@{tmp_path / 'text'}", cache=str(tmp_path / "cache"), vocab_size=330)
    corpus = prepare(config, 16, progress=False)
    (heldout,) = corpus.heldout.values()
    assert heldout.num_docs == corpus.train.cache.num_docs == 1
    assert 0.03 < heldout.num_tokens / (heldout.num_tokens + corpus.train.cache.num_tokens) < 0.07


def test_a_file_of_blanks_alone_is_named(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.txt").write_text(" \n\t\n" * 20)
    config = DataConfig(mixture=f"files@{tmp_path / 'text'}", cache=str(tmp_path / "cache"), vocab_size=330)
    with pytest.raises(UserError, match=r"file of blanks alone: .*text/a\.txt"):
        prepare(config, 16, progress=False)
    (tmp_path / "text" / "book.txt").write_text(LINES)
    counts = Counter()
    source = open_source(config.mixture)
    assert [d.name for d in source.documents("train", counts)] == [f"{tmp_path}/text/book.txt#1"]
    assert counts["empty_rows"] == 1
    assert sum("blanks alone" in reason for reason in counts) == 3
