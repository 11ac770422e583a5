"""Positions of the tokens of a row with images, in time, height and width; and the merged feature of each placeholder.

Qwen3-VL's rules (transformers, Qwen3VLModel.get_rope_index): a word advances all three axes by one. All tokens of a
frame have the time at which the frame begins; from there, height and width count rows and columns. The next token
continues after the larger of height and width. A video is a sequence of frames with words between them.

Deviation from transformers: two images without a word between them follow each other (in transformers, an error).

B rows · T sequence · n images or groups of frames of a row · K merged features of a row
P patches of a row · V values of a patch
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError


class Places(NamedTuple):
    """Places of items (patches or merged features), which are numbered over all frames of a row. All fields are [B, K].

    image: index of the row's grid that holds the item. start: number of the first item of that grid. frame: index of
    the frame in that grid. local: place within the frame. height, width: of the frame. there: whether the item exists.
    """

    image: Tensor
    start: Tensor
    frame: Tensor
    local: Tensor
    height: Tensor
    width: Tensor
    there: Tensor


def places_of(items_BK: Tensor, grids_Bn3: Tensor) -> Places:
    """The places of items[b, k], numbers from 0, in the grids of row b. Shapes are static; the host never waits.

    grids: t, h, w of each image, counted in items; grids of zeros are no images. Items beyond the last get a frame of
    1 × 1 and there = False.
    """
    if not grids_Bn3.shape[1]:
        grids_Bn3 = grids_Bn3.new_zeros(len(grids_Bn3), 1, 3)
    sizes_Bn = grids_Bn3.to(torch.int64).prod(-1)
    ends_Bn = sizes_Bn.cumsum(1)
    total_B1 = ends_Bn[:, -1:]
    there = (items_BK >= 0) & (items_BK < total_B1)
    inside = torch.where(there, items_BK, 0).contiguous()
    image = torch.searchsorted(ends_Bn, inside, right=True).clamp(max=grids_Bn3.shape[1] - 1)
    start = (ends_Bn - sizes_Bn).gather(1, image)
    height, width = (
        torch.where(there, grids_Bn3[..., axis].to(torch.int64).gather(1, image), 1).clamp(min=1) for axis in (1, 2)
    )
    frame = (inside - start) // (height * width)
    local = (inside - start) % (height * width)
    return Places(image, start, frame, local, height, width, there)


def merged_grids(grids_Bn3: Tensor, cfg: ModelConfig) -> Tensor:
    """Grids in merged tokens, from grids in patches."""
    side = cfg.vision_merger_spatial_factor
    return torch.stack((grids_Bn3[..., 0], grids_Bn3[..., 1] // side, grids_Bn3[..., 2] // side), -1)


def is_visual(tokens_BT: Tensor, cfg: ModelConfig) -> Tensor:
    """bool [B, T]: whether a token is a placeholder, which a feature replaces."""
    return (tokens_BT == cfg.image_token_id) | (tokens_BT == cfg.video_token_id)


def visual_index(tokens_BT: Tensor, cfg: ModelConfig) -> Tensor:
    """int32 [B, T]: 0 for a word, else 1 + the number of the row's merged feature that replaces this placeholder."""
    visual = is_visual(tokens_BT, cfg)
    return torch.where(visual, visual.cumsum(1), 0).to(torch.int32)


def position_ids(tokens_BT: Tensor, grids_Bn3: Tensor, cfg: ModelConfig, segments_BT: Tensor | None = None) -> Tensor:
    """int64 [B, 3, T]: positions in time, height and width.

    Args:
      tokens: int64; placeholders are in the order of grids, one for each merged feature.
      grids: t, h, w in patches of each image or video, in the order of the row; rows of zeros are no images.
      segments: document numbers; positions restart where they change. None: a row is one document.
    Raises UserError, naming the row, if the numbers of placeholders and features differ.
    """
    check_counts(tokens_BT, grids_Bn3, cfg)
    length = tokens_BT.shape[1]
    visual = is_visual(tokens_BT, cfg)
    at = places_of(visual.cumsum(1) - 1, merged_grids(grids_Bn3, cfg))
    last = at.local == at.height * at.width - 1
    # How far each token advances the positions after it. A frame does so once, at its last token.
    steps = torch.where(visual, torch.where(last, torch.maximum(at.height, at.width), 0), 1)
    before = steps.cumsum(1) - steps
    if segments_BT is not None:
        new = torch.ones_like(visual)
        new[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        start = torch.where(new, torch.arange(length, device=tokens_BT.device), 0).cummax(1).values
        before = before - before.gather(1, start)
    row, column = at.local // at.width, at.local % at.width
    spread = torch.stack((torch.zeros_like(row), row, column), 1)
    return before[:, None] + torch.where(visual[:, None], spread, 0)


def next_position(positions_B3T: Tensor) -> Tensor:
    """int64 [B]: the position, equal on all axes, of the token that would follow the row."""
    return positions_B3T.amax((1, 2)) + 1


def check_patches(grids_Bn3: Tensor, pixels_BPV: Tensor) -> None:
    """Raises UserError unless each row has at least as many patches as its grids name: else it sees the next row's."""
    if pixels_BPV.dim() != 3 or len(pixels_BPV) != len(grids_Bn3):
        raise UserError(
            f"pixel_values must be [rows, patches, values] with {len(grids_Bn3)} rows like grids, got "
            f"{list(pixels_BPV.shape)}"
        )
    for row, patches in enumerate(grids_Bn3.to(torch.int64).prod(-1).sum(1).tolist()):
        if patches > pixels_BPV.shape[1]:
            raise UserError(
                f"row {row} has {patches} patches by its grids, but pixel_values has only {pixels_BPV.shape[1]} in a "
                "row; give all patches, with zeros after those of shorter rows"
            )


def check_counts(tokens_BT: Tensor, grids_Bn3: Tensor, cfg: ModelConfig) -> None:
    """Raises UserError unless each row has one placeholder for each merged feature, and grids can be merged."""
    side = cfg.vision_merger_spatial_factor
    if grids_Bn3.dim() != 3 or len(grids_Bn3) != len(tokens_BT) or grids_Bn3.shape[-1] != 3:
        raise UserError(
            f"grids must be [rows, images, 3] with {len(tokens_BT)} rows like tokens, got {list(grids_Bn3.shape)}; a "
            "row with fewer images has zeros after its own"
        )
    if (grids_Bn3 < 0).any() or (grids_Bn3[..., 1:] % side).any():
        raise UserError(f"grids must be numbers of patches, height and width multiples of {side}: {grids_Bn3.tolist()}")
    found = is_visual(tokens_BT, cfg).sum(1).tolist()
    given = merged_grids(grids_Bn3, cfg).to(torch.int64).prod(-1).sum(1).tolist()
    for row, (tokens, features) in enumerate(zip(found, given)):
        if tokens != features:
            raise UserError(
                f"row {row} has {tokens} placeholders (<|image_pad|>, <|video_pad|>) for {features} features of its "
                "images; write one for each feature, and remove those that a user has typed"
            )
