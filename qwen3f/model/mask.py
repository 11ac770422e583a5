"""Which query may see which key: causal, and within one document when the batch is packed.

A packed row's documents are runs of equal segment numbers. Padding (segment 0) is a run like any other, so its rows
attend to themselves and never produce NaN; their loss weight is 0.

B batch · T sequence · N blocks of BLOCK positions
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class AttentionMask(NamedTuple):
    """What a block's attention needs to know; at most one of the two is set, none means plain causal.

    allowed: bool [B, 1, T, T], True where attention is allowed (dense form; CPU and reference).
    blocks: the same as a block-sparse mask for flex_attention (compiled CUDA).
    """

    allowed: Tensor | None = None
    blocks: BlockMask | None = None


def document_runs(segments_BT: Tensor) -> Tensor:
    """int64 [B, T]: the run number of each position, increasing by one wherever the segment changes."""
    changed = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.nn.functional.pad(changed.to(torch.int64).cumsum(1), (1, 0))


def dense_mask(segments_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T]: key t' ≤ query t of the same run."""
    runs = document_runs(segments_BT)
    length = runs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=runs.device).tril()
    return ((runs[:, :, None] == runs[:, None, :]) & causal)[:, None]


def block_mask(segments_BT: Tensor) -> BlockMask:
    """The same mask for flex_attention, built in O((T/BLOCK)²) from the first and last run of each block.

    Runs never decrease along a row, so a query block needs a key block exactly if it is not later and their run
    ranges overlap; the pair is fully allowed if it is strictly earlier and both lie inside one run. T must be a
    multiple of BLOCK.
    """
    runs = document_runs(segments_BT)
    length = runs.shape[1]
    first, last = runs[:, ::BLOCK], runs[:, BLOCK - 1 :: BLOCK]
    order = torch.arange(length // BLOCK, device=runs.device)
    earlier, same = order[None, :] < order[:, None], order[None, :] == order[:, None]
    needed = (last[:, None, :] >= first[:, :, None]) & (earlier | same)
    single = first == last
    full = needed & earlier & single[:, :, None] & single[:, None, :]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (runs[b, q] == runs[b, k])

    return BlockMask.from_kv_blocks(
        *_compact(needed & ~full), *_compact(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def _compact(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """(count [B, 1, N], key-block indices with the wanted ones first [B, 1, N, N]), int32."""
    count = wanted_BNN.sum(-1, dtype=torch.int32)
    index = torch.argsort(wanted_BNN.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], index[:, None].contiguous()
