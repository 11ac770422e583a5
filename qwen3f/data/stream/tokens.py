"""Documents to ids, on worker processes, in order."""

from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from qwen3f.data.documents import Document
from qwen3f.data.ordered_map import ordered_map
from qwen3f.data.stream.order import Mark
from qwen3f.data.tokenizer import Tokenizer

_GROUP_CHARS = 2**18  # text of one job


def tokenised(
    documents: Iterator[tuple[Document, Mark]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[np.ndarray, Mark]]:
    """Ids uint32 [n] of each document, <|endoftext|> last, with its mark. See `ordered_map` for workers."""
    marks: deque[list[Mark]] = deque()

    def jobs() -> Iterator[list[str]]:
        texts: list[str] = []
        own: list[Mark] = []
        chars = 0
        for document, mark in documents:
            texts.append(document.text)
            own.append(mark)
            chars += len(document.text)
            if chars >= _GROUP_CHARS:
                marks.append(own)
                yield texts
                texts, own, chars = [], [], 0
        if texts:
            marks.append(own)
            yield texts

    for encoded in ordered_map(partial(_encode, tokenizer), jobs(), workers):
        ids, ends = (tensor.numpy() for tensor in encoded)
        yield from zip(np.split(ids, ends[:-1]), marks.popleft())


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of all texts, each with its end, and where each ends: tensors, which come back through shared memory."""
    end = np.array([tokenizer.eos_id], np.uint32)
    encoded = tokenizer.encode_batch(texts)
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    ids = np.concatenate([part for ids in encoded for part in (ids, end)])
    return torch.from_numpy(ids), torch.from_numpy(ends)
