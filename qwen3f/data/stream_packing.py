"""Concatenate and cut, from a stream of documents instead of a cache.

The examples are those that `packing.PackedDataset` makes of the same documents, with one more at the end: the last
incomplete window, padded, so that no token is lost.

Legend: T = seq_len.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qwen3f.data.packing import IGNORED_TARGET, Example
from qwen3f.errors import UserError


def pack_stream(
    documents: Iterable[Sequence[int]],
    seq_len: int,
    *,
    reset_positions: bool = True,
    cross_documents: bool = False,
    pad_id: int = 0,
) -> Iterator[Example]:
    """Windows of T inputs and T targets over the documents' tokens, one after the other.

    In memory are one document and one window. A document longer than T is cut and goes on in the next window.

    Args:
        documents: ids of each document, its end-of-text token last.
        seq_len: T.
        reset_positions: as for `PackedDataset`, like cross_documents.
        pad_id: token of the padding; segments are 0 there, targets -100, weights and positions 0.

    Returns:
        Examples with the keys of `PackedDataset`; index int64 [] counts from 0.

    Raises:
        UserError: T < 1.
    """
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}: give at least 1.")
    tokens: list[int] = []
    begins: list[int] = []  # places in `tokens` where documents begin
    index = 0
    for document in documents:
        begins.append(len(tokens))
        tokens.extend(document)
        start = 0
        while len(tokens) - start > seq_len:  # a window reads T + 1 tokens, the last as a target only
            yield _window(tokens, begins, start, seq_len, index, reset_positions, cross_documents, pad_id)
            start += seq_len
            index += 1
        del tokens[:start]
        begins = [begin - start for begin in begins if begin >= start]
    if len(tokens) > 1:
        yield _window(tokens, begins, 0, seq_len, index, reset_positions, cross_documents, pad_id)


def _window(
    tokens: list[int],
    begins: list[int],
    start: int,
    seq_len: int,
    index: int,
    reset_positions: bool,
    cross_documents: bool,
    pad_id: int,
) -> Example:
    stream = np.array(tokens[start : start + seq_len + 1], np.int64)
    inputs, targets = stream[:-1], stream[1:]
    places = np.arange(start, start + len(inputs))
    # Documents that begin inside the window, after its first token, up to the last target.
    inside = np.array(begins[bisect_right(begins, start) : bisect_right(begins, start + len(inputs))], np.int64)
    order = np.searchsorted(inside, places, side="right")
    first = np.concatenate([[start], inside])[order]
    counted = np.ones(len(inputs), bool) if cross_documents else ~np.isin(places + 1, inside)
    segments = np.ones(len(inputs), np.int32) if cross_documents else (order + 1).astype(np.int32)
    padding = (0, seq_len - len(inputs))
    return {
        "tokens": np.pad(inputs, padding, constant_values=pad_id),
        "targets": np.pad(np.where(counted, targets, IGNORED_TARGET), padding, constant_values=IGNORED_TARGET),
        "loss_weights": np.pad(counted.astype(np.float32), padding),
        "positions": np.pad(places - (first if reset_positions else start), padding),
        "segments": np.pad(segments, padding),
        "index": np.array(index, np.int64),
    }
