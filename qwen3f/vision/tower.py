"""The vision tower as a pure function: patches through embedding, blocks and mergers to features of tokens.

Shapes are static: a row has room for P patches, and its grids say how many are used. The rest is padding: each padding
patch attends only to itself, and no token uses it.

B rows · P patches of a row · V values of a patch · n grids of a row · C tower width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.skeletons import LayerFn, layer_fn
from qwen3f.vision.deepstack import Features, Fusion
from qwen3f.vision.merger import make_merger
from qwen3f.vision.mrope import places_of
from qwen3f.vision.patch_embed import embed, patch_places
from qwen3f.vision.patch_split import all_patches, fill_up, own_patches
from qwen3f.vision.vit import Block, FrameMask, frame_mask, rotary_tables
from sharding.axes import ONE, Axes
from sharding.layout import ONE_DEVICE, Layout

Tower = Callable[[P.Params, Tensor, Tensor], Features]


class PatchInputs(NamedTuple):
    """Inputs derived from the grids: cos, sin and mask for all blocks, places [B, P, 2] in the table of positions."""

    cos: Tensor
    sin: Tensor
    mask: FrameMask
    places: Tensor


def make_tower(cfg: ModelConfig, attention: str, compile: str, layout: Layout = ONE_DEVICE) -> Tower:
    """tower(params, pixel_values [B, P, V], grids [B, n, 3]) -> Features.

    attention, compile: as in model.Execution. params: this rank's shards; those that are in no stack must be what
    model.make_outer returns; a stack may be a tuple of its layers. Ranks of tp and cp divide the patches of their rows,
    and all of them get all features.
    """
    inject, axes = cfg.vision_deepstack_mode == "llm_inject", layout.axes
    with torch.device("meta"):
        block, merger, tap_merger = Block(cfg, attention, axes), make_merger(cfg, tap=False), make_merger(cfg, tap=True)
        fusion = Fusion(cfg)

    def run(skeleton: torch.nn.Module, stack: str) -> LayerFn:
        return layer_fn(skeleton, cfg, layout, stack, compiled=compile == "block")

    run_block, run_tap, run_fusion = (
        run(block, P.VISUAL_BLOCKS),
        run(tap_merger, P.TAP_MERGERS),
        run(fusion, P.TAP_FUSIONS),
    )

    def tower(params: P.Params, pixels_BPV: Tensor, grids_Bn3: Tensor) -> Features:
        dtype = params[P.PATCH_EMBED + "weight"].dtype
        pixels_BPV = fill_up(pixels_BPV, axes, cfg.vision_merger_spatial_factor**2)
        inputs = patch_inputs(cfg, grids_Bn3, pixels_BPV.shape[1], dtype, attention, axes, compile != "off")
        x = embed(cfg, params, own_patches(pixels_BPV, axes), inputs.places)
        blocks = _rows(params, P.VISUAL_BLOCKS)
        fusions, mergers = _rows(params, P.TAP_FUSIONS), _rows(params, P.TAP_MERGERS)
        fused, taps = [], []
        for layer, weights in enumerate(blocks):
            (x,) = run_block(weights, x, inputs.cos, inputs.sin, inputs.mask)
            if inject and layer in cfg.vision_deepstack_layers:
                taps += run_tap(mergers[len(taps)], x)
            if layer in P.fused_taps(cfg):
                fused += run_fusion(fusions[len(fused)], x)
        for part in fused:
            x = x + part
        own = {path.removeprefix(P.MERGER): leaf for path, leaf in params.items() if path.startswith(P.MERGER)}
        (merged,) = torch.func.functional_call(merger, own, (x,), strict=True)
        return Features(all_patches(merged, axes), tuple(all_patches(tap, axes) for tap in taps))

    return tower


def patch_inputs(
    cfg: ModelConfig,
    grids_Bn3: Tensor,
    count: int,
    dtype: torch.dtype,
    attention: str,
    axes: Axes = ONE,
    compiled: bool = False,
) -> PatchInputs:
    """Inputs for this rank's patches, for rows with room for `count` patches. dtype: of the tower. compiled: whether
    the blocks are compiled."""
    place = torch.arange(count, device=grids_Bn3.device).expand(len(grids_Bn3), count)
    at = places_of(place, grids_Bn3)
    side = cfg.vision_merger_spatial_factor
    # blocks of side × side patches, block by block along a row of blocks
    block, inner = at.local // side**2, at.local % side**2
    across = (at.width // side).clamp(min=1)
    row = block // across * side + inner // side
    column = block % across * side + inner % side
    start = torch.where(at.there, at.start + at.frame * at.height * at.width, place)
    end = torch.where(at.there, start + at.height * at.width, place + 1)
    row, column, start, end, height, width = (
        own_patches(x, axes) for x in (row, column, start, end, at.height, at.width)
    )
    head_dim = cfg.vision_hidden_size // cfg.vision_num_attention_heads
    return PatchInputs(
        *rotary_tables(cfg, row, column, dtype),
        frame_mask(start, end, count, attention, head_dim, compiled),
        patch_places(row, column, height, width, cfg.vision_grid_side),
    )


def _rows(params: P.Params, stack: str) -> list[P.Params]:
    """A stack's parameters as a dict for each layer, keyed by name within the layer; [] if the model has no stack."""
    leaves = {path.removeprefix(stack): leaf for path, leaf in params.items() if path.startswith(stack)}
    rows = {name: leaf.unbind(0) if isinstance(leaf, Tensor) else leaf for name, leaf in leaves.items()}
    return [dict(zip(rows, values)) for values in zip(*rows.values(), strict=True)]
