"""The training state on a mesh: outside the step every leaf is a DTensor, inside it this rank's shard, a Tensor."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from qwen3f import params as P
from qwen3f import tree
from qwen3f.config import ModelConfig
from sharding.fsdp import cut, cut_one
from sharding.layout import Layout
from sharding.pipeline.cut import make_slices, restore, store
from sharding.rules import placements


def local_shards(state: Any) -> Any:
    """Replace the DTensors of a pytree by this rank's shards, without copies; plain tensors stay."""
    return tree.map(lambda x: x.to_local() if isinstance(x, DTensor) else x, state)


def init_shards(
    cfg: ModelConfig,
    seed: int,
    layout: Layout,
    paths: Collection[str] | None = None,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> P.Params:
    """This rank's shards of the parameters that params.init_params gives.

    Memory: only one layer of one parameter exists whole at a time. paths: the parameters to make; None: all.
    """
    placed, axes = layout.place(cfg), layout.axes
    stages = make_slices(cfg, layout.pipeline, axes.pp.size)
    out = {}
    for path, spec in P.abstract_params(cfg).items():
        if paths is not None and path not in paths:
            continue
        stacked = spec.layers is not None
        rows = []
        order = stages.layer_order_of(axes.pp.index, spec.layers) if spec.pipelined else spec.layers or [None]
        for layer in order:
            padding = stacked and layer is None
            whole = P.init_layer(path, spec, seed, spec.layers[0] if padding else layer, device)
            row = cut_one(whole, placed[path], axes, row=stacked).to(dtype)
            rows.append(torch.zeros_like(row) if padding else row)
        out[path] = torch.stack(rows) if stacked else rows[0]
    return out


def cut_params(cfg: ModelConfig, params: P.Params, layout: Layout) -> P.Params:
    """This rank's shards (copies) of whole parameters, whose layers are in the model's order. One device: no copy."""
    if layout.axes.shape.size == 1:
        return params
    stored = store(cfg, params, make_slices(cfg, layout.pipeline, layout.axes.pp.size))
    return cut(stored, layout.place(cfg), layout.axes)


def whole_params(cfg: ModelConfig, params: P.Params, layout: Layout, dtype: torch.dtype) -> P.Params:
    """Gather the parameters of a training state on every rank: whole, layers in the model's order, in `dtype`.

    All ranks must call it together. Tensors are cast to `dtype` before they are sent; a plain tensor that has the dtype
    already is not copied.
    """
    out = {path: leaf.to(dtype) for path, leaf in params.items()}
    if layout.axes.shape.size == 1:
        return out
    out = {path: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for path, leaf in out.items()}
    return restore(cfg, out, make_slices(cfg, layout.pipeline, layout.axes.pp.size))


def as_dtensors(state: Any, cfg: ModelConfig, layout: Layout, mesh: DeviceMesh) -> Any:
    """Wrap a pytree of this rank's shards (fsdp.cut) in DTensors, without copies or communication.

    A leaf whose last key is a parameter's path is placed as that parameter: params, moments and gradients are placed
    alike. Any other leaf is replicated. Under pp a stack's global shape includes the padding of all stages.
    """
    placed = layout.place(cfg)
    leaves, spec = tree.flatten(state)
    out = []
    for path, leaf in zip(tree.named_leaves(state), leaves):
        if path[-1] in placed:
            shape = list(leaf.shape)
            for axis, dim in placed[path[-1]].cuts.items():
                shape[dim] *= layout.axes[axis].size
            out.append(_dtensor(leaf, mesh, placements(placed[path[-1]]), torch.Size(shape)))
        else:
            out.append(_dtensor(leaf, mesh, (Replicate(),) * mesh.ndim, leaf.shape))
    return tree.unflatten(out, spec)


def _dtensor(local: Tensor, mesh: DeviceMesh, where: tuple[Placement, ...], shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, where, run_check=False, shape=shape, stride=stride)


def on_shards(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Wrap a step over plain shards, (state, batch) -> (new state, metrics), so that its states hold DTensors.

    Leaves of the new state are placed as those of the old one. A state of plain tensors passes through.
    """

    @functools.wraps(step)
    def call(state: Any, batch: Mapping[str, Tensor]) -> tuple[Any, Any]:
        new, metrics = step(local_shards(state), batch)
        return tree.map(placed_like, state, new), metrics

    return call


def placed_like(old: Tensor, new: Tensor) -> Tensor:
    """Wrap this rank's shard `new` in a DTensor placed as `old`; return `new` itself if `old` is a plain tensor."""
    return _dtensor(new, old.device_mesh, old.placements, old.shape) if isinstance(old, DTensor) else new
