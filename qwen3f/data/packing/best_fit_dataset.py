"""Training examples of whole documents, by best fit, over a token stream that can be indexed.

Legend: T = seq_len.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from qwen3f.data.cache.token_cache import TokenStream
from qwen3f.data.packing.best_fit import LongDocuments, Rows, best_fit, check_policy
from qwen3f.data.packing.concat import IGNORED_TARGET, Example, check_seq_len
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError


@dataclass(frozen=True)
class BestFitDataset:
    """Rows of `best_fit` over the documents of a stream; same keys and use as `concat.PackedDataset`.

    Documents never see each other: each is a segment of its own, and no target crosses from one to the next. In chats,
    a target that is not trained is -100 and has weight 0.

    Attributes:
        cache: the token stream.
        seq_len: T.
        reset_positions: as for `PackedDataset`.
        long_documents: what to do with documents of more than T + 1 tokens. "drop": leave them out. "cut", for texts
            only: see `best_fit`. "cut_end", for chats only: end them with the last answer that fits whole, or drop them
            if none fits.
        pad_id: token of the padding, where segments are 0, targets -100, weights and positions 0.
        rows: which documents share a row.
        shortened: number of documents that "cut_end" has made shorter.

    Raises:
        UserError: no document fits, T < 1, or for texts a policy other than "cut" and "drop".
        ValueError: for chats a policy other than "drop" and "cut_end": after "cut" half an answer would count as a
            whole one.
    """

    cache: TokenStream
    seq_len: int
    reset_positions: bool = True
    long_documents: LongDocuments | Literal["cut_end"] = "cut"
    pad_id: int = 0
    rows: Rows = field(init=False, repr=False, compare=False)
    shortened: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_seq_len(self.seq_len)
        whole = np.diff(self.cache.doc_offsets)
        if self.cache.has_trained:
            lengths = self._lengths_of_chats(whole)
            rows = best_fit(lengths, self.seq_len, "drop")
        else:
            check_policy(self.long_documents)
            lengths = whole
            rows = best_fit(lengths, self.seq_len, self.long_documents)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "shortened", int((lengths < whole).sum()))
        if not len(rows):
            other = "" if self.cache.has_trained else ", or write --config.data.long_documents=cut"
            raise UserError(
                f"None of the corpus's {self.cache.num_docs} documents fits into seq_len={self.seq_len} "
                f"({rows.dropped} are longer): raise --config.seq_len{other}."
            )

    def _lengths_of_chats(self, whole: np.ndarray) -> np.ndarray:
        if self.long_documents not in ("drop", "cut_end"):
            raise ValueError(f"long_documents={self.long_documents!r} for chats: give 'drop' or 'cut_end'")
        lengths = whole.copy()
        for document in np.flatnonzero(whole > self.seq_len + 1) if self.long_documents == "cut_end" else ():
            start = int(self.cache.doc_offsets[document])
            trained = self.cache.read_trained(start, start + self.seq_len + 2)
            ends = np.flatnonzero(trained[:-1] & ~trained[1:])  # where answers end, within T + 1 tokens
            if ends.size:
                lengths[document] = ends[-1] + 1
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def padding(self) -> float:
        """Share of the places that are padding, over all rows."""
        return 1.0 - self.rows.filled / (len(self.rows) * self.seq_len)

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The examples at `places` of the shuffled, endless order; int64 [n] -> int64 [n]."""
        return example_index(places, len(self), seed)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        pieces, trained = [], []
        for document, begin, places in self.rows.pieces(i):
            start = int(self.cache.doc_offsets[document]) + begin
            pieces.append(self.cache.read(start, start + places + 1))
            if self.cache.has_trained:
                trained.append(self.cache.read_trained(start + 1, start + places + 1))
        return best_fit_row(pieces, self.seq_len, i, self.reset_positions, self.pad_id, trained)


def best_fit_row(
    pieces: Sequence[np.ndarray],
    seq_len: int,
    index: int,
    reset_positions: bool = True,
    pad_id: int = 0,
    trained: Sequence[np.ndarray] = (),
) -> Example:
    """One example from pieces of documents.

    Args:
        pieces: token ids of each, integers [n + 1] for a piece that fills n places; together they fill T places at
            most.
        seq_len: T.
        index: the example's number, stored under "index".
        reset_positions: positions restart at each piece.
        pad_id: token of the padding.
        trained: for each piece a bool [n], True where its target counts; () if all targets count.
    """
    places = [len(piece) - 1 for piece in pieces]
    filled = sum(places)
    tokens, targets = np.full(seq_len, pad_id, np.int64), np.full(seq_len, IGNORED_TARGET, np.int64)
    np.concatenate([piece[:-1] for piece in pieces], out=tokens[:filled], casting="unsafe")  # ids are unsigned
    np.concatenate([piece[1:] for piece in pieces], out=targets[:filled], casting="unsafe")
    weights, positions, segments = (
        np.zeros(seq_len, np.float32),
        np.zeros(seq_len, np.int64),
        np.zeros(seq_len, np.int32),
    )
    weights[:filled] = np.concatenate(trained) if trained else 1
    segments[:filled] = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), places)
    positions[:filled] = np.arange(filled)
    if reset_positions:
        positions[:filled] -= np.repeat(np.cumsum(places) - places, places)
    targets[weights == 0] = IGNORED_TARGET
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights,
        "positions": positions,
        "segments": segments,
        "index": np.array(index, np.int64),
    }
