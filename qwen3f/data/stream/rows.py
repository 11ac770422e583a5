"""Whole documents in rows, from a stream: best fit over groups of documents.

Legend: T = seq_len.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from qwen3f.data.packing.best_fit import LongDocuments, best_fit, check_policy
from qwen3f.data.packing.best_fit_dataset import best_fit_row
from qwen3f.data.packing.concat import Example, check_seq_len
from qwen3f.data.sampler import example_index
from qwen3f.data.stream.windows import MakeExample

M = TypeVar("M")

GROUP_ROWS = 256
"""A group has documents for this many rows. A larger group leaves less padding and needs more memory."""


def best_fit_rows(
    documents: Iterable[tuple[np.ndarray, M]],
    seq_len: int,
    *,
    reset_positions: bool = True,
    long_documents: LongDocuments = "cut",
    pad_id: int = 0,
    counts: Counter[str] | None = None,
    skip: int = 0,
) -> Iterator[tuple[MakeExample, tuple[M, int]]]:
    """The rows of `best_fit` over each group of documents, in a shuffled order within the group.

    It holds one group in memory.

    Args:
        documents: ids of each document, its end-of-text token last, and a mark.
        seq_len: T.
        reset_positions: as for `PackedDataset`.
        long_documents: see `best_fit`.
        pad_id: token of the padding.
        counts: dropped documents are added here as `too_long`.
        skip: number of rows of the first group to skip.

    Yields:
        For each row: (a function that makes its example, where the next row is found: the mark of its group's first
        document and the number of rows of the group to skip).

    Raises:
        UserError: T < 1, or an unknown policy.
    """
    check_seq_len(seq_len)
    check_policy(long_documents)
    for group, mark in _groups(documents, GROUP_ROWS * seq_len):
        rows = best_fit([len(tokens) for tokens in group], seq_len, long_documents)
        if counts is not None and rows.dropped:
            counts["too_long"] += rows.dropped
        order = example_index(np.arange(len(rows)), len(rows), 0) if len(rows) else np.zeros(0, np.int64)
        for number in range(skip, len(rows)):
            pieces = [group[d][begin : begin + places + 1] for d, begin, places in rows.pieces(order[number])]
            yield partial(_row, pieces, seq_len, reset_positions, pad_id), (mark, number + 1)
        skip = 0


def _groups(documents: Iterable[tuple[np.ndarray, M]], most: int) -> Iterator[tuple[list[np.ndarray], M]]:
    """(documents, mark of the first one) of each group; a group ends when it holds `most` tokens."""
    group: list[np.ndarray] = []
    count, first = 0, None
    for tokens, mark in documents:
        if not group:
            first = mark
        group.append(tokens)
        count += len(tokens)
        if count >= most:
            yield group, first
            group, count = [], 0
    if group:
        yield group, first


def _row(pieces: list[np.ndarray], seq_len: int, reset_positions: bool, pad_id: int, index: int) -> Example:
    return best_fit_row(pieces, seq_len, index, reset_positions, pad_id)
