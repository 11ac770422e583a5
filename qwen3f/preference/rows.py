"""Pairs in packed rows: documents 2k − 1 and 2k are the better and the worse answer of pair k.

B rows · T places · S documents of a row, at most · P = ⌈S / 2⌉ pairs of a row, at most
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f.train.objective import Batch, document_sums, has_document, predicted, segments_of


def split_pairs(values_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(values of the better answers [B, P], values of the worse answers [B, P])."""
    even = F.pad(values_BS, (0, values_BS.shape[1] % 2))
    return even[:, ::2], even[:, 1::2]


def join_pairs(values_BP: Tensor, size: int) -> Tensor:
    """[B, S], S = size: the value of a pair at the document of its better answer, 0 at that of the worse one."""
    return torch.stack((values_BP, torch.zeros_like(values_BP)), 2).flatten(1)[:, :size]


def has_pair(rows: Batch) -> Tensor:
    """bool [B, P]: whether the row has a pair of this number."""
    return split_pairs(has_document(rows))[0]


def count_pairs(rows: Batch) -> Tensor:
    """The number of pairs in the rows, a scalar tensor."""
    return has_pair(rows).sum()


def sums_of(values: Tensor, rows: Batch) -> Tensor:
    """[B, S]: the sum of values [B, T] over each document."""
    segments = segments_of(rows)
    return document_sums(values, segments, segments.shape[1])


def counted(rows: Batch) -> Tensor:
    """[B, T]: the loss weights of predicted tokens, else 0. An objective of log-probabilities counts the same."""
    return torch.where(predicted(rows), rows["loss_weights"], 0)


def scores_at_ends(scores_BT: Tensor, rows: Batch) -> Tensor:
    """[B, S]: the score at the last place of each document, 0 where there is no such document."""
    return sums_of(torch.where(last_places(rows), scores_BT, 0), rows)


def last_places(rows: Batch) -> Tensor:
    """bool [B, T]: the last place of each document. Only segments decide, never token ids."""
    segments = segments_of(rows)
    ends = torch.ones_like(segments, dtype=torch.bool)
    ends[:, :-1] = segments[:, 1:] != segments[:, :-1]
    return ends & (segments > 0)
