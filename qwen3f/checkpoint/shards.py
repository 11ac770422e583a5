"""The place of this rank's part of a state in the whole state that a checkpoint stores.

On disk a stack has its layers in the model's order, without padding, for every mesh. So any mesh, and any other
program, can read it. A rank writes its rows directly to the places of their layers; nothing is reordered first.
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
      shape: shape of the whole leaf, with layers in the model's order and without padding.
      local: shape of this rank's tensor, padding included.
      chunk: shape of the part of the whole in one file; the last chunk of a dimension may reach beyond the whole.
      pieces: (box in this rank's tensor, box in the whole leaf) pairs, one per chunk. They leave out padding.
      writes: whether this rank writes its values. Of ranks with the same values only one does.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    chunk: tuple[int, ...]
    pieces: tuple[tuple[Box, Box], ...]
    writes: bool = True


ShardOf = Callable[[tuple[str, ...], Sequence[int]], Shard]  # (a leaf's path, its local shape) -> its shard


def whole(shape: Sequence[int], writes: bool = True) -> Shard:
    """The Shard of a leaf that every rank has whole; it is stored in one file."""
    shape = tuple(shape)
    box = tuple(slice(0, size) for size in shape)
    return Shard(shape, shape, shape, ((box, box),), writes)


def shards(cfg: ModelConfig, layout: Layout) -> ShardOf:
    """A function (leaf's path, its local shape) -> Shard, for a state with this layout.

    A leaf whose last key is a parameter's path (params and moments) is cut as that parameter. Any other leaf is whole
    and the same on all ranks. Errors as Layout.place and make_slices; the function raises ValueError for a leaf whose
    local shape is not the layout's.
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
    for axis in AXES:  # if several axes cut a dimension, the first one varies slowest
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
    """(rows of this rank's stack, rows of the whole stack) for each stage of a rank, without padding."""
    place = {layer: row for row, layer in enumerate(layers)}
    out = []
    for first in range(0, len(order), height):
        rows = [place[layer] for layer in order[first : first + height] if layer is not None]
        if rows:
            out.append((slice(first, first + len(rows)), slice(rows[0], rows[0] + len(rows))))
    return out


def _writes(cuts: dict[str, int], layout: Layout) -> bool:
    return all(layout.axes[axis].index == 0 for axis in AXES if axis not in cuts)
