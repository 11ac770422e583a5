"""The model as a pure function: embedding (with image features in place of their placeholders), blocks, final norm,
head.

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
from qwen3f.errors import UserError
from qwen3f.model.attention import AttentionMask, batch_mask
from qwen3f.model.block import block_fn
from qwen3f.model.execution import EAGER, Execution, refuse_dropout, refuse_vmap
from qwen3f.model.kv_cache import PagedLayer
from qwen3f.model.moe import RouterStats
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables
from qwen3f.skeletons import LayerFn
from qwen3f.vision.deepstack import Visual, inject, place_features, splice
from qwen3f.vision.mrope import check_counts, check_patches, position_ids, visual_index
from qwen3f.vision.tower import make_tower
from sharding.fsdp import GatherAhead, gather_ahead, make_gather
from sharding.layout import ONE_DEVICE, Layout
from sharding.tensor import embedding


class ModelOutput(NamedTuple):
    """logits [B, T, V] in the parameters' dtype; hidden [B, T, D] after the final norm.

    router: the routers' statistics, with a leading axis of sparse layers; None for a dense model.
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
      params: as from qwen3f.params.init_params. Their dtype is the compute dtype. A stacked leaf may also be a tuple of
        its layers.
      batch: "tokens" int64 [B, T]. Optional: "positions" int64 [B, T] (default 0 … T−1); "segments" int32 [B, T], the
        number of the token's document, 0 for padding (default: one document per row); "real" bool [B, T], False for
        tokens that routers do not count (default: segments != 0). With a vision tower also "pixel_values"
        [B, P, values] and "grids" [B, n, 3] (patches of each image in time, height and width); "visual_index" [B, T]
        and "positions" [B, 3, T] are computed if absent. Without "pixel_values", placeholders of images are ordinary
        tokens, as in transformers. Other keys are ignored.
      dropout_stream: int64 scalar tensor; attention_dropout applies exactly when it is given.
    Raises UserError for a batch without tokens, for images without a tower, if the number of placeholders differs from
    that of the features, and as with_places; IndexError (CPU) for a token beyond the vocabulary.
    """
    check_tokens(batch["tokens"])
    run = make_forward(cfg, execution, dropout=dropout_stream is not None)
    hidden, stats = run(params, with_places(batch, cfg), dropout_stream)
    return ModelOutput(F.linear(hidden, head_weight(cfg, params)), hidden, stats)


def check_tokens(tokens: Tensor) -> None:
    """Raises UserError unless tokens are [B, T] with at least one."""
    if tokens.dim() != 2 or not tokens.numel():
        raise UserError(f"tokens must be [rows, length] with at least one token, got {list(tokens.shape)}")


def make_forward(
    cfg: ModelConfig, execution: Execution = EAGER, *, dropout: bool = False, layout: Layout = ONE_DEVICE
) -> Forward:
    """forward(params, batch, dropout_stream=None) -> (hidden, router), as in ModelOutput.

    On a mesh, params are this rank's shards, but embedding, final norm and head must first go through `make_outer`.
    hidden is this rank's part of the sequence, and the statistics are this rank's.

    Skeletons are built here, once, because modules can't be built inside a compiled step. dropout: whether the function
    will be called with a dropout_stream; attention then uses the reference formula. Arguments of the function as in
    `apply`. Raises UserError for dropout with model.INVARIANT.
    """
    if dropout and cfg.attention_dropout:
        refuse_dropout(cfg, execution)
        execution = dataclasses.replace(execution, attention="reference")
    body, see = make_body(cfg, execution, layout), make_sight(cfg, execution, layout)

    def forward(
        params: P.Params, batch: Mapping[str, Tensor], dropout_stream: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        visual = see(params, batch)
        masks = [batch_mask(batch, execution, cfg.head_dim, layout.axes.cp)] * cfg.num_hidden_layers
        real = real_tokens(batch) if cfg.sparse_layers else None
        return body(params, batch["tokens"], positions_of(batch), masks, real, dropout_stream, visual)

    return forward


def make_sight(
    cfg: ModelConfig, execution: Execution, layout: Layout = ONE_DEVICE
) -> Callable[[P.Params, Mapping[str, Tensor]], Visual | None]:
    """see(params, batch) -> the vision tower's features of the batch's images, and their places; None without images.

    The batch needs "visual_index" too (with_places adds it). Params as for make_forward's function.
    """
    tower = make_tower(cfg, execution.attention, execution.compile, layout) if cfg.vision_enabled else None

    def see(params: P.Params, batch: Mapping[str, Tensor]) -> Visual | None:
        if "pixel_values" not in batch:
            return None
        if tower is None:
            raise UserError(
                "the batch has images, but the model has no vision tower (config.model.vision_enabled=False); use a "
                "model with one, or leave out pixel_values"
            )
        if execution.invariant:
            raise UserError("model.INVARIANT is for batches without images; use another execution")
        features = tower(params, batch["pixel_values"], batch["grids"])
        return place_features(features, batch["visual_index"], layout.axes.tp)

    return see


def with_places(batch: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The batch; if it has images, with visual_index and positions added where they are absent.

    Raises UserError as position_ids, for images without grids, for a row with fewer patches than its grids need, and
    for patches of another size than the model's.
    """
    if "pixel_values" not in batch:
        return dict(batch)
    if "grids" not in batch:
        raise UserError(
            "the batch has pixel_values but no grids; add grids [B, n, 3]: time, height and width of each image, in "
            "patches"
        )
    tokens, grids, values = batch["tokens"], batch["grids"], batch["pixel_values"].shape[-1]
    check_counts(tokens, grids, cfg)
    check_patches(grids, batch["pixel_values"])
    if values != cfg.vision_patch_values:
        raise UserError(
            f"pixel_values holds patches of {values} values, but the model takes {cfg.vision_patch_values}; make the "
            "patches with the model's own config (image_patches)"
        )
    if not batch["pixel_values"].shape[1]:  # no patches; kernels need at least one
        return {key: x for key, x in batch.items() if key != "pixel_values"}
    made = {"visual_index": visual_index(tokens, cfg)}
    if "positions" not in batch:
        made["positions"] = position_ids(tokens, grids, cfg, batch.get("segments"))
    return {**made, **batch}


