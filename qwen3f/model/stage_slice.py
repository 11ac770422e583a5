"""What one stage of a pipeline computes, whoever orders the work: from tokens or hidden states to the next stage's
hidden states or to the loss.

B batch · T sequence · n this rank's tokens (sharding.tensor) · D hidden · S sparse layers of the stage
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.attention import batch_mask
from qwen3f.model.block import BlockFn, block_fn
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables
from qwen3f.model.transformer import layer_stacks
from qwen3f.train import objective as losses
from sharding import tensor
from sharding.layout import Layout
from sharding.pipeline.cut import Slices
from sharding.pipeline.deferred_grads import Deferred

Batch = Mapping[str, Tensor]
Layers = Mapping[int, P.Params]
SliceFn = Callable[[P.Params, Layers, Batch, Tensor | None, Tensor | float], tuple[Tensor, model.RouterStats | None]]


def check_compile(execution: model.Execution) -> None:
    """UserError for a mode that a stage cannot run in."""
    if execution.compile == "step":
        raise UserError("config.compile=step makes one graph, which a pipeline cannot be; write config.compile=block")


def make_slice(
    cfg: ModelConfig,
    execution: model.Execution,
    layout: Layout,
    stages: Slices,
    stage: int,
    deferred: Deferred | None = None,
) -> SliceFn:
    """run(outer, layers, batch, x, total_weight) -> (hidden states for the next stage; from the last one
    losses.make_loss's number, RouterStats of its S sparse layers or None).

    outer, layers: as select_leaves gives them. x: the stage before's hidden states, as empty_hidden; None on the first.
    deferred: what puts off its layers' weight gradients. Raises UserError as check_compile.
    """
    check_compile(execution)
    kinds = {layer: cfg.is_sparse(layer) for layer in stages.layers_of(stage)}
    blocks = {sparse: _block(cfg, execution, sparse, layout, deferred) for sparse in {*kinds.values()}}
    whole, token_loss = model.make_outer(cfg, layout), losses.make_token_loss(execution, layout)

    def run(
        outer: P.Params, layers: Layers, batch: Batch, x: Tensor | None, total_weight: Tensor | float
    ) -> tuple[Tensor, model.RouterStats | None]:
        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        outer = whole(outer)
        if stage == 0:
            x = tensor.embedding(tokens, outer[P.EMBED], layout.axes.tp)
        cos, sin = rope_tables(cfg, positions, x.dtype)
        mask = batch_mask(batch, execution.attention, cfg.head_dim, layout.axes.cp)
        real = model.real_tokens(batch)
        routed = []
        for layer, sparse in kinds.items():
            x, *fields = blocks[sparse](layers[layer], x, cos, sin, mask, real if sparse else None, None)
            if sparse:
                routed.append(fields)
        stats = model.RouterStats(*(torch.stack(field) for field in zip(*routed, strict=True))) if routed else None
        if stage < stages.count - 1:
            return x, stats
        hidden = rms_norm(x, outer[P.FINAL_NORM], cfg.rms_norm_eps)
        return token_loss(hidden, model.head_weight(cfg, outer), batch, total_weight), stats

    return run


def _block(
    cfg: ModelConfig, execution: model.Execution, sparse: bool, layout: Layout, deferred: Deferred | None
) -> BlockFn:
    """As block_fn; with its weights' gradients put off. Recomputation then stands around `deferred`."""
    if deferred is None:
        return block_fn(cfg, execution, sparse, layout)
    run = deferred.within(block_fn(cfg.replace(gradient_checkpointing="none"), execution, sparse, layout))
    if cfg.gradient_checkpointing == "none":
        return run
    return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def select_leaves(
    cfg: ModelConfig, stages: Slices, rank: int, leaves: Mapping[str, Tensor | tuple[Tensor, ...]]
) -> dict[int, tuple[P.Params, Layers]]:
    """stage -> (what it uses of embedding, norm and head; layer -> its parameters), for each stage of a rank.

    leaves: the rank's shards; a stack may come as a tuple of its rows. Padding is left out.
    """
    own = stages.slices_of(rank)
    layers: dict[int, P.Params] = {layer: {} for stage in own for layer in stages.layers_of(stage)}
    for path, kind in layer_stacks(cfg).items():
        rows = leaves[path] if isinstance(leaves[path], tuple) else leaves[path].unbind(0)
        for layer, row in zip(stages.layer_order_of(rank, kind), rows, strict=True):
            if layer is not None:
                layers[layer][path.removeprefix(P.LAYERS)] = row
    return {
        stage: (
            {path: leaves[path] for path in _outer_paths(cfg, stages, stage)},
            {layer: layers[layer] for layer in stages.layers_of(stage)},
        )
        for stage in own
    }


def _outer_paths(cfg: ModelConfig, stages: Slices, stage: int) -> list[str]:
    """What the stage uses besides layers, on all ranks in the same order: they are gathered together."""
    head = P.EMBED if cfg.tie_word_embeddings else P.HEAD
    return [P.EMBED] * (stage == 0) + [P.FINAL_NORM, head] * (stage == stages.count - 1)


def empty_hidden(
    cfg: ModelConfig, layout: Layout, tokens: torch.Size, params: P.Params, device: torch.device | str
) -> Tensor:
    """Room for the hidden states between two stages, of this rank's tokens [B, T]: [B, T, D], or with tp [1, n, D].

    Their dtype is the embedding's once it is gathered.
    """
    tp = layout.axes.tp.size
    shape = tokens if tp == 1 else (1, tokens.numel() // tp)
    return torch.empty((*shape, cfg.hidden_size), dtype=layout.gather_dtype or params[P.EMBED].dtype, device=device)
