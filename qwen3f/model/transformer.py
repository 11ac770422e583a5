"""The language model as a pure function: tokens through embedding, blocks, final norm and head.

B batch · T sequence · D hidden · V vocabulary · L layers
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.model.attention import AttentionMask, batch_mask
from qwen3f.model.block import block_fn
from qwen3f.model.execution import EAGER, Execution
from qwen3f.model.kv_cache import LayerCache
from qwen3f.model.moe import RouterStats
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables
from sharding.fsdp import GatherAhead, gather_ahead, make_gather
from sharding.layout import ONE_DEVICE, Layout
from sharding.tensor import embedding


class ModelOutput(NamedTuple):
    """logits [B, T, V] in the parameters' dtype; hidden [B, T, D] after the final norm.

    router: what the routers did, with a leading axis of sparse layers; None for a dense model.
    """

    logits: Tensor
    hidden: Tensor
    router: RouterStats | None


Forward = Callable[..., tuple[Tensor, RouterStats | None]]


def apply(
    cfg: ModelConfig,
    params: P.Params,
    batch: Mapping[str, Tensor],
    execution: Execution = EAGER,
    dropout_stream: Tensor | None = None,
) -> ModelOutput:
    """Logits for a batch.

    Args:
      params: as qwen3f.params.init_params gives them. Their dtype is the compute dtype. A stacked leaf may also come
        as a tuple of its layers.
      batch: "tokens" int64 [B, T]; optional "positions" int64 [B, T] (default 0 … T−1) and "segments" int32 [B, T]
        (default: one document a row; 0 is padding) and "real" bool [B, T] (default: segments != 0), False for what
        routers are not to count. Other keys are ignored.
      dropout_stream: int64 scalar tensor; attention_dropout applies exactly when it is given.
    Raises UserError for configurations that cannot run (a vision tower), IndexError (CPU) for a token beyond the
    vocabulary.
    """
    hidden, stats = make_forward(cfg, execution, dropout=dropout_stream is not None)(params, batch, dropout_stream)
    return ModelOutput(F.linear(hidden, head_weight(cfg, params)), hidden, stats)


def make_forward(
    cfg: ModelConfig, execution: Execution = EAGER, *, dropout: bool = False, layout: Layout = ONE_DEVICE
) -> Forward:
    """forward(params, batch, dropout_stream=None) -> (hidden, router), as in ModelOutput.

    On a mesh, params are this rank's shards, except that embedding, final norm and head must have gone through
    `make_outer`; hidden is this rank's part of the sequence, and what routers did is the rank's.

    Skeletons are built here, once, since that cannot happen inside a compiled step. dropout: whether the function will
    be called with a dropout_stream; attention with dropout runs the reference formula. Arguments as in `apply`.
    """
    if dropout and cfg.attention_dropout:
        execution = dataclasses.replace(execution, attention="reference")
    body = make_body(cfg, execution, layout)
    sparse = bool(cfg.sparse_layers)

    def forward(
        params: P.Params, batch: Mapping[str, Tensor], dropout_stream: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        mask = batch_mask(batch, execution.attention, cfg.head_dim, layout.axes.cp)
        real = real_tokens(batch) if sparse else None
        return body(params, tokens, positions, [mask] * cfg.num_hidden_layers, real, dropout_stream)

    return forward


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """bool [B, T], False for padding; None if the batch tells nothing of padding."""
    if "real" in batch:
        return batch["real"]
    return batch["segments"] != 0 if "segments" in batch else None


def make_body(cfg: ModelConfig, execution: Execution, layout: Layout = ONE_DEVICE) -> Forward:
    """body(params, tokens [B, T], positions [B, T], masks, real, dropout_stream=None) -> as make_forward's function.

    masks: what each layer's attention may see; an AttentionMask, or a LayerCache that also holds
    the layer's earlier keys and values (qwen3f.model.cached). real: bool [B, T] or None, as real_tokens gives it.
    """
    kinds = [cfg.is_sparse(layer) for layer in range(cfg.num_hidden_layers)]
    ahead = _weights_ahead(cfg, execution, layout)
    blocks = {kind: block_fn(cfg, execution, kind, layout, gathered=ahead is not None) for kind in {*kinds}}
    stacks = layer_stacks(cfg)

    def body(
        params: P.Params,
        tokens: Tensor,
        positions: Tensor,
        masks: Sequence[AttentionMask | LayerCache],
        real: Tensor | None = None,
        dropout_stream: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        x = embedding(tokens, params[P.EMBED], layout.axes.tp)
        cos, sin = rope_tables(cfg, positions, x.dtype)
        routed: list[list[Tensor]] = []
        layers = unstack_layers(params, stacks)
        if ahead:
            layers = ahead.begin(layers)
        started = ahead.start(layers[0]) if ahead else None
        for index, layer in enumerate(layers):
            if ahead:
                layer = ahead.finish(started)
                started = ahead.start(layers[index + 1]) if index + 1 < len(layers) else None
            stream = None if dropout_stream is None else rng.fold(dropout_stream, index)
            x, *stats = blocks[kinds[index]](layer, x, cos, sin, masks[index], real, stream)
            if stats:
                routed.append(stats)
        stacked = RouterStats(*(torch.stack(field) for field in zip(*routed, strict=True))) if routed else None
        return rms_norm(x, params[P.FINAL_NORM], cfg.rms_norm_eps), stacked

    return body


def _weights_ahead(cfg: ModelConfig, execution: Execution, layout: Layout) -> GatherAhead | None:
    """How a layer's weights are gathered while the one before is computed; None if the block itself gathers them.

    It does where it is recomputed, to gather them again, and inside one graph of the step, whose compiler orders it.
    """
    return gather_ahead(layout.place(cfg), layout.axes, layout.gather_dtype) if gathers_ahead(cfg, execution) else None


def gathers_ahead(cfg: ModelConfig, execution: Execution) -> bool:
    """Whether FSDP's weights of a layer travel while the one before is computed. A pipeline's stages never do it."""
    return cfg.gradient_checkpointing == "none" and execution.compile != "step"


def make_outer(cfg: ModelConfig, layout: Layout) -> Callable[[P.Params], P.Params]:
    """A function that makes embedding, final norm and head whole where FSDP has cut them; the layers stay cut."""
    return make_gather(layout.place(cfg), layout.axes, stacked=False, dtype=layout.gather_dtype)


def head_weight(cfg: ModelConfig, params: P.Params) -> Tensor:
    return params[P.EMBED] if cfg.tie_word_embeddings else params[P.HEAD]


def layer_stacks(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """path -> the layer of each row, for every stacked parameter."""
    return {path: spec.layers for path, spec in P.abstract_params(cfg).items() if spec.layers is not None}


def unstack_layers(params: P.Params, stacks: Mapping[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Per-layer parameter dicts, names relative to the block; `stacks` as layer_stacks gives it.

    Raises KeyError for a path that the model doesn't have, ValueError for a stack of another height.

    One unbind a leaf: indexing a stack layer by layer makes its backward write zeros of the whole stack every time.
    """
    layers: list[dict[str, Tensor]] = [{} for _ in range(1 + max(map(max, stacks.values())))]
    for path, leaf in params.items():
        if path.startswith(P.LAYERS):
            rows = leaf.unbind(0) if isinstance(leaf, Tensor) else leaf
            for layer, row in zip(stacks[path], rows, strict=True):
                layers[layer][path.removeprefix(P.LAYERS)] = row
    return layers
