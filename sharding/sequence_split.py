"""How a sequence is cut over the cp axis, and what each rank's queries see of each rank's keys.

The cut is load-balanced: of 2·cp chunks of equal length rank r holds chunk r and chunk 2·cp − 1 − r, and with them as
much of the causal triangle as every other rank. Places rise along a rank's positions, so a run of keys in the whole
sequence is a run of keys on every rank: causality and documents together are one kernels.KeyRanges a pair of ranks.

B batch · L positions of the whole sequence · T positions of a rank, L / cp
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.key_ranges import KeyRanges, key_ranges, ranges_from_segments
from qwen3f.errors import UserError
from sharding.axes import Axis

# The batch's keys (contracts), by whether their last dimension is the sequence.
SEQUENCE_KEYS = frozenset(
    (
        "tokens",
        "targets",
        "loss_weights",
        "positions",
        "segments",
        "real",
        "visual_index",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "margins",
        "temperature",
    )
)
WHOLE_KEYS = frozenset(("index", "pixel_values", "grids"))


class RingRanges(NamedTuple):
    """KeyRanges of every step of the ring, int32 [cp, B, T]: at step i the keys are those of the rank i places before.

    Fields as in kernels.key_ranges.KeyRanges.
    """

    lo: Tensor
    hi: Tensor
    first: Tensor
    last: Tensor

    def at(self, step: int) -> KeyRanges:
        return KeyRanges(*(x[step] for x in self))


def check_length(length: int, size: int) -> None:
    """UserError unless `length` positions can be cut over `size` ranks."""
    if size > 1 and (length < 2 * size or length % (2 * size)):
        fitting = max(1, round(length / (2 * size))) * 2 * size
        raise UserError(
            f"config.seq_len={length} cannot be cut over cp={size}: each rank holds two of {2 * size} equal "
            f"chunks; write config.seq_len={fitting} (any multiple of {2 * size}), or another cp in config.mesh"
        )


def split_sequence(batch: Mapping[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """This rank's part of a batch of whole rows.

    Tensors of SEQUENCE_KEYS go from [..., L] to [..., T], those of WHOLE_KEYS stay. Two keys are added, which a rank
    could not make from its part: starts, int32 [B, T], the place in the whole row where the token's document begins (0
    without segments), and positions, the place in the row, if there are none. With cp 1 nothing is done.

    Raises UserError for a length that does not divide (see check_length), ValueError for a key that is in neither set.
    """
    if axis.size == 1:
        return dict(batch)
    if unknown := batch.keys() - SEQUENCE_KEYS - WHOLE_KEYS:
        raise ValueError(
            f"is the batch's {', '.join(sorted(unknown))} cut over cp? "
            "add it to SEQUENCE_KEYS or WHOLE_KEYS in sharding/sequence_split.py"
        )
    tokens, segments = batch["tokens"], batch.get("segments")
    check_length(tokens.shape[-1], axis.size)
    places = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    starts = torch.zeros_like(tokens, dtype=torch.int32) if segments is None else ranges_from_segments(segments).lo
    whole = {"positions": places, **batch, "starts": starts}
    return {key: x if key in WHOLE_KEYS else _part(x, axis) for key, x in whole.items()}


def merge_sequence(gathered: Tensor, size: int) -> Tensor:
    """[..., L] in the sequence's order, from the ranks' parts [..., T] concatenated in the order of ranks."""
    chunks = gathered.chunk(2 * size, -1)  # rank r's are number 2r and 2r + 1
    return gathered if size == 1 else torch.cat([*chunks[::2], *chunks[::-2]], -1)


def ring_ranges(starts_BT: Tensor, axis: Axis) -> RingRanges:
    """What this rank's queries see at every step: of their own document, what is not after themselves.

    starts_BT: this rank's part, as split_sequence gives it; zeros for attention across documents.
    """
    chunk, final = starts_BT.shape[1] // 2, 2 * axis.size - 1
    local = torch.arange(2 * chunk, device=starts_BT.device)
    place = torch.where(local < chunk, local + axis.index * chunk, local + (final - 1 - axis.index) * chunk)
    after_BT = (place + 1).expand_as(starts_BT)

    def keys_before(bound_BT: Tensor, rank: int) -> Tensor:
        """How many of the rank's keys stand before a place of the whole sequence."""
        return sum((bound_BT - c * chunk).clamp(0, chunk) for c in (rank, final - rank))

    ranks = [(axis.index - step + axis.size) % axis.size for step in range(axis.size)]
    steps = [key_ranges(keys_before(starts_BT, r), keys_before(after_BT, r), 2 * chunk) for r in ranks]
    return RingRanges(*(torch.stack(field) for field in zip(*steps)))


def _part(x: Tensor, axis: Axis) -> Tensor:
    chunk = x.shape[-1] // (2 * axis.size)
    return torch.cat([x.narrow(-1, c * chunk, chunk) for c in (axis.index, 2 * axis.size - 1 - axis.index)], -1)
