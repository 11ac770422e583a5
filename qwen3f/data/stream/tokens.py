"""Documents to ids, on threads or worker processes, in order."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from qwen3f.data.ordered_map import ordered_map
from qwen3f.data.sources.documents import Document
from qwen3f.data.tokenizers.tokenizer import Tokenizer

M = TypeVar("M")

_GROUP_CHARS = 2**18  # text of one job


def tokenised(
    documents: Iterable[tuple[Document, M]],
    tokenizer: Tokenizer,
    workers: int,
    num_threads: int = 1,
    group_chars: int = _GROUP_CHARS,
) -> Iterator[tuple[np.ndarray, M]]:
    """Ids uint32 [n] of each document, <|endoftext|> last, with its mark.

    Args:
        documents: each with a mark, which stays in this process.
        tokenizer: text to ids.
        workers: processes; see `ordered_map`.
        num_threads: of each process, or of this one.
        group_chars: text that is encoded at a time, about.
    """
    marks: deque[list[M]] = deque()

    def jobs() -> Iterator[list[str]]:
        texts: list[str] = []
        own: list[M] = []
        chars = 0
        for document, mark in documents:
            texts.append(document.text)
            own.append(mark)
            chars += len(document.text)
            if chars >= group_chars:
                marks.append(own)
                yield texts
                texts, own, chars = [], [], 0
        if texts:
            marks.append(own)
            yield texts

    for encoded in ordered_map(partial(_encode, tokenizer, num_threads), jobs(), workers):
        ids, ends = (tensor.numpy() for tensor in encoded)
        yield from zip(np.split(ids, ends[:-1]), marks.popleft())


def _encode(tokenizer: Tokenizer, num_threads: int, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of all texts, each with its end, and where each ends: tensors, which come back through shared memory."""
    end = np.array([tokenizer.eos_id], np.uint32)
    encoded = tokenizer.encode_batch(texts, num_threads)
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    ids = np.concatenate([part for ids in encoded for part in (ids, end)])
    return torch.from_numpy(ids), torch.from_numpy(ends)
