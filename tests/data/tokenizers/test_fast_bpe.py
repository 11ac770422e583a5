"""The numpy pre-tokeniser cuts where Qwen's pattern does; ids of batches equal tiktoken's, also with a full table."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data.sources.embedded import open_embedded
from qwen3f.data.tokenizers import piece_table
from qwen3f.data.tokenizers.ascii_pieces import MARK, piece_starts
from qwen3f.data.tokenizers.bpe_files import PATTERN
from qwen3f.data.tokenizers.fast_bpe import encode_texts
from qwen3f.data.tokenizers.piece_table import PieceTable

# Strings that trigger every rule of the pattern, and any ASCII text between them.
_BITS = st.one_of(
    st.sampled_from([" ", "  ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\x1c", "'", "'s", "'LL", "'re", "'Ve", "''"]),
    st.sampled_from(
        ["(", "((", "a", "ab", "sum", "Z", "0", "12", "_", "-" * 20, " " * 17, "x" * 9, "y" * 16, "z" * 17]
    ),
    st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=4),
)
_ASCII = st.lists(_BITS, max_size=12).map("".join)
_ANY = st.lists(
    st.one_of(_BITS, st.sampled_from(["é", "e\u0301", "\u0301", "中", "\u3000", "\x85", "\u2028", "\0", "'ſ"]))
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(_ASCII, min_size=1, max_size=3))
@example(["x.\n\n  \n y", "a\n  ", " 's", "\t's", "''s", "'\n's"])
@example([" (a", "\t(a", "x (", "a.b", "  .a", "\n.a", "1.a", "'rex", "'", "don't'"])
def test_cuts_equal_the_patterns(texts):
    buffer = b"".join(text.encode() + bytes([MARK]) for text in texts)
    starts = piece_starts(np.frombuffer(buffer, np.uint8)).tolist()
    pieces = [buffer[a:b].decode("latin-1") for a, b in zip(starts, [*starts[1:], len(buffer)])]
    assert pieces == [piece for text in texts for piece in [*regex.findall(PATTERN, text), chr(MARK)]]


@settings(max_examples=300, deadline=None)
@given(st.lists(_ANY.map("".join), max_size=4))
@example(["a\n\u0301b", "<\n\u0338", "x\n\x1cé\n y", "é\n", "\n\nab\n中\ncd"])
def test_batches_equal_tiktoken(qwen, texts):
    assert [ids.tolist() for ids in qwen.encode_batch(texts)] == [qwen.encode(text) for text in texts]


def test_the_standard_library_equals_tiktoken(qwen):
    texts = [document.text for document in open_embedded().documents("heldout")]
    texts += [text.replace("e", "é", 40).replace("\n", "\r\n", 7) for text in texts[:6]]
    found = qwen.encode_batch(texts, num_threads=2)
    assert {ids.dtype for ids in found} == {np.dtype(np.uint32)}
    assert [ids.tolist() for ids in found] == [qwen.encode(text) for text in texts]


def test_a_table_that_is_full_begins_again(qwen, monkeypatch):
    """Many different pieces: the table holds at most half its slots and is right before and after it is emptied."""
    monkeypatch.setattr(piece_table, "_MOST", 400)
    monkeypatch.setattr(piece_table, "_MOST_LONG", 5)
    table = PieceTable(qwen._encoding._encode_single_piece)
    used = []
    for n in range(12):
        texts = [f"{'qxz'[i % 3] * (i % 23)}{'abcdefghij'[i % 10] * n} w{n}" for i in range(150)]
        assert [ids.tolist() for ids in encode_texts(texts, table, qwen.encode)] == [qwen.encode(t) for t in texts]
        used.append(table._used)
    assert max(used) <= 400
    assert any(later < sooner for sooner, later in pairwise(used))
    assert len(table._long) <= 5


def test_one_text_with_more_pieces_than_the_table_holds(qwen, monkeypatch):
    monkeypatch.setattr(piece_table, "_MOST", 400)
    monkeypatch.setattr(piece_table, "_BLOCK", 300)
    text = " ".join(f"w{n:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for n in range(3000))
    assert qwen.encode_batch([text])[0].tolist() == qwen.encode(text)


def test_threads_share_a_tokenizer(qwen):
    texts = [f"word{n} = {n * n}  # {'x' * (n % 30)}\n" * 40 for n in range(60)]
    wanted = [qwen.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: qwen.encode_batch(texts, 2), range(8)):
            assert [ids.tolist() for ids in found] == wanted


@pytest.mark.parametrize("texts", [[], [""], ["", "a", ""], ["\0"], ["é"], [" " * 100_000], ["\n" * 100_000 + " x"]])
def test_edges(qwen, texts):
    assert [ids.tolist() for ids in qwen.encode_batch(texts)] == [qwen.encode(text) for text in texts]
