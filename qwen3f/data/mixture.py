"""Several packed datasets as one, in fixed shares: which example stands at a place is a function of (place, seed).

A cycle of CYCLE places gives each dataset its share of them exactly, in an order that changes from cycle to cycle. The
examples of a dataset come in its own shuffled, endless order, so over a long run the shares are the weights, whatever
the datasets' sizes; a small one simply begins again sooner.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3f.data.packing import Example, PackedDataset
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError

CYCLE = 10_000  # shares are exact to this fraction


@dataclass(frozen=True)
class Mixture:
    """The datasets, and how many of CYCLE places each has; see `make_mixture`.

    An example's index is its index in its dataset, plus the lengths of the datasets before it.
    """

    parts: tuple[PackedDataset, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise AssertionError("unreachable: i is below the sum of the lengths")

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The examples at `places` of the endless order; int64 [n] -> int64 [n]."""
        cycles = places // CYCLE
        # Each cycle visits each slot once, and a slot says whose it is and how many of its kind come before it.
        slot = example_index(places, CYCLE, seed)
        ends = np.cumsum(self.slots)
        part = np.searchsorted(ends, slot, side="right")
        out = np.empty_like(slot)
        offset = 0
        for number, (dataset, count) in enumerate(zip(self.parts, self.slots)):
            mine = part == number
            turn = cycles[mine] * count + slot[mine] - (ends[number] - count)
            out[mine] = offset + example_index(turn, len(dataset), seed + 1 + number)
            offset += len(dataset)
        return out


def make_mixture(parts: Sequence[PackedDataset], weights: Sequence[float]) -> Mixture:
    """A mixture in which dataset i has the share weights[i] / Σ weights of the examples, rounded to 1/CYCLE.

    Weights are positive and finite, as parse_weights gives them. Raises UserError for one too small for a single place
    of a cycle.
    """
    exact = np.array(weights) / sum(weights) * CYCLE
    slots = np.floor(exact).astype(int)
    for number in np.argsort(slots - exact, kind="stable")[: CYCLE - slots.sum()]:  # the largest remainders
        slots[number] += 1
    if not slots.all():
        small = weights[int(np.argmin(slots))]
        raise UserError(f"data.mixture has the weight {small} of {sum(weights)}: give at least 1/{CYCLE} of the sum.")
    return Mixture(tuple(parts), tuple(map(int, slots)))
