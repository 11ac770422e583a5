"""Ranks and packs answers that were just sampled into a step's rows.

R rows over all ranks · T places of a row
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.packing.best_fit import best_fit
from qwen3f.data.packing.best_fit_dataset import best_fit_row
from qwen3f.data.packing.concat import IGNORED_TARGET


class Written(NamedTuple):
    """An answer. ids: the tokens that the model wrote, with <|im_end|> if the answer ended. text: without <|im_end|>.
    ended: whether the answer ended by itself."""

    ids: tuple[int, ...]
    text: str
    ended: bool


class NewPair(NamedTuple):
    """Ids of a prompt and of its better and worse answer."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def best_and_worst(answers: Sequence[Written], rewards: Sequence[float | None]) -> tuple[int, int] | None:
    """(index of the answer with the highest reward, index of that with the lowest); None if they are equal.

    An answer that did not end ranks below every answer that did, whatever its reward. Answers without a reward (None)
    are left out. Of equal answers the first is taken. A best and a worst answer with the same ids count as equal.
    """
    ranked = [(a.ended, r if a.ended else 0.0) for a, r in zip(answers, rewards, strict=True) if r is not None]
    places = [i for i, reward in enumerate(rewards) if reward is not None]
    if not ranked:
        return None
    best, worst = (pick(range(len(ranked)), key=lambda i: ranked[i]) for pick in (max, min))
    if ranked[best] == ranked[worst] or answers[places[best]].ids == answers[places[worst]].ids:
        return None
    return places[best], places[worst]


def pack(pairs: Sequence[NewPair], seq_len: int, multiple: int, pad_id: int) -> dict[str, Tensor]:
    """A step's rows [R, T]. R is a multiple of `multiple`; further rows are padding. Keys as in `PairDataset`.

    Every pair must fit into a row.
    """
    documents = [(len(p.prompt), np.array(p.prompt + answer, np.int64)) for p in pairs for answer in p[1:]]
    places = np.array([len(ids) - 1 for _, ids in documents], np.int64)
    rows = best_fit(places[::2] + places[1::2] + 1, seq_len, "drop")
    if rows.dropped:
        raise ValueError(f"{rows.dropped} of {len(pairs)} pairs do not fit into {seq_len} places")
    examples = []
    for row in range(len(rows)):
        own = [documents[2 * pair + side] for pair, _, _ in rows.pieces(row) for side in (0, 1)]
        trained = [np.arange(1, len(ids)) >= begin for begin, ids in own]
        examples.append(best_fit_row([ids for _, ids in own], seq_len, row, pad_id=pad_id, trained=trained))
    blank = {
        key: np.full_like(value, IGNORED_TARGET if key == "targets" else pad_id if key == "tokens" else 0)
        for key, value in examples[0].items()
    }
    examples += [blank] * (-len(examples) % multiple)
    return {key: torch.from_numpy(np.stack([e[key] for e in examples])) for key in blank if key != "index"}
