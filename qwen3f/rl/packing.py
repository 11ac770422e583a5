"""Completions with their prompts as rows of documents, without padding between; the same rows on every rank.

R rows · T places
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen3f.data.packing.best_fit import best_fit

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Document:
    """A prompt and what was sampled after it.

    prompt, ids: tokens. logprobs: the sampler's, of ids. advantage: of each of ids. counts: False leaves it out of the
    loss.
    """

    prompt: Sequence[int]
    ids: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    counts: bool = True


def pack(documents: Sequence[Document], seq_len: int, multiple: int, pad_id: int) -> Arrays:
    """Rows of seq_len places, as many as are needed, rounded up to a multiple (and never none) by empty ones.

    Each document is whole. Keys as in the contracts' batch, and sampler_logprobs. float32 but for the log-probs, which
    are float64. Every document must fit a row.
    """
    rows = best_fit([len(d.prompt) + len(d.ids) for d in documents], seq_len, "drop")
    if rows.dropped:
        raise ValueError(f"{rows.dropped} documents do not fit {seq_len} places")
    count = max(1, -(-len(rows) // multiple)) * multiple
    shape = (count, seq_len)
    out = {
        "tokens": np.full(shape, pad_id, np.int64),
        "targets": np.full(shape, -100, np.int64),
        "loss_weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int64),
        "segments": np.zeros(shape, np.int32),
        "advantages": np.zeros(shape, np.float32),
        "sampler_logprobs": np.zeros(shape, np.float64),
    }
    for row in range(len(rows)):
        place = 0
        for number, (index, _, places) in enumerate(rows.pieces(row), 1):
            document, span = documents[index], slice(place, place + places)
            ids = [*document.prompt, *document.ids]
            answer = slice(place + len(document.prompt) - 1, place + places)  # what predicts a sampled token
            out["tokens"][row, span], out["targets"][row, span] = ids[:-1], ids[1:]
            out["positions"][row, span], out["segments"][row, span] = range(places), number
            out["loss_weights"][row, answer] = document.counts
            out["advantages"][row, answer] = document.advantage
            out["sampler_logprobs"][row, answer] = document.logprobs
            place += places
    return out


def pack_updates(
    documents: Sequence[Sequence[Document]], updates: int, seq_len: int, multiple: int, pad_id: int
) -> list[Arrays]:
    """Rows of each update, equally many: groups of documents are shared out in order and stay together."""
    parts = np.array_split(np.arange(len(documents)), updates)
    packed = [pack([d for i in part for d in documents[i]], seq_len, multiple, pad_id) for part in parts]
    most = max(len(part["tokens"]) for part in packed)
    empty = pack((), seq_len, multiple, pad_id)
    for part in packed:
        while len(part["tokens"]) < most:
            part.update({key: np.concatenate([part[key], empty[key]]) for key in part})
    return packed


def own_rows(packed: Sequence[Arrays], rank: int, ranks: int) -> Arrays:
    """The rows of a rank: of each update in turn its equal part."""
    each = [{key: np.array_split(value, ranks)[rank] for key, value in part.items()} for part in packed]
    return {key: np.concatenate([part[key] for part in each]) for key in each[0]}
