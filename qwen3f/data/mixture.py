"""Several packed datasets as one, in fixed shares. Which example stands at a place is a function of (place, seed).

In a cycle of CYCLE places each dataset has exactly its share of them, in an order that changes from cycle to cycle. The
examples of a dataset come in its own shuffled order, epoch after epoch. So the shares equal the weights whatever the
datasets' sizes; a small dataset is only repeated more often.

A dataset may have a cap of epochs. At the place where it would give an example beyond the cap, it is dropped, and a new
phase begins, in which the others' shares are renormalised.

As a text, a mixture is "source[=weight],…".
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import Example, PackedDataset
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError
from qwen3f.files import user_path

CYCLE = 10_000  # shares are exact to this fraction
MIXTURE, _CAPS = "--config.data.mixture", "--config.data.max_epochs"
_MOST = 2**40  # examples of a dataset that a cap allows: more than any run reads, and places stay below 2^63

Part = PackedDataset | BestFitDataset | PairDataset


class _Phase(NamedTuple):
    """From place `start` on, dataset i has slots[i] of CYCLE places; before `start` it has given used[i] examples."""

    start: int
    slots: tuple[int, ...]
    used: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """The datasets; see `make_mixture`.

    An example's index is its index in its dataset, plus the lengths of the datasets before it.

    Attributes:
        parts: the datasets.
        weights: positive, one for each dataset.
        caps: the most examples that each dataset gives, None for no limit.
    """

    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    caps: tuple[int | None, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def slots(self) -> tuple[int, ...]:
        """How many of CYCLE places each dataset has while none is dropped."""
        return _slots(self.weights)

    @property
    def padding(self) -> float:
        """Share of the places that are padding, while no dataset is dropped."""
        return sum(part.padding * n for part, n in zip(self.parts, self.slots)) / CYCLE

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise AssertionError("unreachable: i is below the sum of the lengths")

    def total(self, seed: int) -> int | None:
        """Places of the order until every dataset has reached its cap; None if it is endless."""
        return _phases(self.weights, self.caps, seed)[1]

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The examples at `places` of the order; int64 [n] -> int64 [n].

        Raises:
            UserError: a place beyond the last one, when every dataset has a cap.
        """
        phases, total = _phases(self.weights, self.caps, seed)
        if total is not None and places.size and places.max() >= total:
            raise UserError(
                f"{_CAPS} leaves {total} examples and example {places.max()} is asked for: raise it, "
                "lower steps, or give more text."
            )
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        out = np.empty(places.shape, np.int64)
        at = np.searchsorted([phase.start for phase in phases], places, side="right") - 1
        for number in _different(at):
            phase = phases[number]
            cycles, within = np.divmod(places - phase.start, CYCLE)
            for cycle in _different(cycles[at == number]):
                mine = (at == number) & (cycles == cycle)
                part, rank = (table[within[mine]] for table in _cycle(phase.slots, number, cycle, seed))
                turn = np.array(phase.used)[part] + cycle * np.array(phase.slots)[part] + rank
                found = np.empty(part.shape, np.int64)
                for i in _different(part):
                    found[part == i] = offsets[i] + example_index(turn[part == i], len(self.parts[i]), seed + 1 + i)
                out[mine] = found
        return out


def make_mixture(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    max_epochs: Sequence[float | None] | None = None,
    flag: str = MIXTURE,
) -> Mixture:
    """A mixture in which dataset i has the share weights[i] / Σ weights of the examples, rounded to 1/CYCLE.

    Args:
        parts: the datasets.
        weights: positive and finite, as parse_weights gives them.
        max_epochs: cap of each dataset, None for no limit; a fraction of an epoch is rounded down to whole examples.
        flag: the flag that the weights were written for, for the message.

    Raises UserError for a weight of less than a whole place of a cycle, or a cap that leaves no example.
    """
    caps = []
    for part, epochs in zip(parts, max_epochs or [None] * len(parts)):
        caps.append(None if epochs is None else int(min(epochs * len(part), _MOST)))
        if caps[-1] == 0:
            raise UserError(f"{_CAPS}={epochs} leaves none of {len(part)} examples: raise it.")
    mixture = Mixture(tuple(parts), tuple(map(float, weights)), tuple(caps))
    # A weight of less than one place could be rounded up now, and down to 0 when another dataset is dropped.
    if (small := min(weights)) / sum(weights) < 1 / CYCLE:
        raise UserError(f"{flag} has the weight {small} of {sum(weights)}: make it at least 1/{CYCLE} of the sum.")
    return mixture


def _different(numbers: np.ndarray) -> list[int]:
    """The numbers in order, each once; instead of np.unique, which is not safe in a thread.

    At its first call np.unique imports code that goes through numpy's table of types. A loader's thread would do that
    while another thread may import what adds types to the table (ml_dtypes, under JAX), which now and then is an error.
    """
    return sorted(set(numbers.tolist()))


