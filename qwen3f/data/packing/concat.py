"""Cut the token stream of a cache into examples of fixed length, knowing where documents begin.

Concatenate and cut: example i reads stream tokens [i·T, i·T + T] — T inputs and, one place on, T targets. Nothing is
padded and nothing is lost but the last incomplete window. Where documents begin is taken from the cache's offsets, not
from looking for end-of-text tokens.

A document's last token is `<|endoftext|>`. Its target would be the first token of the next, unrelated document; unless
`cross_documents` is set, that target is masked and `segments` keep attention inside documents.

Legend: N tokens in the stream, T = seq_len.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.cache.token_cache import TokenCache, TokenStream
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError

IGNORED_TARGET = -100

Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackedDataset:
    """Training examples over a cache; `len(dataset)` full windows, `dataset[i]` a dict of arrays of one example.

    Keys: tokens, targets int64 [T]; loss_weights float32 [T] (1 where a target counts, else 0); positions int64 [T];
    segments int32 [T], document number in the window from 1; index int64 [] = i.

    Attributes:
        cache: the token stream.
        seq_len: T.
        reset_positions: positions restart from 0 at each document (and at the window's start, where the earlier part of
            a cut document is out of sight); otherwise they run from 0 to T - 1.
        cross_documents: attention and targets cross documents: segments are all 1 and no target is masked.

    Raises:
        UserError: the stream is shorter than T + 1 tokens, or T < 1.
        ValueError: the stream holds chats, which must not be cut.
    """

    cache: TokenStream
    seq_len: int
    reset_positions: bool = True
    cross_documents: bool = False
    padding = 0.0  # share of the places that are padding

    def __post_init__(self) -> None:
        check_seq_len(self.seq_len)
        _check_text(self.cache)
        if self.cache.num_tokens < self.seq_len + 1:
            raise UserError(
                f"The corpus has {self.cache.num_tokens} tokens in {self.cache.num_docs} documents, fewer than one "
                f"example of seq_len={self.seq_len} needs ({self.seq_len + 1}): lower --config.seq_len or give more "
                "text."
            )

    def __len__(self) -> int:
        return (self.cache.num_tokens - 1) // self.seq_len

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The examples at `places` of the shuffled, endless order; int64 [n] -> int64 [n]."""
        return example_index(places, len(self), seed)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return _window(self.cache, i, self.seq_len, self.cache.num_tokens, self.reset_positions, self.cross_documents)


