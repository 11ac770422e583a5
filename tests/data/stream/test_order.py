"""The order of a stream: shares of characters, caps of epochs, shuffled blocks, and resuming from any mark."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.sources.documents import Document
from qwen3f.data.stream import order as module
from qwen3f.data.stream.order import Mark, ordered_documents
from qwen3f.errors import UserError


@dataclass(frozen=True)
class Listed:
    """A part that is a list of texts, None for a row that is left out."""

    name: str
    texts: tuple

    def fingerprint(self):
        return self.name

    def items(self, place, counts):
        for n in range(place[1], len(self.texts)):
            text = self.texts[n]
            counts["empty_texts"] += text is None
            yield (text if text is None else Document(text, f"{self.name}:{n}")), (0, n + 1)


def _ordered(parts, weights=None, max_epochs=None, counts=None, **options):
    return ordered_documents(
        parts,
        weights or [1.0] * len(parts),
        max_epochs=max_epochs or [None] * len(parts),
        counts=Counter() if counts is None else counts,
        **{"seed": 1, "buffer": 0, **options},
    )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=12), min_size=1, max_size=3),
    buffer=st.integers(0, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_goes_on_from_every_mark_and_reads_all_so_often(sizes, buffer, epochs, seed):
    if any(not any(own) for own in sizes):
        return
    parts = [Listed(f"p{i}", tuple(None if n is None else "x" * n for n in own)) for i, own in enumerate(sizes)]
    options = {"max_epochs": [epochs] * len(parts), "buffer": buffer, "seed": seed}
    whole = list(_ordered(parts, **options))
    names = [document.name for document, _ in whole]
    assert Counter(names) == {f"p{i}:{n}": epochs for i, own in enumerate(sizes) for n, s in enumerate(own) if s}
    for place, (_, mark) in enumerate(whole):
        block, taken = json.loads(json.dumps(mark))
        rest = list(_ordered(parts, start=Mark(block, taken), **options))
        assert [document.name for document, _ in rest] == names[place:]
        assert [json.dumps(m) for _, m in rest] == [json.dumps(m) for _, m in whole[place:]]


def test_shares_are_of_characters_and_a_capped_part_leaves_the_others_theirs():
    parts = [Listed("a", ("a" * 10,) * 100), Listed("b", ("b" * 30,) * 100), Listed("c", ("c",) * 50)]
    taken = list(islice(_ordered(parts, [3, 1, 1], [None, None, 2]), 4000))
    text = "".join(document.text for document, _ in taken)
    end = text.rindex("c")
    assert text.count("c") == 100
    assert abs(text[:end].count("a") - 3 * text[:end].count("b")) <= 3 * 30 + 10
    assert abs(text[end:].count("a") - 3 * text[end:].count("b")) <= 3 * 30 + 10


def test_blocks_are_shuffled_and_differ():
    part = Listed("p", tuple(f"{n}" for n in range(100)))
    plain = [d.text for d, _ in islice(_ordered([part]), 200)]
    assert plain == [str(n) for n in range(100)] * 2
    for buffer in (10, 50):
        shuffled = [d.text for d, _ in islice(_ordered([part], buffer=buffer), 200)]
        for start in range(0, 200, buffer):
            assert sorted(shuffled[start : start + buffer]) == sorted(plain[start : start + buffer])
            assert shuffled[start : start + buffer] != plain[start : start + buffer]
        assert shuffled[:100] != shuffled[100:]
    assert shuffled != [d.text for d, _ in islice(_ordered([part], buffer=50, seed=2), 200)]


def test_a_block_of_long_documents_ends_early(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_CHARS", 25)
    part = Listed("p", tuple(str(n) * 10 for n in range(10)))
    marks = [mark for _, mark in islice(_ordered([part], buffer=100), 9)]
    assert [mark.block["number"] for mark in marks] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [mark.block["places"] for mark in marks[::3]] == [[[0, 0]], [[0, 3]], [[0, 6]]]


def test_a_part_without_a_document():
    counts = Counter()
    with pytest.raises(UserError, match="Empty corpus: b has no document to train on"):
        list(_ordered([Listed("a", ("x",)), Listed("b", (None, None))], counts=counts))
    assert counts["empty_texts"] == 2
