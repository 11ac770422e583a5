"""Training examples of whole pairs, by best fit: both answers of a pair are neighbouring documents of one row.

Segments 2k − 1 and 2k of a row are a pair. Ranks, micro-batches and pipeline stages split a batch by rows, so they
never separate a pair.

Legend: T = seq_len.
"""

from dataclasses import dataclass, field

import numpy as np

from qwen3f.data.cache.column import Column
from qwen3f.data.cache.token_cache import TokenStream
from qwen3f.data.packing.best_fit import Rows, best_fit
from qwen3f.data.packing.best_fit_dataset import best_fit_row
from qwen3f.data.packing.concat import IGNORED_TARGET, Example, check_seq_len
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError


@dataclass(frozen=True)
class PairDataset:
    """Rows over a stream whose documents 2k and 2k + 1 are the better and the worse answer of pair k.

    Keys as `concat.PackedDataset`; also ref_logprobs float [T] and margins float32 [T] if they are given. A pair's
    margin stands at the last place of its better answer; other places are 0. A pair that is longer than a row is left
    out: neither answers nor prompts are ever cut.

    Attributes:
        cache: the token stream, of chats.
        seq_len: T.
        pad_id: token of the padding.
        scored: for a scalar head (reward model): a document's last token is an input too, its place has weight 1 and
            all others 0, and all targets are -100. If False, the tokens of the answers are predicted.
        ref_logprobs: the reference model's log-probability of each token of the stream.
        margins: float32 [pairs].
        rows: which documents share a row.

    Raises:
        UserError: no pair fits into a row, or T < 1.
        ValueError: the stream holds texts instead of chats, or an odd number of documents.
    """

    cache: TokenStream
    seq_len: int
    pad_id: int = 0
    scored: bool = False
    ref_logprobs: Column | None = None
    margins: np.ndarray | None = None
    rows: Rows = field(init=False, repr=False, compare=False)

    shortened = 0  # number of documents that were cut: none ever is

    def __post_init__(self) -> None:
        check_seq_len(self.seq_len)
        if not self.cache.has_trained or self.cache.num_docs % 2:
            raise ValueError(f"{self.cache.num_docs} documents are no pairs of chats")
        places = np.diff(self.cache.doc_offsets) - (not self.scored)
        pairs = best_fit(places[::2] + places[1::2] + 1, self.seq_len, "drop")
        if not len(pairs):
            raise UserError(
                f"None of the {self.cache.num_docs // 2} pairs fits into seq_len={self.seq_len}: raise "
                "--config.seq_len."
            )
        documents = (2 * pairs.document[:, None] + np.arange(2)).flatten()
        both = Rows(documents, np.zeros_like(documents), places[documents], 2 * pairs.starts, 2 * pairs.dropped)
        object.__setattr__(self, "rows", both)

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
        spans = self.spans(i)
        trained = [self.cache.read_trained(start + 1, start + places + 1) for start, places in spans]
        if self.scored:  # best_fit_row takes one id more than places; here nothing reads it
            pieces = [np.pad(self.cache.read(start, start + places), (0, 1)) for start, places in spans]
            trained = [np.arange(places) == places - 1 for _, places in spans]
        else:
            pieces = [self.cache.read(start, start + places + 1) for start, places in spans]
        row = best_fit_row(pieces, self.seq_len, i, pad_id=self.pad_id, trained=trained)
        if self.scored:
            row["targets"][:] = IGNORED_TARGET
        return row | self._beside(i, spans)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """(index of its first token in the stream, places it fills) for each document of row i."""
        return [(int(self.cache.doc_offsets[document]), places) for document, _, places in self.rows.pieces(i)]

    def _beside(self, i: int, spans: list[tuple[int, int]]) -> Example:
        """ref_logprobs and margins of row i, each only if it is given."""
        found: Example = {}
        filled = sum(places for _, places in spans)
        if self.ref_logprobs is not None:
            own = [self.ref_logprobs.read(start + 1, start + places + 1) for start, places in spans]
            found["ref_logprobs"] = np.pad(np.concatenate(own), (0, self.seq_len - filled))
        if self.margins is not None:
            found["margins"] = np.zeros(self.seq_len, np.float32)
            ends = np.cumsum([places for _, places in spans]) - 1
            chosen = [document for document, _, _ in self.rows.pieces(i)][::2]
            found["margins"][ends[::2]] = self.margins[np.array(chosen) // 2]
        return found