def _slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Places of a cycle by dataset, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * CYCLE
    slots = np.floor(exact).astype(int)
    slots[np.argsort(slots - exact, kind="stable")[: CYCLE - slots.sum()]] += 1
    return tuple(map(int, slots))


@functools.lru_cache(maxsize=8)
def _cycle(slots: tuple[int, ...], phase: int, cycle: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(which dataset has each place of a cycle, how many places of that dataset come before it); int64 [CYCLE] each."""
    slot = example_index(cycle * CYCLE + np.arange(CYCLE), CYCLE, seed + (phase << 40))
    part = np.searchsorted(np.cumsum(slots), slot, side="right")
    rank = np.empty(CYCLE, np.int64)
    for i in range(len(slots)):
        rank[part == i] = np.arange((part == i).sum())
    return part, rank


@functools.lru_cache(maxsize=8)
def _phases(
    weights: tuple[float, ...], caps: tuple[int | None, ...], seed: int
) -> tuple[tuple[_Phase, ...], int | None]:
    """The phases, and the place where the last one ends (None: never)."""
    alive = list(range(len(weights)))
    start, used = 0, np.zeros(len(weights), np.int64)
    phases: list[_Phase] = []
    while alive:
        slots = _slots([weights[i] if i in alive else 0.0 for i in range(len(weights))])
        number = len(phases)
        phases.append(_Phase(start, slots, tuple(used.tolist())))
        ends = {}
        for i in alive:
            if (cap := caps[i]) is not None:
                cycle, rest = divmod(cap - int(used[i]), slots[i])
                # The place where it would give one example too many.
                ends[i] = cycle * CYCLE + int(np.flatnonzero(_cycle(slots, number, cycle, seed)[0] == i)[rest])
        if not ends:
            return tuple(phases), None
        first = min(ends, key=lambda i: ends[i])
        cycle, rest = divmod(ends[first], CYCLE)
        part = _cycle(slots, number, cycle, seed)[0][:rest]
        used = used + cycle * np.array(slots) + np.bincount(part, minlength=len(weights))
        start += ends[first]
        alive.remove(first)
    return tuple(phases), start


def parse_weights(mixture: str, flag: str = MIXTURE) -> list[tuple[str, float]]:
    """[(source, weight)]; a weight that is not written is 1. flag: the flag with this text, for messages.

    A source may be "name@DIR". If DIR with its equals sign is the name of an existing directory, the sign begins no
    weight. A directory whose name has a comma must be given by data.root.

    Raises UserError for an empty piece, a source named twice, or a weight that is not a positive number.
    """
    return _parse(mixture, flag, "weight")


def _parse(mixture: str, flag: str, what: str) -> list[tuple[str, float]]:
    parts = []
    for piece in map(str.strip, mixture.split(",")):
        source, separator, written = piece.rpartition("=")
        if not separator or _is_directory(piece):  # as in …/date=2026
            source, written = piece, "1"
        parts.append((source, _positive(written, f"{flag}: {piece!r} has the {what} {written!r}")))
    names = [source for source, _ in parts]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"{flag}={mixture} must name one or more different ones, with commas between: NAME,NAME or "
            "NAME=0.7,NAME=0.3."
        )
    return parts


def parse_caps(text: str, sources: Sequence[str]) -> dict[str, float | None]:
    """Most epochs of each source: "" is no limit, "4" the limit of each, "reasoning=4,fineweb=1" limits only these.

    A source of the mixture is named as there, or without its directory. Raises UserError for a number that is not
    positive, or a source that is not in the mixture.
    """
    caps: dict[str, float | None] = dict.fromkeys(sources)
    if not text:
        return caps
    if "=" not in text:
        return dict.fromkeys(sources, _positive(text, f"{_CAPS}={text}"))
    for name, cap in _parse(text, _CAPS, "number"):
        named = [source for source in sources if name in (source, source.partition("@")[0])]
        if not named:
            raise UserError(f"{_CAPS} names {name!r}, which is not in the mixture: write {', '.join(sources)}.")
        caps |= dict.fromkeys(named, cap)
    return caps


def temper(weights: Mapping[str, float], sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Shares of the sources that `sizes` names: weight · size^(1/temperature), made to sum to 1.

    At temperature 1 shares are in proportion to weight · size; at a high one they are nearly the weights; 0 means
    exactly the weights. Raises UserError for a negative or infinite one.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"config.data.temperature is {temperature}: give 0 (weights as written) or a positive number.")
    largest = max(sizes.values())
    raised = {
        name: weights[name] * ((size / largest) ** (1 / temperature) if temperature else 1.0)
        for name, size in sizes.items()
    }
    return {name: weight / sum(raised.values()) for name, weight in raised.items()}


def _positive(written: str, where: str) -> float:
    try:
        number = float(written)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise UserError(f"{where}: write a positive number, such as 2 or 0.7.")
    return number


def _is_directory(source: str) -> bool:
    directory = source.partition("@")[2]
    return bool(directory) and user_path(directory, f"the mixture's {source}").is_dir()
