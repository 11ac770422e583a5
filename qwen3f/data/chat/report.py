"""Counts of what was packed and dropped; and a few rows as text, with what is trained marked.

Legend: D samples of a part, T = seq_len.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qwen3f.data.cache.token_cache import TokenStream
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import IGNORED_TARGET
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.tokenizers.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"
"""Marks before and after what is trained, in rendered samples."""

_CHUNK_TOKENS = 2**24


@dataclass(frozen=True)
class PackingReport:
    """Counts for one part of the training data, which is one source of the mixture.

    Attributes:
        name: the name of the part.
        samples: in the token cache, the dropped ones too.
        packed: samples that are in rows.
        rows: of T places each.
        places: rows · T.
        tokens: places that are not padding.
        supervised: places whose target is trained; for a scalar head, places whose score counts.
        too_long: samples dropped for their length.
        shortened: samples cut after the last answer that fits.
        left_out: what the source left out while both splits were read, by reason.
        policy: the key of config.data that decides what happens to samples that are too long.
    """

    name: str
    samples: int
    packed: int
    rows: int
    places: int
    tokens: int
    supervised: int
    too_long: int
    shortened: int
    left_out: dict[str, int]
    policy: str = "long_chats"

    @property
    def padding(self) -> float:
        """Share of the places that are padding."""
        return 1 - self.tokens / self.places

    def lines(self, share: float | None = None) -> list[str]:
        """The report as lines of text. share: the part's share of all rows; None leaves it out."""
        of_all = "" if share is None else f" ({share:.2%} of the rows)"
        lines = [
            f"data: {self.name}{of_all}, {self.packed:,} samples to train on in {self.rows:,} rows; {self.tokens:,} "
            f"tokens, {self.supervised:,} of them supervised ({self.supervised / self.tokens:.2%}); "
            f"{self.padding:.2%} padding"
        ]
        if self.too_long:
            lines.append(
                f"data: {self.name}, {self.too_long:,} of {self.samples:,} samples are longer than seq_len and dropped "
                f"(--config.data.{self.policy})"
            )
        if self.shortened:
            lines.append(f"data: {self.name}, {self.shortened:,} samples are cut after the last answer that fits")
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
            lines.append(f"data: {self.name}, left out while reading both splits: {reasons}")
        return lines


def packing_report(name: str, part: BestFitDataset | PairDataset) -> PackingReport:
    """The report of a part. Reads its trained bits once: one bit for each token."""
    rows, cache = part.rows, part.cache
    scored = isinstance(part, PairDataset) and part.scored  # one place of each document counts
    supervised = len(rows.document) if scored else _supervised(cache, rows.document, rows.places)
    return PackingReport(
        name=name,
        samples=cache.num_docs,
        packed=len(np.unique(rows.document)),
        rows=len(rows),
        places=len(rows) * part.seq_len,
        tokens=rows.filled,
        supervised=supervised,
        too_long=rows.dropped,
        shortened=part.shortened,
        left_out=cache.left_out,
        policy="long_pairs" if isinstance(part, PairDataset) else "long_chats",
    )


def _supervised(cache: TokenStream, documents: np.ndarray, places: np.ndarray) -> int:
    """How many of the first `places` targets of each of the documents are trained."""
    order = np.argsort(documents)
    starts = cache.doc_offsets[documents[order]] + 1  # a document's first token is no target
    stops = starts + places[order]
    total = 0
    for first in range(0, cache.num_tokens, _CHUNK_TOKENS):
        last = min(first + _CHUNK_TOKENS, cache.num_tokens)
        sums = np.concatenate([[0], np.cumsum(cache.read_trained(first, last))])
        total += int((sums[np.clip(stops, first, last) - first] - sums[np.clip(starts, first, last) - first]).sum())
    return total


def render_samples(batch: dict[str, torch.Tensor], tokenizer: Tokenizer, count: int) -> list[str]:
    """The first `count` samples of a batch as text, each with what is trained between ⟦ and ⟧.

    They are decoded from the tensors that the step gets, so faults of packing or loading are visible here.

    Args:
        batch: as the loader gives it: tokens, targets, loss_weights, segments [B, T].
        tokenizer: ids to text.
        count: samples, over all rows.
    """
    found: list[str] = []
    for row in range(len(batch["tokens"])):
        for sample in _samples({key: batch[key][row].cpu() for key in _KEYS}):
            if len(found) == count:
                return found
            found.append(_marked(*sample, tokenizer))
    return found


_KEYS = ("tokens", "targets", "loss_weights", "segments")


def _samples(row: dict[str, torch.Tensor]) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, trained) of each sample of a row; its last target is added if it is trained.

    For a scalar head, where nothing is predicted, `trained` marks the places whose scores count.
    """
    for segment in range(1, int(row["segments"].max()) + 1):
        places = torch.nonzero(row["segments"] == segment).flatten()
        targets, weights = row["targets"][places].tolist(), row["loss_weights"][places].tolist()
        ids, trained = row["tokens"][places].tolist(), [weight > 0 for weight in weights]
        if any(target != IGNORED_TARGET for target in targets):
            trained = [False, *trained]
        if targets[-1] != IGNORED_TARGET:
            ids.append(targets[-1])
        yield ids, trained[: len(ids)]


def _marked(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> str:
    text, begin = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[begin]:
            run = tokenizer.decode(ids[begin:end])
            text += f"{OPEN}{run}{CLOSE}" if trained[begin] else run
            begin = end
    return text
