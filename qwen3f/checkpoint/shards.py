"""Where this rank's part of a state lies in the whole that a checkpoint stores.

On disk a stack has the model's layers in the model's order, without padding, whatever the mesh: so any mesh, and any
program, opens what any other has written. Nothing is laid out anew: a rank's rows go where their layers are.
"""

import dataclasses
from collections.abc import Callable, Sequence

from qwen3f import params as P
from qwen3f.config import ModelConfig
from sharding.layout import Layout
from sharding.mesh import AXES
from sharding.pipeline.cut import Slices, make_slices
from sharding.rules import Placed

Box = tuple[slice, ...]  # a range of every dimension


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of one leaf.

    Attributes:
      shape: of the whole, in the model's order of layers and without padding.
      local: of this rank's tensor, padding included.
      chunk: what one file holds of the whole; the last along a dimension may reach beyond it.
      pieces: (box of this rank's tensor, box of the whole), each one chunk's. Padding is in none.
      writes: whether this rank is the one of those with the same values that stores them.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    chunk: tuple[int, ...]
    pieces: tuple[tuple[Box, Box], ...]
    writes: bool = True


ShardOf = Callable[[tuple[str, ...], Sequence[int]], Shard]  # (a leaf's path, its local shape) -> its shard


def whole(shape: Sequence[int], writes: bool = True) -> Shard:
    """A leaf of which every rank has all; one file."""
    shape = tuple(shape)
    box = tuple(slice(0, size) for size in shape)
    return Shard(shape, shape, shape, ((box, box),), writes)


def shards(cfg: ModelConfig, layout: Layout) -> ShardOf:
    """The shards of a state that is laid out so: params and moments alike, known by the last key of their paths.

    Any other leaf is whole, the same on all ranks. Errors as Layout.place and make_slices; the function's ValueError
    for a leaf whose local shape is not the layout's.
    """
    table = param_shards(cfg, layout)
    first = _writes({}, layout)

    def shard_of(name: tuple[str, ...], local: Sequence[int]) -> Shard:
        shard = table.get(name[-1]) or whole(local, first)
        if shard.local != tuple(local):
            raise ValueError(f"{'.'.join(name)}: this rank has {list(local)}, its layout says {list(shard.local)}")
        return shard

    return shard_of


def param_shards(cfg: ModelConfig, layout: Layout) -> dict[str, Shard]:
    """Path -> this rank's shard of each of the model's parameters."""
    stages = make_slices(cfg, layout.pipeline, layout.axes.pp.size)
    placed = layout.place(cfg)
    return {path: _shard(spec, placed[path], layout, stages) for path, spec in P.abstract_params(cfg).items()}


def _shard(spec: P.ParamSpec, placed: Placed, layout: Layout, stages: Slices) -> Shard:
    local, start = list(spec.shape), [0] * len(spec.shape)
    for axis in AXES:  # of several that cut a dimension, the first is the slowest
        if axis in placed.cuts and axis != "pp":
            dim = placed.cuts[axis]
            local[dim] //= layout.axes[axis].size
            start[dim] += layout.axes[axis].index * local[dim]
    chunk, rows = list(local), [(slice(0, local[0]), slice(start[0], start[0] + local[0]))]
    if spec.pipelined:
        order = stages.layer_order_of(layout.axes.pp.index, spec.layers)
        local[0], chunk[0] = len(order), len(order) // stages.per_rank
        rows = _rows(order, spec.layers, chunk[0])
    rest = [slice(0, size) for size in local[1:]]
    there = [slice(at, at + size) for at, size in zip(start[1:], local[1:])]
    pieces = tuple(((here, *rest), (row, *there)) for here, row in rows)
    return Shard(spec.shape, tuple(local), tuple(chunk), pieces, _writes(placed.cuts, layout))


def _rows(order: Sequence[int | None], layers: Sequence[int], height: int) -> list[tuple[slice, slice]]:
    """(rows here, rows of the whole) of each stage that a rank has, padding left out."""
    place = {layer: row for row, layer in enumerate(layers)}
    out = []
    for first in range(0, len(order), height):
        rows = [place[layer] for layer in order[first : first + height] if layer is not None]
        if rows:
            out.append((slice(first, first + len(rows)), slice(rows[0], rows[0] + len(rows))))
    return out


def _writes(cuts: dict[str, int], layout: Layout) -> bool:
    return all(layout.axes[axis].index == 0 for axis in AXES if axis not in cuts)
