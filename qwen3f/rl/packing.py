"""Completions with their prompts as rows of documents, without padding between; the same rows on every rank.

R rows · T places
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen3f.config import ModelConfig
from qwen3f.data.packing.best_fit import best_fit
from qwen3f.infer.pictures import Pictures
from qwen3f.rl.sight import Arrays, with_pixels

Shown = list[list[Pictures]]


@dataclasses.dataclass(frozen=True)
class Document:
    """A prompt with a completion.

    prompt: its tokens. ids: the tokens of the completion. logprobs: the sampler's, of ids. advantage: of every token of
    ids. counts: False leaves the document out of the loss. pictures: of the prompt.
    """

    prompt: Sequence[int]
    ids: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    counts: bool = True
    pictures: Pictures | None = None


def pack(documents: Sequence[Document], seq_len: int, multiple: int, pad_id: int) -> tuple[Arrays, Shown]:
    """(arrays [R, T] of packed rows, T = seq_len; the pictures of each row).

    R is a multiple of `multiple`, and not 0; rows that are not needed are empty. No document is cut, so each must fit a
    row. Keys: tokens, targets, loss_weights, positions, segments, advantages (float32) and sampler_logprobs
    (float64).
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
    shown: list[list[Pictures]] = [[] for _ in range(count)]
    for row in range(len(rows)):
        place = 0
        for number, (index, _, places) in enumerate(rows.pieces(row), 1):
            document, span = documents[index], slice(place, place + places)
            shown[row] += [document.pictures] if document.pictures is not None else []
            ids = [*document.prompt, *document.ids]
            answer = slice(place + len(document.prompt) - 1, place + places)  # places that predict a sampled token
            out["tokens"][row, span], out["targets"][row, span] = ids[:-1], ids[1:]
            out["positions"][row, span], out["segments"][row, span] = range(places), number
            out["loss_weights"][row, answer] = document.counts
            out["advantages"][row, answer] = document.advantage
            out["sampler_logprobs"][row, answer] = document.logprobs
            place += places
    return out, shown


def pack_updates(
    documents: Sequence[Sequence[Document]],
    updates: int,
    seq_len: int,
    multiple: int,
    pad_id: int,
    cfg: ModelConfig | None = None,
) -> list[Arrays]:
    """Packed rows of each update; all updates get the same number of rows.

    documents: by group. Groups are divided among the updates in order, and a group stays in one update; with fewer
    groups than updates, some have no tokens, and a training step leaves those out. cfg: given for
    a model with pictures; the rows then have their pixels (sight.with_pixels).
    """
    parts = np.array_split(np.arange(len(documents)), updates)
    packed = [pack([d for i in part for d in documents[i]], seq_len, multiple, pad_id) for part in parts]
    most = max(len(part["tokens"]) for part, _ in packed)
    empty, nothing = pack((), seq_len, multiple, pad_id)
    for part, shown in packed:
        if missing := (most - len(part["tokens"])) // multiple:
            part.update({key: np.concatenate([part[key], *[empty[key]] * missing]) for key in part})
            shown += nothing * missing
    if cfg is None:
        return [part for part, _ in packed]
    whole = {key: np.concatenate([part[key] for part, _ in packed]) for key in empty}
    whole = with_pixels(whole, [row for _, shown in packed for row in shown], cfg)  # one shape for all updates
    each = {key: np.split(values, updates) for key, values in whole.items()}
    return [{key: values[number] for key, values in each.items()} for number in range(updates)]


def own_rows(packed: Sequence[Arrays], rank: int, ranks: int) -> Arrays:
    """The rows of a rank: its equal share of each update, one update after the other."""
    each = [{key: np.array_split(value, ranks)[rank] for key, value in part.items()} for part in packed]
    return {key: np.concatenate([part[key] for part in each]) for key in each[0]}
