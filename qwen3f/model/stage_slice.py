"""The function of one slice (stage) of a pipelined model. It does not depend on the schedule.

The first slice takes tokens, the others take hidden states. The last slice returns the head's output, the others return
hidden states.

B batch · T sequence · n this rank's tokens (sharding.tensor) · D hidden · S sparse layers of the slice
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.model.attention import batch_mask
from qwen3f.model.block import block_fn
from qwen3f.model.execution import Execution
from qwen3f.model.moe import RouterStats
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables
from qwen3f.model.transformer import (
    LayerInputs,
    enter,
    layer_stacks,
    make_outer,
    make_sight,
    positions_of,
    real_tokens,
    run_layers,
)
from qwen3f.skeletons import LayerFn
from sharding import tensor
from sharding.layout import Layout
from sharding.pipeline.cut import Slices
from sharding.pipeline.deferred_grads import Deferred

Batch = Mapping[str, Tensor]
Layers = Mapping[int, P.Params]
Head = Callable[[Tensor, P.Params], Any]
SliceFn = Callable[[P.Params, Layers, Batch, Tensor | None, Head], tuple[Any, RouterStats | None]]


def make_slice(
    cfg: ModelConfig,
    execution: Execution,
    layout: Layout,
    slices: Slices,
    number: int,
    deferred: Deferred | None = None,
) -> SliceFn:
    """run(outer, layers, batch, x, head) -> (output, RouterStats of the slice's S sparse layers or None).

    output: hidden states for the next slice; the last slice returns head(hidden states after the final norm, outer
    parameters, gathered). outer, layers: from select_leaves. x: the previous slice's hidden states, shaped as
    empty_hidden; None on the first slice. number: the slice's number. deferred: the mode that defers the gradients of
    its layers' weights.
    """
    kinds = {cfg.is_sparse(layer) for layer in slices.layers_of(number)}
    blocks = {sparse: _block(cfg, execution, sparse, layout, deferred) for sparse in kinds}
    whole = make_outer(cfg, layout)
    see = make_sight(cfg, execution, layout) if number == 0 else None

    def run(
        outer: P.Params, layers: Layers, batch: Batch, x: Tensor | None, head: Head
    ) -> tuple[Any, RouterStats | None]:
        outer, seen = whole(outer), None
        if number == 0:
            x = tensor.embedding(batch["tokens"], outer[P.EMBED], layout.axes.tp)
            x, seen = enter(x, see(outer, batch))
        masks = [batch_mask(batch, execution, cfg.head_dim, layout.axes.cp)] * cfg.num_hidden_layers
        inputs = LayerInputs(*rope_tables(cfg, positions_of(batch), x.dtype), masks, real_tokens(batch))
        x, stats = run_layers(cfg, blocks, layers, x, inputs, inject=seen)
        if number < slices.count - 1:
            return x, stats
        return head(rms_norm(x, outer[P.FINAL_NORM], cfg.rms_norm_eps), outer), stats

    return run


def _block(cfg: ModelConfig, execution: Execution, sparse: bool, layout: Layout, deferred: Deferred | None) -> LayerFn:
    """As block_fn; with `deferred`, weights' gradients are deferred, also inside the recomputation."""
    if deferred is None:
        return block_fn(cfg, execution, sparse, layout)
    run = deferred.within(block_fn(cfg.replace(gradient_checkpointing="none"), execution, sparse, layout))
    if cfg.gradient_checkpointing == "none":
        return run
    return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def select_leaves(
    cfg: ModelConfig, slices: Slices, rank: int, leaves: Mapping[str, Tensor | tuple[Tensor, ...]]
) -> dict[int, tuple[P.Params, Layers]]:
    """For each slice of a rank: slice -> (its parameters outside the layers, {layer: its parameters}).

    leaves: the rank's shards; a stack may be a tuple of its rows. Padding is left out.
    """
    own = slices.slices_of(rank)
    layers: dict[int, P.Params] = {layer: {} for number in own for layer in slices.layers_of(number)}
    for path, kind in layer_stacks(cfg).items():
        rows = leaves[path] if isinstance(leaves[path], tuple) else leaves[path].unbind(0)
        for layer, row in zip(slices.layer_order_of(rank, kind), rows, strict=True):
            if layer is not None:
                layers[layer][path.removeprefix(P.LAYERS)] = row
    return {
        number: (
            {path: leaves[path] for path in _outer_paths(cfg, slices, number)},
            {layer: layers[layer] for layer in slices.layers_of(number)},
        )
        for number in own
    }


def _outer_paths(cfg: ModelConfig, slices: Slices, number: int) -> list[str]:
    """Paths of the parameters that the slice uses outside its layers, in the same order on all ranks: one collective
    gathers them."""
    tower = [path for path in P.abstract_params(cfg) if path.startswith(P.VISUAL)]
    first, last = [P.EMBED, *tower], [P.FINAL_NORM, P.head_path(cfg)]
    return first * (number == 0) + last * (number == slices.count - 1)


def empty_hidden(
    cfg: ModelConfig, layout: Layout, tokens: torch.Size, params: P.Params, device: torch.device | str
) -> Tensor:
    """An empty tensor for the hidden states between two slices: [B, T, D], or with tp [1, n, D].

    tokens: [B, T], the shape of this rank's tokens. The dtype is that of the gathered embedding.
    """
    tp = layout.axes.tp.size
    shape = tokens if tp == 1 else (1, tokens.numel() // tp)
    return torch.empty((*shape, cfg.hidden_size), dtype=layout.gather_dtype or params[P.EMBED].dtype, device=device)
