"""The leaves of a state in a checkpoint: their paths, shapes and dtypes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3f.checkpoint.shards import Shard
from qwen3f.errors import UserError
from qwen3f.tree import named_leaves

Name = tuple[str, ...]  # a leaf's path: ("params", "model.norm.weight")


class LeafSpec(NamedTuple):
    """Shape and dtype (JAX's and torch's common name, such as "bfloat16") of one leaf."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def spec_of(leaf: Tensor) -> LeafSpec:
    return LeafSpec(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Part:
    """One rank's part of a leaf, to write or to read.

    spec: of the whole leaf, as it is stored. shard: the place of this rank's part in it. values: this rank's tensor, on
    the CPU; None if this rank does not write the leaf, and for reading.
    """

    spec: LeafSpec
    shard: Shard
    values: Tensor | None = None


def data_leaves(state: Any) -> dict[Name, Tensor]:
    """Path -> leaf, for the leaves of a pytree that are written: all but None and tensors without elements.

    Raises TypeError for a leaf that is neither a tensor nor None, ValueError for paths that would collide on disk.
    """
    leaves = {name: leaf for name, leaf in named_leaves(state).items() if holds_data(leaf)}
    joined: dict[str, Name] = {}
    for name in leaves:
        # A leaf's directory is its path joined by dots. Of two equal ones, one would silently overwrite the other.
        other = joined.setdefault(".".join(name), name)
        if other != name:
            raise ValueError(f"the state's leaves {other} and {name} would share a name on disk: rename one")
        if "/" in "".join(name):
            raise ValueError(f"the state's leaf {name} has a / in its name, which is a directory on disk: rename it")
    return leaves


def holds_data(leaf: Any) -> bool:
    if leaf is not None and not isinstance(leaf, Tensor):
        raise TypeError(f"a checkpoint's leaf is a {type(leaf).__name__}: make it a tensor, or put it into meta")
    return leaf is not None and leaf.numel() > 0


def nest(flat: Mapping[Name, Any]) -> dict[str, Any]:
    """Nested dicts with one level per part of the path."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        node = nested
        for key in name[:-1]:
            node = node.setdefault(key, {})
        node[name[-1]] = leaf
    return nested


def check_same_tree(on_disk: dict[Name, LeafSpec], here: dict[Name, LeafSpec], where: str, cast: bool) -> None:
    """Raises UserError, with the leaves that one side lacks or that differ in shape or dtype.

    cast: floating-point leaves may differ in dtype.
    """
    names = [*here, *(name for name in on_disk if name not in here)]
    differing = [name for name in names if not _same(on_disk.get(name), here.get(name), cast)]
    if not differing:
        return
    shown = [
        f"{'.'.join(name)} is {on_disk.get(name, 'absent')} on disk and {here.get(name, 'absent')} in this run"
        for name in differing[:3]
    ]
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    castable = all(_same(on_disk.get(name), here.get(name), True) for name in differing)
    advice = "To convert them write --config.checkpoint.cast=True; or choose" if castable else "Choose"
    raise UserError(
        f"workdir's checkpoint belongs to another model ({where}): {'; '.join(shown)}{more}. "
        f"{advice} another --workdir, or the configuration that this one was started with"
    )


def _same(a: LeafSpec | None, b: LeafSpec | None, cast: bool) -> bool:
    if a is None or b is None or not cast:
        return a == b
    floating = a.torch_dtype.is_floating_point and b.torch_dtype.is_floating_point
    return a.shape == b.shape and (a.dtype == b.dtype or floating)
