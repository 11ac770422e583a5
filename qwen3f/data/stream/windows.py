"""Concatenate and cut, from a stream of documents instead of a cache.

The examples are those that `concat.PackedDataset` makes of the same documents, with one more at the end: the last
incomplete window, padded, so that no token is lost.

Legend: T = seq_len.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from qwen3f.data.packing.concat import Example, check_seq_len, packed_window

M = TypeVar("M")

MakeExample = Callable[[int], Example]
"""A function that builds an example, given the example's index."""


@dataclass
class _Held:
    """A document in memory. Its tokens before `offset` are inputs of earlier windows and not needed any more."""

    tokens: np.ndarray
    mark: Any
    offset: int = 0


def windows(
    documents: Iterable[tuple[np.ndarray, M]],
    seq_len: int,
    *,
    reset_positions: bool = True,
    cross_documents: bool = False,
    pad_id: int = 0,
    skip: int = 0,
) -> Iterator[tuple[MakeExample, tuple[M, int]]]:
    """Windows of T inputs and T targets over the documents' tokens, one after the other.

    It holds the documents of one window in memory. A document longer than T is cut and continues in the next window.

    Args:
        documents: ids of each document, its end-of-text token last, and a mark.
        seq_len: T.
        reset_positions, cross_documents: as for `PackedDataset`.
        pad_id: token of the padding, where segments are 0, targets -100, weights and positions 0.
        skip: number of tokens of the first document to skip.

    Yields:
        For each window: (a function that makes its example, with the keys of `PackedDataset`; where the next window
        begins: the mark of a document and the number of its tokens to skip).

    Raises:
        UserError: T < 1.
    """
    check_seq_len(seq_len)

    def make(tokens: np.ndarray, begins: np.ndarray, index: int) -> Example:
        return packed_window(tokens, begins, seq_len, index, reset_positions, cross_documents, pad_id)

    held: list[_Held] = []
    count = 0  # tokens held
    for tokens, mark in documents:
        held.append(_Held(tokens, mark, skip))
        count += len(tokens) - skip
        skip = 0
        while count > seq_len:  # a window reads T + 1 tokens, the last as a target only
            example = partial(make, *_read(held, seq_len + 1))
            _advance(held, seq_len)
            count -= seq_len
            yield example, (held[0].mark, held[0].offset)
    if count > 1:
        last = held[-1]
        yield partial(make, *_read(held, count)), (last.mark, len(last.tokens))


def _read(held: list[_Held], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the first `count` tokens held, the indices in them where documents begin, without 0)."""
    parts, begins, length = [], [], 0
    for document in held:
        if length == count:
            break
        parts.append(document.tokens[document.offset : document.offset + count - length])
        begins.append(length)
        length += len(parts[-1])
    begins = [begin for begin, part in zip(begins, parts) if begin and len(part)]
    return np.concatenate(parts), np.array(begins, np.int64)


def _advance(held: list[_Held], count: int) -> None:
    """Drop the first `count` tokens held; there must be more."""
    while count >= len(held[0].tokens) - held[0].offset:
        count -= len(held[0].tokens) - held[0].offset
        del held[0]
    held[0].offset += count