def limit_context(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The batch with its segments [B, T] cut every `length` places, so that attention sees at most `length` tokens.

    For context warmup: a small model learns faster if it first learns from near tokens. (Li et al. 2022,
    arXiv:2108.06084, shorten the rows instead.) Targets, weights and positions do not change; padding stays segment 0.
    """
    segments = batch["segments"]
    pieces = -(-segments.shape[1] // length)
    piece = torch.arange(segments.shape[1], device=segments.device, dtype=segments.dtype) // length
    return {**batch, "segments": torch.where(segments > 0, segments * pieces + piece, 0)}


def eval_windows(cache: TokenCache, seq_len: int, max_docs: int | None = None) -> Iterator[Example]:
    """Windows that predict each token of the first `max_docs` documents (default all) once, except their first tokens.

    Same keys as `PackedDataset`, documents kept apart. The windows do not overlap; the last one is padded with segments
    0, targets -100, weights 0, positions 0 and tokens 0. `eval_coverage` says what they cover.
    """
    check_seq_len(seq_len)
    _check_text(cache)
    stop = int(cache.doc_offsets[eval_coverage(cache, max_docs).documents])
    for i in range(-(-(stop - 1) // seq_len)):
        yield _window(cache, i, seq_len, stop, reset_positions=True, cross_documents=False)


@dataclass(frozen=True)
class EvalCoverage:
    """What `eval_windows` covers: documents, their UTF-8 bytes of text, and the tokens that are predicted."""

    documents: int
    text_bytes: int
    predicted_tokens: int


def eval_coverage(cache: TokenCache, max_docs: int | None = None) -> EvalCoverage:
    """The extent of `eval_windows(cache, any length, max_docs)`."""
    documents = cache.num_docs if max_docs is None else min(max_docs, cache.num_docs)
    if documents < 1:
        raise UserError(f"max_docs={max_docs} leaves nothing to evaluate: give at least 1.")
    text_bytes = int(cache.doc_bytes[:documents].sum())
    return EvalCoverage(documents, text_bytes, int(cache.doc_offsets[documents]) - documents)


def bits_per_byte(total_nats: float, coverage: EvalCoverage, vocab_size: int) -> float:
    """Bits the model spends on a byte of text: comparable between tokenizers, and with a compressor such as gzip.

    Args:
        total_nats: negative log-likelihood (natural log) summed over all predicted tokens of `eval_windows`; the
            end-of-text tokens are among them, since without them the text would not be decodable.
        coverage: what was evaluated.
        vocab_size: V. The first token of each document is never predicted; it is charged ln V, as if uniform.
    """
    charged = total_nats + coverage.documents * np.log(vocab_size)
    return float(charged / (np.log(2) * coverage.text_bytes))


def check_seq_len(seq_len: int) -> None:
    """Raises UserError if seq_len is below 1."""
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}: give at least 1.")


def _check_text(cache: TokenStream) -> None:
    if cache.has_trained:
        raise ValueError("chats are packed by BestFitDataset: a window would cut answers and train prompts")


def _window(
    cache: TokenStream, i: int, seq_len: int, stop: int, reset_positions: bool, cross_documents: bool
) -> Example:
    """Window i of the stream's first `stop` tokens, padded to T beyond them."""
    start = i * seq_len
    stream = cache.read(start, min(start + seq_len + 1, stop))  # up to T + 1 tokens
    first, last = np.searchsorted(cache.doc_offsets, [start, start + len(stream) - 1], side="right")
    begins = np.asarray(cache.doc_offsets[first:last]) - start
    return packed_window(stream, begins, seq_len, i, reset_positions, cross_documents)


def packed_window(
    stream: np.ndarray,
    begins: np.ndarray,
    seq_len: int,
    index: int,
    reset_positions: bool,
    cross_documents: bool,
    pad_id: int = 0,
) -> Example:
    """An example of consecutive tokens; keys as `PackedDataset`.

    Args:
        stream: integers [n + 1], n ≤ T: stream[:-1] are the inputs, stream[1:] the targets.
        begins: int64, rising: the indices in `stream`, from 1 to n, where a document begins; they decide segments,
            positions and masks.
        seq_len: T; places from n on are padding.
        index: the example's number, stored under "index".
        reset_positions, cross_documents: as for `PackedDataset`.
        pad_id: token of the padding.
    """
    count = len(stream) - 1
    bounds = np.concatenate([[0], begins[begins < count], [count]])
    lengths = np.diff(bounds)
    weights = np.zeros(seq_len, np.float32)
    weights[:count] = 1
    positions, segments = np.zeros(seq_len, np.int64), np.zeros(seq_len, np.int32)
    positions[:count] = np.arange(count)
    if reset_positions:
        positions[:count] -= np.repeat(bounds[:-1], lengths)
    segments[:count] = 1
    if not cross_documents:
        segments[:count] = np.repeat(np.arange(1, len(bounds), dtype=np.int32), lengths)
        weights[begins - 1] = 0
    tokens, targets = np.full(seq_len, pad_id, np.int64), np.full(seq_len, IGNORED_TARGET, np.int64)
    tokens[:count], targets[:count] = stream[:-1], stream[1:]
    targets[weights == 0] = IGNORED_TARGET
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights,
        "positions": positions,
        "segments": segments,
        "index": np.array(index, np.int64),
    }
