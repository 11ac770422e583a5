"""Pairs in packed rows: documents 2k − 1 and 2k are the better and the worse answer of pair k.

B rows · T places · S documents a row at most · P = ⌈S / 2⌉ pairs a row at most
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f.train.objective import Batch, document_sums, has_document, predicted, segments_of


def split_pairs(values_BS: Tensor) -> tuple[Tensor, Tensor]:
    """([B, P] of the better answers, [B, P] of the worse ones)."""
    even = F.pad(values_BS, (0, values_BS.shape[1] % 2))
    return even[:, ::2], even[:, 1::2]


def join_pairs(values_BP: Tensor, size: int) -> Tensor:
    """[B, S]: a pair's number at its better answer's document, 0 at the other's."""
    return torch.stack((values_BP, torch.zeros_like(values_BP)), 2).flatten(1)[:, :size]


def has_pair(rows: Batch) -> Tensor:
    """bool [B, P]"""
    return split_pairs(has_document(rows))[0]


def count_pairs(rows: Batch) -> Tensor:
    """How many pairs the rows hold, a scalar tensor."""
    return has_pair(rows).sum()


def sums_of(values: Tensor, rows: Batch) -> Tensor:
    """[B, S]: the sum of values [B, T] over each document."""
    segments = segments_of(rows)
    return document_sums(values, segments, segments.shape[1])


def counted(rows: Batch) -> Tensor:
    """[B, T]: the weights of what is predicted, else 0: what an objective of log-probabilities counts."""
    return torch.where(predicted(rows), rows["loss_weights"], 0)


def scores_at_ends(scores_BT: Tensor, rows: Batch) -> Tensor:
    """[B, S]: of each document the number at its last place, 0 where there is no such document."""
    return sums_of(torch.where(last_places(rows), scores_BT, 0), rows)


def last_places(rows: Batch) -> Tensor:
    """bool [B, T]: the last place of each document, by its segment alone, never by an id."""
    segments = segments_of(rows)
    ends = torch.ones_like(segments, dtype=torch.bool)
    ends[:, :-1] = segments[:, 1:] != segments[:, :-1]
    return ends & (segments > 0)