def positions_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's positions, int64 [B, T] or [B, 3, T]; 0 … T−1 if it has none."""
    tokens = batch["tokens"]
    positions = batch.get("positions")
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape) if positions is None else positions


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """bool [B, T], False for padding; None if the batch has neither "real" nor "segments"."""
    if "real" in batch:
        return batch["real"]
    return batch["segments"] != 0 if "segments" in batch else None


def make_body(cfg: ModelConfig, execution: Execution, layout: Layout = ONE_DEVICE) -> Forward:
    """body(params, tokens, positions, masks, real, dropout_stream=None, visual=None) -> as make_forward's function.

    tokens: [B, T]. positions: [B, T] or [B, 3, T]. masks: one per layer: an AttentionMask, or a PagedLayer, which also
    holds the layer's earlier keys and values (qwen3f.model.cached). real: bool [B, T] or None, from real_tokens.
    visual: from make_sight's function.
    """
    ahead = _weights_ahead(cfg, execution, layout)
    kinds = {cfg.is_sparse(layer) for layer in range(cfg.num_hidden_layers)}
    blocks = {kind: block_fn(cfg, execution, kind, layout, gathered=ahead is not None) for kind in kinds}
    stacks = layer_stacks(cfg)

    def body(
        params: P.Params,
        tokens: Tensor,
        positions: Tensor,
        masks: Sequence[AttentionMask | PagedLayer],
        real: Tensor | None = None,
        dropout_stream: Tensor | None = None,
        visual: Visual | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        refuse_vmap(execution, (tokens, params[P.EMBED]))
        x, seen = enter(embedding(tokens, params[P.EMBED], layout.axes.tp), visual)
        inputs = LayerInputs(*rope_tables(cfg, positions, x.dtype), masks, real, dropout_stream)
        x, stats = run_layers(cfg, blocks, unstack_layers(params, stacks), x, inputs, ahead=ahead, inject=seen)
        return rms_norm(x, params[P.FINAL_NORM], cfg.rms_norm_eps), stats

    return body


Inject = Callable[[int, Tensor], Tensor]


def enter(x: Tensor, visual: Visual | None) -> tuple[Tensor, Inject | None]:
    """(embedded tokens with the images' features at their places, the `inject` function for run_layers)."""
    if visual is None:
        return x, None
    return splice(x, visual), lambda layer, hidden: inject(hidden, visual, layer)


class LayerInputs(NamedTuple):
    """The inputs of a forward pass that all layers share.

    cos, sin: from rope_tables. masks: one per layer, see make_body. real: bool [B, T] or None, for routers.
    dropout_stream: int64 scalar tensor or None.
    """

    cos: Tensor
    sin: Tensor
    masks: Sequence[AttentionMask | PagedLayer]
    real: Tensor | None = None
    dropout_stream: Tensor | None = None


def run_layers(
    cfg: ModelConfig,
    blocks: Mapping[bool, LayerFn],
    layers: Mapping[int, P.Params],
    x: Tensor,
    inputs: LayerInputs,
    *,
    ahead: GatherAhead | None = None,
    inject: Inject | None = None,
) -> tuple[Tensor, RouterStats | None]:
    """Run the layers of a model, or of a slice of it: (hidden states after the last layer, the routers' statistics).

    Args:
      blocks: {whether sparse: block function from block_fn}.
      layers: number of each layer in the model -> its parameters, in order.
      x: hidden states, [B, T, D] or this rank's part of them (sharding.tensor.own_tokens).
      ahead: gathers a layer's weights while the one before is computed; None: block functions gather them.
      inject: (layer, its output) -> the hidden states for the next layer.
    """
    routed: list[list[Tensor]] = []
    weights = ahead.begin([*layers.values()]) if ahead else [*layers.values()]
    started = ahead.start(weights[0]) if ahead else None
    for place, index in enumerate(layers):
        layer = weights[place]
        if ahead:
            layer = ahead.finish(started)
            started = ahead.start(weights[place + 1]) if place + 1 < len(weights) else None
        stream = None if inputs.dropout_stream is None else rng.fold(inputs.dropout_stream, index)
        sparse = cfg.is_sparse(index)
        x, *stats = blocks[sparse](
            layer, x, inputs.cos, inputs.sin, inputs.masks[index], inputs.real if sparse else None, stream
        )
        if stats:
            routed.append(stats)
        if inject is not None:
            x = inject(index, x)
    return x, RouterStats(*(torch.stack(field) for field in zip(*routed, strict=True))) if routed else None


def _weights_ahead(cfg: ModelConfig, execution: Execution, layout: Layout) -> GatherAhead | None:
    """A GatherAhead that gathers a layer's weights while the one before is computed; None if the block gathers them.

    The block gathers them under recomputation, which has to gather them again, and with compile="step", because the
    compiler then orders the gathers.
    """
    if not gathers_ahead(cfg, execution):
        return None
    return gather_ahead(layout.place(cfg), layout.axes, P.LAYERS, layout.gather_dtype)


def gathers_ahead(cfg: ModelConfig, execution: Execution) -> bool:
    """Whether a layer's weights are gathered while the one before is computed. In a pipeline they never are."""
    return cfg.gradient_checkpointing == "none" and execution.compile != "step"


def make_outer(cfg: ModelConfig, layout: Layout) -> Callable[[P.Params], P.Params]:
    """A function that gathers embedding, vision tower, final norm and head where FSDP has cut them; stacks stay cut."""
    return make_gather(layout.place(cfg), layout.axes, stack="", dtype=layout.gather_dtype)


def head_weight(cfg: ModelConfig, params: P.Params) -> Tensor:
    """The head's weight [V, D]; for a model with a scalar head [1, D]."""
    return params[P.head_path(cfg)]


def layer_stacks(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """path of a stack -> the layer in each of its rows, for all parameters of the transformer's blocks."""
    return {path: spec.layers for path, spec in P.abstract_params(cfg).items() if spec.stack == P.LAYERS}


def unstack_layers(params: P.Params, stacks: Mapping[str, tuple[int, ...]]) -> dict[int, P.Params]:
    """layer -> its parameters, with names relative to the block. stacks: from layer_stacks.

    Raises KeyError for a stack that is missing or that the model does not have, ValueError for a wrong number of rows.

    It uses one unbind per stack: the backward pass of indexing would write a whole stack of zeros for every layer.
    """
    if unknown := [path for path in params if path.startswith(P.LAYERS) and path not in stacks]:
        raise KeyError(unknown[0])
    layers: dict[int, P.Params] = {layer: {} for layer in range(1 + max(map(max, stacks.values())))}
    for path, numbers in stacks.items():
        leaf = params[path]
        rows = leaf.unbind(0) if isinstance(leaf, Tensor) else leaf
        for layer, row in zip(numbers, rows, strict=True):
            layers[layer][path.removeprefix(P.LAYERS)] = row
    return layers
