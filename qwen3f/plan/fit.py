"""What to change so that a run fits: the smallest change of its configuration that does, found by planning others.

Which of two changes is the smaller, the first of these that tells them apart:

1. the same devices, before twice, four times … as many of them, as dp, tp or pp; another card stands beside those;
2. fewer keys beside that;
3. what comes first in `_SETTINGS`: what costs least time first, and what changes rounding last;
4. of meshes: the one whose step is the fastest, by the plan.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator

import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.plan.case import Case
from qwen3f.plan.config import from_config
from qwen3f.plan.hardware import TABLE, Hardware
from qwen3f.plan.make import make
from qwen3f.plan.memory import leaves, peak, room, state_bytes
from sharding.mesh import MeshShape

Values = tuple[tuple[str, object], ...]  # (key of the configuration, value)

# Of one key no two are tried together. Values that a configuration has already are left out.
_SETTINGS: Values = (
    ("microbatches", 0),
    ("fsdp.enabled", True),
    ("fsdp.shard_size", 0),
    ("model.gradient_checkpointing", "selective"),
    ("fsdp.reshard", True),
    ("model.gradient_checkpointing", "full"),
    ("fsdp.reduce", "compute"),
    ("dtype", "bfloat16"),
)
_FACTORS = tuple(2**n for n in range(1, 7))  # of the devices


@dataclasses.dataclass(frozen=True)
class Change:
    """values: what to write. case: with them. peak: its fullest rank's bytes."""

    values: Values
    case: Case
    peak: int

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.values)


def smallest_changes(config: ConfigDict) -> tuple[Change, ...]:
    """The smallest change with which a configuration that does not fit does. Where the same devices can't do it: that
    to more of them, and beside it that to cards with more memory, if there are such. None where nothing tried fits.
    """
    settings = list(_combined(config))
    for values in settings[1:]:
        if (change := _fitting(config, values)) is not None:
            return (change,)
    own = from_config(config)
    fewest = _state(own) / room(own.hardware)  # devices, for the state alone
    factors = [factor for factor in _FACTORS if factor * own.mesh.size >= fewest]
    more = (_fastest(config, factor, own.hardware.node, values) for factor in factors for values in settings)
    cards = (_fitting(config, (*card, *values)) for values in settings for card in _cards(config, own.hardware))
    found = [next((change for change in changes if change is not None), None) for changes in (more, cards)]
    return tuple(change for change in found if change is not None)


def _state(own: Case) -> float:
    """Bytes of the whole state, once: the fewest that another dtype leaves of it."""
    alone = dataclasses.replace(own, mesh=MeshShape())
    return sum(state_bytes(alone, leaves(alone))) * torch.float32.itemsize / own.master


def _fitting(config: ConfigDict, values: Values) -> Change | None:
    """The change of these values, if the configuration then fits; None too where it could not run."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(dict(values))
    try:
        case = from_config(other)
        most = peak(case, leaves(case))
    except UserError:
        return None
    return Change(values, case, most) if most <= room(case.hardware) else None


def _combined(config: ConfigDict) -> Iterator[Values]:
    """No settings, one, two …, of each number in their order."""
    there = config.to_dict()
    open_ = [(key, value) for key, value in _SETTINGS if _differs(there, key, value)]
    for count in range(len({key for key, _ in open_}) + 1):
        for values in itertools.combinations(open_, count):
            if len({key for key, _ in values}) == count:
                yield values


def _differs(there: dict, key: str, value: object) -> bool:
    for name in key.split("."):
        there = there[name]
    if key == "dtype":  # auto is bfloat16 on a card
        return there not in ("auto", value)
    if value == "selective":
        return there == "none"
    return there != value


def _fastest(config: ConfigDict, factor: int, node: int, values: Values) -> Change | None:
    """The change to so many times the devices, with these values too, whose step is the fastest of those that fit."""
    changes = (_fitting(config, (("mesh", mesh), *values)) for mesh in _larger(config, factor, node))
    there = [change for change in changes if change is not None]
    return min(there, key=lambda change: make(change.case).time.step, default=None)


def _larger(config: ConfigDict, factor: int, node: int) -> Iterator[str]:
    """config.mesh with so many times the devices, a power of two, as dp, tp and pp in every way that leaves tp within a
    node."""
    sizes = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", config.mesh)}
    for doubled in itertools.combinations_with_replacement(("dp", "tp", "pp"), factor.bit_length() - 1):
        larger = dict(sizes)
        for axis in doubled:
            larger[axis] = 2 * larger.get(axis, 1)
        if larger.get("tp", 1) <= max(node, sizes.get("tp", 1)):
            yield ",".join(f"{axis}{size}" for axis, size in larger.items())


def _cards(config: ConfigDict, own: Hardware) -> Iterable[Values]:
    """Cards with more memory than the configuration's own, with the numbers that it changes, but the memory's."""
    _, *changed = (part.strip() for part in config.hardware.split(","))
    kept = [part for part in changed if not part.startswith("memory")]
    rows = sorted(TABLE.values(), key=lambda row: row.memory)
    return [
        (("hardware", ",".join((row.name, *kept))),) for row in rows if row.memory > own.memory and row.name != own.name
    ]
