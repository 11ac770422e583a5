"""Attention masks in which every query sees one contiguous range of keys, lo ≤ key < hi, and lo and hi never decrease.

Causal attention, packed documents, sliding windows, partly filled caches and the chunks of ring attention have this
form. From the bounds of the first and last query of a tile, a kernel knows which tiles are empty and which need no
mask.

B batch · T queries · S keys
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyRanges(NamedTuple):
    """Query t sees the keys lo[t] … hi[t]−1 (none if hi ≤ lo); lo and hi must never decrease along a row.

    lo, hi: int32 [B, T], 0 ≤ lo, hi ≤ S. first, last: int32 [B, S], the same from the view of the keys: all queries
    that see key s are in first[s] … last[s]−1. `key_ranges` computes them.
    """

    lo: Tensor
    hi: Tensor
    first: Tensor
    last: Tensor


def key_ranges(lo_BT: Tensor, hi_BT: Tensor, keys: int) -> KeyRanges:
    """KeyRanges from lo and hi, of any integer dtype. They are not checked, because that would wait for the device."""
    lo, hi = (x.to(torch.int32).contiguous() for x in (lo_BT, hi_BT))
    key = torch.arange(keys, dtype=torch.int32, device=lo.device).expand(lo.shape[0], keys).contiguous()
    first = torch.searchsorted(hi, key, right=True, out_int32=True)
    last = torch.searchsorted(lo, key, right=True, out_int32=True)
    return KeyRanges(lo, hi, first, last)


def document_ranges(starts_BT: Tensor, ends_BT: Tensor, causal: bool) -> KeyRanges:
    """KeyRanges for self-attention within documents; the document of position t is starts[t] … ends[t]−1."""
    length = starts_BT.shape[1]
    after = torch.arange(1, length + 1, dtype=torch.int32, device=starts_BT.device)
    return key_ranges(starts_BT, after.expand_as(starts_BT) if causal else ends_BT, length)


def ranges_from_segments(segments_BT: Tensor, causal: bool = True) -> KeyRanges:
    """KeyRanges for documents given as runs of equal segment numbers. Padding (0) is a run too, so every query sees at
    least one key."""
    length = segments_BT.shape[1]
    place = torch.arange(length, dtype=torch.int32, device=segments_BT.device)
    new = torch.ones_like(segments_BT, dtype=torch.bool)
    new[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = torch.where(new, place, 0).cummax(1).values
    is_last = new.roll(-1, 1)
    is_last[:, -1] = True
    ends = torch.where(is_last, place + 1, length).flip(1).cummin(1).values.flip(1)
    return document_ranges(starts, ends, causal)


def ranges_from_cu_seqlens(cu_seqlens: Tensor, length: int, causal: bool = True) -> KeyRanges:
    """KeyRanges for one packed row of `length` tokens, B = 1.

    cu_seqlens: integers [n + 1], non-decreasing from 0; document i is cu[i] … cu[i+1]−1. Repeated numbers are empty
    documents, so a tensor of static size can be padded with its last number. Tokens from the last number on see no key:
    their output is 0 and their log-sum-exp −∞.
    """
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [documents + 1], got {tuple(cu_seqlens.shape)}")
    place = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    cu = cu_seqlens.to(torch.int32)
    document = torch.searchsorted(cu, place, right=True)  # 1 … n, n + 1 beyond the last
    ends = torch.nn.functional.pad(cu, (0, 1), value=length)
    starts, ends = cu[document - 1], ends[document]
    beyond = document == len(cu)
    hi = torch.where(beyond, starts, place + 1 if causal else ends)
    return key_ranges(starts[None], hi[None], length)


def dense_mask(ranges: KeyRanges) -> Tensor:
    """bool [B, 1, T, S], True where attention is allowed."""
    key = torch.arange(ranges.first.shape[1], device=ranges.lo.device)
    return ((key >= ranges.lo[..., None]) & (key < ranges.hi[..., None]))[:, None]
