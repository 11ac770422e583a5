"""Weights that are cut over dp, ep and cp: gathered where they are used, their gradients summed and cut again.

A layer's weights travel together: one launch for all that are cut over the same axes, in the dtype they come in. Its
adjoint is the reduce-scatter that leaves each rank the sum of all ranks' gradients for its own shards. What is cut
along its first dimension needs no copy either way. What is replicated over an axis is summed over it once a step, after
the last micro-batch (`sum_replicated`).
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
    """A function that makes whole what FSDP has cut: of a layer of `stack` (names relative to the layer), or with "" of
    what is in no stack.

    It takes and returns a dict of tensors; others pass through. Whole means: as the explicit rules leave it, e.g. a
    tensor-parallel shard. When nothing is cut, the dict itself is returned. dtype: as collectives.gather.
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
    """`make_gather` of a layer in two halves, so that it travels while the layer before is computed.

    begin(layers), once, -> the layers to give to start; start(layer) -> what finish takes; finish -> the layer's whole
    weights. Gradients travel likewise, while the layer before is differentiated.
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
        """(the layer, what is cut of it on its way; name -> ranks and dimension of what is)."""
        travelling = {}
        for names, dims in self.bundles.items():
            cut = [name for name in layer if name in dims]
            if cut:
                axis = self.axes.over(*names)
                layer = layer | dict(zip(cut, start_gather_each([layer[name] for name in cut], axis, self.dtype)))
                travelling |= {name: (axis.size, dims[name]) for name in cut}
        return layer, travelling

    def finish(self, started: tuple[Params, dict[str, tuple[int, int]]]) -> Params:
        layer, travelling = started
        for name in travelling:
            wait(layer[name])
        return layer | {name: join(layer[name], *place) for name, place in travelling.items()}


def gather_ahead(placed: Mapping[str, Placed], axes: Axes, stack: str, dtype: torch.dtype | None) -> GatherAhead | None:
    """For layers of any kind of a stack; None when nothing of them is cut."""
    bundles = _bundles(placed, stack)
    return GatherAhead(bundles, axes, dtype) if bundles else None


def _bundles(placed: Mapping[str, Placed], stack: str) -> dict[tuple[str, ...], dict[str, int]]:
    """Axes -> {name: the dimension that they cut} of what travels together."""
    bundles: dict[tuple[str, ...], dict[str, int]] = {}
    for path, p in placed.items():
        if p.fsdp and p.stack == stack:
            # a layer's tensors lack the stack's dimension
            bundles.setdefault(p.fsdp, {})[path.removeprefix(stack)] = p.fsdp_dim - bool(stack)
    return bundles


def cut(params: Params, placed: Mapping[str, Placed], axes: Axes) -> Params:
    """This rank's shards of whole parameters; under pp, of stacks as sharding.pipeline.cut.store pads them."""
    return {path: cut_one(x, placed[path], axes) for path, x in params.items()}


def cut_one(x: Tensor, placed: Placed, axes: Axes, *, row: bool = False) -> Tensor:
    """This rank's shard, a copy. row: x is one layer's row of a stack, which pp leaves whole."""
    for axis, dim in placed.explicit:
        if not (row and axis == "pp"):
            x = shard(x, axes[axis], dim - row)
    if placed.fsdp:
        x = shard(x, axes.over(*placed.fsdp), placed.fsdp_dim - row)
    return x.clone()


def sum_replicated(grads: Params, placed: Mapping[str, Placed], axes: Axes) -> Params:
    """Gradients of which each is summed over the axes its parameter is replicated on.

    One collective a set of axes (two where tp or pp are among them); sums are float32 (float64 for float64).
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
    """The sum over the named axes: one collective for the data axes together, one for each other."""
    data = tuple(name for name in names if name in DATA)
    for axis in [axes[name] for name in names if name not in DATA] + ([axes.over(*data)] if data else []):
        x = all_reduce(x, axis)
    return x


def sum_over_shards(values: Mapping[str, Tensor], placed: Mapping[str, Placed], axes: Axes) -> Tensor:
    """Σ over paths of a scalar that each rank has worked out from its shard: every element counts once.

    So path by path the sum goes over exactly the axes that cut it.
    """
    groups: dict[tuple[str, ...], list[Tensor]] = {}
    for path, value in values.items():
        groups.setdefault(tuple(sorted(placed[path].cuts, key=AXES.index)), []).append(value)
    return torch.stack([sum_over(torch.stack(parts).sum(), axes, over) for over, parts in groups.items()]).sum()


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
