"""Documents by length, for long-context training: some of a cache's documents as a stream of their own.

The Qwen3 technical report, §3.2, trains its third stage at 32,768 tokens on 75% text of 16,384 to 32,768 tokens and 25%
of 4,096 to 16,384. Here, for any T: "long" is a document of more than T/2 tokens, "medium" one of more than T/8, and
"short" any other. Deviation: a document longer than T counts as long, so that books are used, cut by the packing.

Shares are shares of examples. Each example has T places, so they are shares of tokens too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen3f.data.cache.token_cache import TokenStream
from qwen3f.data.mixture import parse_weights
from qwen3f.errors import UserError

CLASSES = ("short", "medium", "long")


@dataclass(frozen=True, eq=False)
class DocumentSubset:
    """Some documents of a stream as a stream of their own; a `token_cache.TokenStream`.

    Attributes:
        source: the stream that they are read from.
        documents: int64 [D], their numbers in `source`, rising.
        doc_offsets: int64 [D + 1], where each begins in this stream, and the end.
    """

    source: TokenStream
    documents: np.ndarray
    doc_offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end-of-text tokens included."""
        return int(self.doc_offsets[-1])

    @property
    def num_docs(self) -> int:
        """Documents."""
        return len(self.documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the stream."""
        return self._gather(self.source.read, start, stop)

    def read_trained(self, start: int, stop: int) -> np.ndarray:
        """As in `TokenStream`."""
        return self._gather(self.source.read_trained, start, stop)

    @property
    def has_trained(self) -> bool:
        """As in `TokenStream`."""
        return self.source.has_trained

    def _gather(self, read: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self.doc_offsets, [start, stop - 1], side="right") - 1
        parts = []
        for d in range(first, last + 1):
            shift = int(self.source.doc_offsets[self.documents[d]]) - int(self.doc_offsets[d])
            begin, end = max(start, int(self.doc_offsets[d])), min(stop, int(self.doc_offsets[d + 1]))
            parts.append(read(begin + shift, end + shift))
        return np.concatenate(parts)


def parse_length_mix(text: str) -> dict[str, float]:
    """Share by class of "long=0.75,medium=0.25"; {} for "". Raises UserError for an unknown class or a bad share."""
    if not text:
        return {}
    shares = dict(parse_weights(text, "--config.data.length_mix"))
    for name in shares:
        if name not in CLASSES:
            raise UserError(f"config.data.length_mix={text!r} names {name!r}: write classes of {', '.join(CLASSES)}.")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def of_class(stream: TokenStream, name: str, seq_len: int) -> DocumentSubset | None:
    """The documents of a class, or None if there are none."""
    lengths = np.diff(stream.doc_offsets)
    classes = np.searchsorted([seq_len / 8, seq_len / 2], lengths, side="left")  # a bound belongs to the class below
    documents = np.flatnonzero(classes == CLASSES.index(name))
    if not documents.size:
        return None
    return DocumentSubset(stream, documents, np.concatenate([[0], np.cumsum(lengths[documents])]))
