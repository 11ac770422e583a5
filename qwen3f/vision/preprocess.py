"""Images and video frames as flat patches, with pillow and numpy alone.

The pixels are those of transformers' Qwen2VLImageProcessorPil with Qwen3-VL's settings, bit for bit on one version of
pillow (version 13 changed what resizing gives). Pictures become RGB by qwen3f.vision.rgb, whose rule differs where it
says so.

H, W height and width in pixels · h, w in patches · t groups of frames · p patch size · m patches of a merged token's
side · C channels · T frames of a patch
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
"""What a Qwen3-VL image is scaled to lie between."""

MAX_RATIO = 200
"""Of the longer side to the shorter one; exactly this passes."""

Grid = tuple[int, int, int]


def image_patches(
    image: Image.Image, cfg: ModelConfig, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Grid]:
    """(patches float32 [h·w, C·T·p·p] in [−1, 1], its grid (1, h, w) in patches).

    Patches come in blocks of m × m that make one token, blocks row by row; a patch is (C, T, p, p), the image repeated
    over T. Raises UserError for a picture that cannot be decoded (to_rgb), is narrower than 1 : 200, or limits that
    leave no patch.
    """
    rgb = to_rgb(image)
    height, width = fit_size(rgb.height, rgb.width, token_side(cfg), min_pixels, max_pixels)
    pixels_HWC = np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))
    frames = np.broadcast_to(pixels_HWC, (cfg.vision_temporal_patch_size, *pixels_HWC.shape))
    return flat_patches(frames, cfg)


def image_grid(height: int, width: int, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> Grid:
    """The grid that image_patches gives for an upright image of this size, without looking at its pixels."""
    high, wide = fit_size(height, width, token_side(cfg), min_pixels, max_pixels)
    return 1, high // cfg.vision_patch_size, wide // cfg.vision_patch_size


def merged_tokens(grid: Grid, cfg: ModelConfig) -> int:
    """How many tokens of the language model an image or video of this grid takes."""
    return math.prod(grid) // cfg.vision_merger_spatial_factor**2


def fit_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width), multiples of `factor`, nearly of the same ratio and between the two numbers of pixels.

    transformers' smart_resize. Deviation: a side of less than factor / 2 becomes `factor` where the image has
    min_pixels already (never with Qwen3-VL's limits); there it would be scaled down to one token.
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
    """Pixels of a merged token's side."""
    if cfg.vision_num_channels != 3:
        raise UserError(f"model.vision_num_channels={cfg.vision_num_channels}: images are read as RGB; write 3")
    return cfg.vision_patch_size * cfg.vision_merger_spatial_factor


def check_limits(factor: int, min_pixels: int, max_pixels: int, section: str = "") -> None:
    """Raises UserError for limits that no image can keep, or only as a huge one. section: before their names on the
    command line."""
    if not 1 <= min_pixels <= max_pixels or max_pixels < factor**2:
        raise UserError(
            f"{section}min_pixels={min_pixels} and {section}max_pixels={max_pixels} leave no size for an image: write "
            f"1 or more and at least {factor**2}, one token's pixels"
        )
    if min_pixels > PIXELS.default:
        raise UserError(
            f"{section}min_pixels={min_pixels} makes of every image one of more than {PIXELS.default:,} pixels: write "
            "less"
        )


def check_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"an image of {width} × {height} pixels is narrower than 1 : {MAX_RATIO}: cut it")


@functools.cache
def _levels() -> np.ndarray:
    """float32 [256]: (u / 255 − 0.5) / 0.5, rounded where transformers rounds."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


def flat_patches(frames_FHWC: Sequence[np.ndarray] | np.ndarray, cfg: ModelConfig) -> tuple[np.ndarray, Grid]:
    """Frames of one size, whole groups of T, as flat patches and their grid."""
    p, m, T = cfg.vision_patch_size, cfg.vision_merger_spatial_factor, cfg.vision_temporal_patch_size
    frames, height, width, channels = np.shape(frames_FHWC)
    t, h, w = frames // T, height // p, width // p
    blocks = np.asarray(frames_FHWC).reshape(t, T, h // m, m, p, w // m, m, p, channels)
    flat = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels * T * p * p)
    return _levels()[flat], (t, h, w)
