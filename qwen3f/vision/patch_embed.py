"""Embeds flat patches: a matrix product, plus learned positions that are interpolated to each image's grid.

The product over flat patches equals a convolution whose stride is its size, and is much faster than cuDNN's.

B rows · P patches of a row · C tower width · S rows and columns of the table of positions
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig


def patch_places(rows_BP: Tensor, columns_BP: Tensor, heights_BP: Tensor, widths_BP: Tensor, side: int) -> Tensor:
    """float64 [B, P, 2]: coordinates of each patch in a table of side × side learned positions, 0 … side − 1.

    The corners of an image map to the corners of the table; an image that is one patch high maps to its top row.
    """
    places = []
    for index, size in ((rows_BP, heights_BP), (columns_BP, widths_BP)):
        places.append(index.to(torch.float64) * (side - 1) / (size - 1).clamp(min=1))
    return torch.stack(places, -1)


def interpolated(table: Tensor, places_BP2: Tensor, side: int) -> Tensor:
    """[B, P, C]: bilinear interpolation of the table [S², C], computed in at least float32. side: S."""
    wide = torch.promote_types(table.dtype, torch.float32)
    floor = places_BP2.floor()
    part = (places_BP2 - floor).to(wide)
    low = floor.to(torch.int64)
    high = (low + 1).clamp(max=side - 1)
    total = None
    for row, of_row in ((low[..., 0], 1 - part[..., 0]), (high[..., 0], part[..., 0])):
        for column, of_column in ((low[..., 1], 1 - part[..., 1]), (high[..., 1], part[..., 1])):
            term = F.embedding(row * side + column, table).to(wide) * (of_row * of_column)[..., None]
            total = term if total is None else total + term
    return total


def embed(cfg: ModelConfig, params: P.Params, pixels_BPV: Tensor, places_BP2: Tensor) -> Tensor:
    """The tower's input [B, P, C], in the parameters' dtype."""
    weight, bias = params[P.PATCH_EMBED + "weight"], params[P.PATCH_EMBED + "bias"]
    x_BPC = F.linear(pixels_BPV.to(weight.dtype), weight, bias)
    return x_BPC + interpolated(params[P.POSITIONS], places_BP2, cfg.vision_grid_side).to(x_BPC.dtype)
