"""Images and video frames as flat patches, with pillow and numpy alone.

The pixels equal those of transformers' Qwen2VLImageProcessorPil with Qwen3-VL's settings, bit for bit with the same
version of pillow (version 13 changed the results of resizing). qwen3f.vision.rgb converts pictures to RGB and says
where its rules differ from transformers.

H, W height and width in pixels · h, w height and width in patches · t groups of frames · p pixels of a patch's side ·
m patches of a merged token's side · C channels · T frames of a patch
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.limits import PIXELS
from qwen3f.vision.rgb import to_rgb

MIN_PIXELS, MAX_PIXELS = 256**2, 4096**2
"""Smallest and largest number of pixels of a Qwen3-VL image after scaling."""

MAX_RATIO = 200
"""Largest allowed ratio of the longer side to the shorter one."""

Grid = tuple[int, int, int]


def image_patches(
    image: Image.Image, cfg: ModelConfig, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Grid]:
    """(patches float32 [h·w, C·T·p·p] in [−1, 1], its grid (1, h, w) in patches).

    Blocks of m × m patches, row by row, make one token each. A patch is (C, T, p, p), with the image repeated over T.
    Raises UserError for a picture that cannot be decoded (to_rgb) or is narrower than 1 : 200, and for limits that no
    image can meet.
    """
    rgb = to_rgb(image)
    height, width = fit_size(rgb.height, rgb.width, token_side(cfg), min_pixels, max_pixels)
    pixels_HWC = np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))
    frames = np.broadcast_to(pixels_HWC, (cfg.vision_temporal_patch_size, *pixels_HWC.shape))
    return flat_patches(frames, cfg)


def image_grid(height: int, width: int, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> Grid:
    """The grid that image_patches gives for an upright image of this size, without reading its pixels."""
    high, wide = fit_size(height, width, token_side(cfg), min_pixels, max_pixels)
    return 1, high // cfg.vision_patch_size, wide // cfg.vision_patch_size


def merged_tokens(grid: Grid, cfg: ModelConfig) -> int:
    """The number of tokens of the language model for an image or video of this grid."""
    return math.prod(grid) // cfg.vision_merger_spatial_factor**2


def fit_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width), multiples of `factor` with nearly the same ratio, and min_pixels to max_pixels pixels.

    This is transformers' smart_resize, with one deviation: if an image already has min_pixels, a side shorter than
    factor / 2 becomes `factor` (never with Qwen3-VL's limits). transformers would scale such an image to one token.
    """
    check_limits(factor, min_pixels, max_pixels)
    check_ratio(height, width)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if height * width >= min_pixels:
        high, wide = max(high, factor), max(wide, factor)
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


def token_side(cfg: ModelConfig) -> int:
    """Side of a merged token in pixels. Raises UserError for a model whose images are not RGB."""
    if cfg.vision_num_channels != 3:
        raise UserError(f"model.vision_num_channels={cfg.vision_num_channels}: images are read as RGB; write 3")
    return cfg.vision_patch_size * cfg.vision_merger_spatial_factor


def check_limits(factor: int, min_pixels: int, max_pixels: int, section: str = "") -> None:
    """Raises UserError for limits that no image can meet, or only a huge one. section: prefix of their flags, for
    errors."""
    if not 1 <= min_pixels <= max_pixels or max_pixels < factor**2:
        raise UserError(
            f"{section}min_pixels={min_pixels} and {section}max_pixels={max_pixels} leave no size for an image: write "
            f"1 or more for min_pixels, and at least min_pixels and {factor**2} (one token) for max_pixels"
        )
    if min_pixels > PIXELS.default:
        raise UserError(
            f"{section}min_pixels={min_pixels} would scale every image to more than {PIXELS.default:,} pixels: write "
            "less"
        )


def check_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"an image of {width} × {height} pixels is narrower than 1 : {MAX_RATIO}: cut it")


@functools.cache
def _levels() -> np.ndarray:
    """float32 [256]: (u / 255 − 0.5) / 0.5 for each level u, with the same rounding as transformers."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


def flat_patches(frames_FHWC: Sequence[np.ndarray] | np.ndarray, cfg: ModelConfig) -> tuple[np.ndarray, Grid]:
    """(patches float32 [t·h·w, C·T·p·p], grid) of frames of one size, whose number is a multiple of T."""
    p, m, T = cfg.vision_patch_size, cfg.vision_merger_spatial_factor, cfg.vision_temporal_patch_size
    frames, height, width, channels = np.shape(frames_FHWC)
    t, h, w = frames // T, height // p, width // p
    blocks = np.asarray(frames_FHWC).reshape(t, T, h // m, m, p, w // m, m, p, channels)
    flat = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels * T * p * p)
    return _levels()[flat], (t, h, w)
