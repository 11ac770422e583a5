"""Finds the smallest change of a configuration with which the run fits, by planning changed configurations.

Changes are compared by these criteria, in this order:

1. The number of devices: the same, twice, four times … as many, added to dp, tp or pp. A change to cards with more
   memory is reported in addition to one with more devices.
2. The number of other keys that change; fewer are better.
3. The order in `_SETTINGS`: settings that cost the least time come first, those that change rounding last.
4. For meshes: the planned step time.
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

# A change has at most one value of each key. Values that the configuration already has are left out.
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
_FACTORS = tuple(2**n for n in range(1, 7))  # times as many devices


@dataclasses.dataclass(frozen=True)
class Change:
    """values: the keys to set. case: the resulting Case. peak: peak memory of its fullest rank, in bytes."""

    values: Values
    case: Case
    peak: int

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.values)


def smallest_changes(config: ConfigDict) -> tuple[Change, ...]:
    """The smallest change with which the configuration fits, as a tuple of one.

    If no change on the same devices fits, it returns up to two: the smallest one with more devices, and the smallest
    one with cards of more memory. The tuple is empty if nothing that is tried fits.
    """
    settings = list(_combined(config))
    for values in settings[1:]:
        if (change := _fitting(config, values)) is not None:
            return (change,)
    own = from_config(config)
    fewest = _state(own) / room(own.hardware)  # lower bound for the number of devices: the state must fit
    factors = [factor for factor in _FACTORS if factor * own.mesh.size >= fewest]
    more = (_fastest(config, factor, own.hardware.node, values) for factor in factors for values in settings)
    cards = (_fitting(config, (*card, *values)) for values in settings for card in _cards(config, own.hardware))
    found = [next((change for change in changes if change is not None), None) for changes in (more, cards)]
    return tuple(change for change in found if change is not None)


def _state(own: Case) -> float:
    """Bytes of one copy of the whole state, in float32 (a change may set the dtype to bfloat16)."""
    alone = dataclasses.replace(own, mesh=MeshShape())
    return sum(state_bytes(alone, leaves(alone))) * torch.float32.itemsize / own.master


def _fitting(config: ConfigDict, values: Values) -> Change | None:
    """The change that sets these values; None if the configuration then does not fit or cannot run."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(dict(values))
    try:
        case = from_config(other)
        most = peak(case, leaves(case))
    except UserError:
        return None
    return Change(values, case, most) if most <= room(case.hardware) else None


def _combined(config: ConfigDict) -> Iterator[Values]:
    """All combinations of settings: none, single ones, pairs, …; those of one size in the order of _SETTINGS."""
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
    """Among changes to `factor` times the devices (and these values) that fit, the one with the fastest step."""
    changes = (_fitting(config, (("mesh", mesh), *values)) for mesh in _larger(config, factor, node))
    there = [change for change in changes if change is not None]
    return min(there, key=lambda change: make(change.case).time.step, default=None)


def _larger(config: ConfigDict, factor: int, node: int) -> Iterator[str]:
    """Meshes with `factor` (a power of two) times the devices: dp, tp and pp are doubled in every way that keeps tp
    within a node."""
    sizes = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", config.mesh)}
    for doubled in itertools.combinations_with_replacement(("dp", "tp", "pp"), factor.bit_length() - 1):
        larger = dict(sizes)
        for axis in doubled:
            larger[axis] = 2 * larger.get(axis, 1)
        if larger.get("tp", 1) <= max(node, sizes.get("tp", 1)):
            yield ",".join(f"{axis}{size}" for axis, size in larger.items())


def _cards(config: ConfigDict, own: Hardware) -> Iterable[Values]:
    """config.hardware for the cards with more memory; other numbers that the configuration changes are kept."""
    _, *changed = (part.strip() for part in config.hardware.split(","))
    kept = [part for part in changed if not part.startswith("memory")]
    rows = sorted(TABLE.values(), key=lambda row: row.memory)
    return [
        (("hardware", ",".join((row.name, *kept))),) for row in rows if row.memory > own.memory and row.name != own.name
    ]
