"""Documents to ids, on threads or worker processes, in order."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from qwen3f.data.ordered_map import ordered_map
from qwen3f.data.sources.documents import Document
from qwen3f.data.tokenizers.tokenizer import Tokenizer

M = TypeVar("M")

_GROUP_CHARS = 2**18  # text of one job


class Tokens(NamedTuple):
    """A document's ids, uint32 [n], and which of them a model learns to write, bool [n]; None: all."""

    ids: np.ndarray
    trained: np.ndarray | None


def tokenised(
    documents: Iterable[tuple[Document, M]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[np.ndarray, M]]:
    """(ids uint32 [n], mark) of each text; <|endoftext|> is the last id. See `tokenised_documents`."""
    return ((tokens.ids, mark) for tokens, mark in tokenised_documents(documents, tokenizer, workers))


def tokenised_documents(
    documents: Iterable[tuple[Document, M]],
    tokenizer: Tokenizer,
    workers: int,
    num_threads: int = 1,
    group_chars: int = _GROUP_CHARS,
) -> Iterator[tuple[Tokens, M]]:
    """(tokens, mark) of each document, in order.

    Args:
        documents: all of one class, see `documents.Source`; each with a mark, any object, which stays in this process.
        tokenizer: text to ids.
        workers: number of processes; see `ordered_map`.
        num_threads: threads of each process; without workers, of this one.
        group_chars: about how many characters are encoded at a time.
    """
    marks: deque[list[M]] = deque()

    def jobs() -> Iterator[list[Document]]:
        group: list[Document] = []
        own: list[M] = []
        chars = 0
        for document, mark in documents:
            group.append(document)
            own.append(mark)
            chars += len(document.text)
            if chars >= group_chars:
                marks.append(own)
                yield group
                group, own, chars = [], [], 0
        if group:
            marks.append(own)
            yield group

    for encoded in ordered_map(partial(_encode, tokenizer, num_threads), jobs(), workers):
        ids, ends, trained = (None if tensor is None else tensor.numpy() for tensor in encoded)
        all_ids = np.split(ids, ends[:-1])
        all_trained = [None] * len(all_ids) if trained is None else np.split(trained, ends[:-1])
        yield from zip(map(Tokens, all_ids, all_trained), marks.popleft())


def _encode(
    tokenizer: Tokenizer, num_threads: int, documents: list[Document]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(ids of all documents, where each ends, which ids are trained), as tensors: they return through shared memory."""
    ids, trained = type(documents[0]).tokenise(documents, tokenizer, num_threads)
    ends = np.cumsum(list(map(len, ids)))
    marked = None if trained is None else torch.from_numpy(np.concatenate(trained))
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(ends), marked
