"""FSDP: weights are sharded over dp, ep and cp. They are gathered before use, and gradients are reduce-scattered.

One collective gathers all weights of a layer that are cut over the same axes, in the dtype they come in. Its backward
pass is the reduce-scatter that leaves each rank the sum of all ranks' gradients for its own shards. A weight that is
cut along its first dimension needs no copy in either direction. The gradient of a parameter that is replicated over an
axis is summed over that axis once a step, after the last micro-batch (`sum_replicated`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qwen3f.params import Params
from sharding.axes import Axes
from sharding.collectives import all_reduce, gather_each, join, shard, start_gather_each, wait, wait_for_gradients
from sharding.mesh import AXES, DATA
from sharding.rules import Placed, replicated_axes

Gather = Callable[[Params], Params]


def make_gather(placed: Mapping[str, Placed], axes: Axes, *, stack: str, dtype: torch.dtype | None = None) -> Gather:
    """A function that gathers the tensors of a dict that FSDP has cut, and returns the dict with whole tensors.

    stack: the stack whose layers it is called with, one layer at a time (names relative to the layer); "" for the
    parameters outside all stacks. Tensors that FSDP has not cut pass through; if there are no others, the same dict is
    returned. "Whole" means without FSDP's cut: over tp and ep a tensor remains a shard. dtype: as collectives.gather.
    """
    bundles = _bundles(placed, stack)

    def whole(params: Params) -> Params:
        for names, dims in bundles.items():
            cut = [name for name in params if name in dims]
            if cut:
                axis, along = axes.over(*names), [dims[name] for name in cut]
                params = params | dict(zip(cut, gather_each([params[name] for name in cut], axis, along, dtype)))
        return params

    return whole


@dataclasses.dataclass(frozen=True)
class GatherAhead:
    """`make_gather` in two steps, so that one layer's weights are gathered while the layer before is computed.

    Call begin(layers) once and use the layers it returns. For each layer, start(layer) starts the gather, and finish
    takes what start returned, waits, and returns the layer with whole weights. In the backward pass the reduce-scatter
    of a layer's gradients likewise overlaps with the computation of the layer before.
    bundles: as _bundles. dtype: as collectives.gather.
    """

    bundles: Mapping[tuple[str, ...], Mapping[str, int]]
    axes: Axes
    dtype: torch.dtype | None

    def begin(self, layers: Sequence[Params]) -> list[Params]:
        cut = {name for dims in self.bundles.values() for name in dims}
        places = [(index, name) for index, layer in enumerate(layers) for name in layer if name in cut]
        waited = wait_for_gradients([layers[index][name] for index, name in places])
        out = [dict(layer) for layer in layers]
        for (index, name), x in zip(places, waited):
            out[index][name] = x
        return out

    def start(self, layer: Params) -> tuple[Params, dict[str, tuple[int, int]]]:
        """(the layer, in which the gather of every tensor that FSDP cuts is in flight; name -> (number of ranks that
        the tensor is gathered from, dimension that it is cut along), for those tensors)."""
        in_flight = {}
        for names, dims in self.bundles.items():
            cut = [name for name in layer if name in dims]
            if cut:
                axis = self.axes.over(*names)
                layer = layer | dict(zip(cut, start_gather_each([layer[name] for name in cut], axis, self.dtype)))
                in_flight |= {name: (axis.size, dims[name]) for name in cut}
        return layer, in_flight

    def finish(self, started: tuple[Params, dict[str, tuple[int, int]]]) -> Params:
        layer, in_flight = started
        for name in in_flight:
            wait(layer[name])
        return layer | {name: join(layer[name], *place) for name, place in in_flight.items()}


def gather_ahead(placed: Mapping[str, Placed], axes: Axes, stack: str, dtype: torch.dtype | None) -> GatherAhead | None:
    """A GatherAhead for all layers of a stack, dense and sparse; None when FSDP cuts none of their tensors."""
    bundles = _bundles(placed, stack)
    return GatherAhead(bundles, axes, dtype) if bundles else None


def _bundles(placed: Mapping[str, Placed], stack: str) -> dict[tuple[str, ...], dict[str, int]]:
    """Axes that FSDP cuts over -> {name of a tensor: the dimension that is cut}. One collective gathers each entry."""
    bundles: dict[tuple[str, ...], dict[str, int]] = {}
    for path, p in placed.items():
        if p.fsdp and p.stack == stack:
            # a layer's tensors lack the stack's dimension
            bundles.setdefault(p.fsdp, {})[path.removeprefix(stack)] = p.fsdp_dim - bool(stack)
    return bundles


def cut(params: Params, placed: Mapping[str, Placed], axes: Axes) -> Params:
    """This rank's shards of whole parameters. Under pp, sharding.pipeline.cut.store must have padded the stacks."""
    return {path: cut_one(x, placed[path], axes) for path, x in params.items()}


def cut_one(x: Tensor, placed: Placed, axes: Axes, *, row: bool = False) -> Tensor:
    """This rank's shard of one parameter, a copy. row: x is one layer's row of a stack, so pp does not cut it."""
    for axis, dim in placed.explicit:
        if not (row and axis == "pp"):
            x = shard(x, axes[axis], dim - row)
    if placed.fsdp:
        x = shard(x, axes.over(*placed.fsdp), placed.fsdp_dim - row)
    return x.clone()


def sum_replicated(grads: Params, placed: Mapping[str, Placed], axes: Axes) -> Params:
    """The gradients, each summed over the axes that its parameter is replicated over.

    Gradients with the same set of axes share their collectives: one over the data axes together, one each over pp and
    tp. Sums are float32 (float64 for float64).
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in grads:
        over = replicated_axes(placed[path], axes.shape)
        if over:
            groups.setdefault(over, []).append(path)
    out = dict(grads)
    for over, paths in groups.items():
        flat = sum_over(torch.cat([_widen(grads[path]).flatten() for path in paths]), axes, over)
        for path, part in zip(paths, flat.split([grads[path].numel() for path in paths])):
            out[path] = part.view(grads[path].shape)
    return out


def sum_over(x: Tensor, axes: Axes, names: tuple[str, ...] = AXES) -> Tensor:
    """The sum over the named axes: one collective for all data axes together, and one each for pp and tp."""
    data = tuple(name for name in names if name in DATA)
    for axis in [axes[name] for name in names if name not in DATA] + ([axes.over(*data)] if data else []):
        x = all_reduce(x, axis)
    return x


def sum_over_shards(values: Mapping[str, Tensor], placed: Mapping[str, Placed], axes: Axes) -> Tensor:
    """Sum over all paths and shards of a scalar that each rank computed from its shard, e.g. a sum of squares.

    Each path is summed over exactly the axes that cut it, so that every element counts once.
    """
    groups: dict[tuple[str, ...], list[Tensor]] = {}
    for path, value in values.items():
        groups.setdefault(tuple(sorted(placed[path].cuts, key=AXES.index)), []).append(value)
    return torch.stack([sum_over(torch.stack(parts).sum(), axes, over) for over, parts in groups.items()]).sum()


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
