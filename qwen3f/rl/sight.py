"""Questions about images: their placeholders in a prompt, and the pixels, grids and positions of a step's rows.

The engine never draws the ids of images, but the trainer's log-probabilities treat them as any other ids. A trained
model gives them almost no probability; whatever it gives them shows as a difference in sampler_kl.

R rows · T places · P patches of a row · n images of a row
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.data.multimodal.samples import image_segments
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.infer.pictures import Pictures
from qwen3f.vision.mrope import position_ids, visual_index
from qwen3f.vision.preprocess import image_grid, image_patches, merged_tokens

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sight:
    """How images become patches. cfg: of a model with a vision tower. min_pixels, max_pixels: limits after scaling."""

    cfg: ModelConfig
    min_pixels: int
    max_pixels: int

    def segments(self, images: Sequence[Image.Image]) -> list[list[Segment]]:
        """The segments of text with placeholders for each image. Raises UserError for an image that is too narrow."""
        limits = self.min_pixels, self.max_pixels
        grids = [image_grid(image.height, image.width, self.cfg, *limits) for image in images]
        return [image_segments(merged_tokens(grid, self.cfg)) for grid in grids]

    def look(self, images: Sequence[Image.Image]) -> Pictures | None:
        """The patches of all images; None without images."""
        if not images:
            return None
        return Pictures.of([image_patches(image, self.cfg, self.min_pixels, self.max_pixels) for image in images])


def with_pixels(rows: Arrays, shown: Sequence[Sequence[Pictures]], cfg: ModelConfig) -> Arrays:
    """rows with pixel_values [R, P, values], grids [R, n, 3], visual_index [R, T] and positions [R, 3, T].

    shown: pictures of each row, in the order of its documents. P and n are the numbers that the fullest row needs,
    rounded up to a power of two, so that few different shapes occur.
    """
    pixels = [
        torch.cat([one.pixels for one in row]) if row else torch.zeros(0, cfg.vision_patch_values) for row in shown
    ]
    grids = [torch.cat([one.grids for one in row]) if row else torch.zeros(0, 3, dtype=torch.int64) for row in shown]
    tokens, segments = torch.from_numpy(rows["tokens"]), torch.from_numpy(rows["segments"])
    grids_Rn3 = _stacked(grids).to(torch.int32)
    positions = position_ids(tokens, grids_Rn3, cfg, segments)
    return {
        **rows,
        "positions": torch.where(segments[:, None] != 0, positions, 0).numpy(),
        "visual_index": visual_index(tokens, cfg).numpy(),
        "pixel_values": _stacked(pixels).to(torch.float32).numpy(),
        "grids": grids_Rn3.numpy(),
    }


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks R tensors [N_r, …] to [R, N, …], filled up with zeros; N is a power of two."""
    most = 1 << (max(1, max(map(len, parts))) - 1).bit_length()
    out = parts[0].new_zeros(len(parts), most, *parts[0].shape[1:])
    for row, part in zip(out, parts):
        row[: len(part)] = part
    return out
