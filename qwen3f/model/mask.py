"""Which query may see which key: causal, and within one document when the batch is packed.

A packed row's documents are runs of equal segment numbers. Padding (segment 0) is a run like any other, so its rows
attend to themselves and never produce NaN; their loss weight is 0.

B batch · T sequence
"""

from typing import NamedTuple

from torch import Tensor

from kernels.key_ranges import KeyRanges
from sharding.zigzag import RingRanges


class AttentionMask(NamedTuple):
    """What a block's attention needs to know; at most one is set, none means plain causal.

    allowed: bool [B, 1, T, T], True where attention is allowed (for torch's attention and the formula).
    ranges: the same as the run of keys that each query sees (for kernels.flash_attention).
    ring: the same for every step of ring attention, where the sequence is cut over cp (for sharding.ring).
    """

    allowed: Tensor | None = None
    ranges: KeyRanges | None = None
    ring: RingRanges | None = None
