"""How a sequence is cut over the cp axis, and what each rank's queries see of each rank's keys.

The cut is load-balanced (zigzag): the sequence is split into 2·cp equal chunks, and rank r holds chunks r and
2·cp − 1 − r. So every rank computes the same share of the causal triangle. A rank's positions are in rising order, so
keys that are contiguous in the whole sequence are contiguous on every rank. One kernels.KeyRanges per pair of ranks
therefore describes causality and documents together.

B batch · L positions of the whole sequence · T positions of a rank, L / cp
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.key_ranges import KeyRanges, key_ranges, ranges_from_segments
from qwen3f.errors import UserError
from sharding.axes import Axis

# The batch's keys: SEQUENCE_KEYS have the sequence as their last dimension and are cut; WHOLE_KEYS are not cut.
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
    """KeyRanges for every step of the ring, int32 [cp, B, T]. At step i the keys come from the rank i places earlier.

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
        fitting = max(1, length // (2 * size)) * 2 * size  # not above it: the model may have no more positions
        raise UserError(
            f"config.seq_len={length} cannot be cut over cp={size}: each rank holds two of {2 * size} equal "
            f"chunks; write config.seq_len={fitting} (any multiple of {2 * size}), or another cp in config.mesh"
        )


def split_sequence(batch: Mapping[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """This rank's part of a batch whose rows are whole. With cp 1, the batch unchanged.

    Tensors of SEQUENCE_KEYS are cut from [..., L] to [..., T]; those of WHOLE_KEYS stay. Two keys are added that a rank
    could not compute from its part: starts, int32 [B, T], the index in the whole row at which the token's document
    begins (0 without segments); and, if the batch has no positions, positions, the token's index in the whole row.

    Raises UserError for a length that does not divide (see check_length), ValueError for a key that is in neither set.
    """
    if axis.size == 1:
        return dict(batch)
    if unknown := batch.keys() - SEQUENCE_KEYS - WHOLE_KEYS:
        raise ValueError(
            f"the batch has unknown keys: {', '.join(sorted(unknown))}; in sharding/sequence_split.py add each to "
            "SEQUENCE_KEYS if its last dimension is the sequence, else to WHOLE_KEYS"
        )
    tokens, segments = batch["tokens"], batch.get("segments")
    check_length(tokens.shape[-1], axis.size)
    places = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    starts = torch.zeros_like(tokens, dtype=torch.int32) if segments is None else ranges_from_segments(segments).lo
    whole = {"positions": places, **batch, "starts": starts}
    return {key: x if key in WHOLE_KEYS else _part(x, axis) for key, x in whole.items()}


def merge_sequence(gathered: Tensor, size: int) -> Tensor:
    """[..., L] in the sequence's order. gathered: the ranks' parts [..., T], concatenated in the order of ranks."""
    chunks = gathered.chunk(2 * size, -1)  # rank r has chunks 2r and 2r + 1 of this list
    return gathered if size == 1 else torch.cat([*chunks[::2], *chunks[::-2]], -1)


def ring_ranges(starts_BT: Tensor, axis: Axis) -> RingRanges:
    """The keys that this rank's queries attend to at every step: those of the same document, not after the query.

    starts_BT: this rank's `starts` from split_sequence; zeros for attention across documents.
    """
    chunk, final = starts_BT.shape[1] // 2, 2 * axis.size - 1
    local = torch.arange(2 * chunk, device=starts_BT.device)
    place = torch.where(local < chunk, local + axis.index * chunk, local + (final - 1 - axis.index) * chunk)
    after_BT = (place + 1).expand_as(starts_BT)

    def keys_before(bound_BT: Tensor, rank: int) -> Tensor:
        """How many of the keys of `rank` have an index in the whole sequence below bound_BT."""
        return sum((bound_BT - c * chunk).clamp(0, chunk) for c in (rank, final - rank))

    ranks = [(axis.index - step + axis.size) % axis.size for step in range(axis.size)]
    steps = [key_ranges(keys_before(starts_BT, r), keys_before(after_BT, r), 2 * chunk) for r in ranks]
    return RingRanges(*(torch.stack(field) for field in zip(*steps)))


def _part(x: Tensor, axis: Axis) -> Tensor:
    chunk = x.shape[-1] // (2 * axis.size)
    return torch.cat([x.narrow(-1, c * chunk, chunk) for c in (axis.index, 2 * axis.size - 1 - axis.index)], -1)
