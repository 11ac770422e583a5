"""Video as frames: which frames are sampled, their times, and their patches (Qwen3-VL's rules).

A video is a list of pictures and their frame rate. The model reads the time as words before each group of frames.
Deviation from transformers: a video without a frame rate is an error; transformers assumes 24 frames per second.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.vision import preprocess
from qwen3f.vision.preprocess import Grid, check_limits, check_ratio, flat_patches, token_side
from qwen3f.vision.rgb import to_rgb

MIN_PIXELS, MAX_PIXELS = 4096, 25_165_824
"""Limits of height · width · frames of a whole video, as in Qwen3-VL's released preprocessors."""

MIN_FRAMES, MAX_FRAMES = 4, 768

LEAST_RATE, MOST_RATE = 1e-6, 1e6
"""Limits of frames per second: from one frame in eleven days, so that times can be written, to one in a microsecond."""


def is_rate(fps: float) -> bool:
    """Whether a video can have this number of frames per second; not NaN."""
    return LEAST_RATE <= fps <= MOST_RATE


def sample_frames(count: int, source_fps: float, fps: float = 2.0) -> list[int]:
    """Indices of the frames to sample, `fps` per second, from `count` frames taken at source_fps.

    They are evenly spread from the first to the last frame; at least MIN_FRAMES (if the video has as many), at most
    MAX_FRAMES. Raises UserError if there are no frames, and unless is_rate.
    """
    if count < 1:
        raise UserError("a video without frames cannot be read")
    for name, rate in (("the video's own rate", source_fps), ("the sampling rate", fps)):
        if not is_rate(rate):
            raise UserError(f"{name} is {rate} frames a second; give a number from {LEAST_RATE:g} to {MOST_RATE:g}")
    wanted = min(max(int(min(count / source_fps * fps, MAX_FRAMES)), MIN_FRAMES), count)
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def timestamps(indices: Sequence[int], source_fps: float, group: int) -> list[float]:
    """Time of each group of frames in seconds: the mean of its first and last frame. An incomplete last group repeats
    the last frame."""
    full = [*indices, *[indices[-1]] * (-len(indices) % group)]
    times = [index / source_fps for index in full]
    return [(times[i] + times[i + group - 1]) / 2 for i in range(0, len(times), group)]


def fit_size(
    frames: int, height: int, width: int, factor: int, group: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) of every frame, where the limits are for the whole video: transformers' rule for Qwen3-VL.

    group: frames of a patch. Sides below `factor` are first scaled up to it.
    """
    check_limits(factor, min_pixels, max_pixels)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    total = round(frames / group) * group * high * wide
    if total > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if total < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


def video_limits(min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a whole video from those of an image, in the same ratio as Qwen3-VL's limits."""
    low, high = MIN_PIXELS / preprocess.MIN_PIXELS, MAX_PIXELS / preprocess.MAX_PIXELS  # 1/16 and 3/2, exact
    return max(1, int(min_pixels * low)), int(max_pixels * high)


def video_grid(
    count: int,
    source_fps: float,
    height: int,
    width: int,
    cfg: ModelConfig,
    fps: float = 2.0,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Grid, list[float]]:
    """(grid, seconds of each group) that video_patches gives for `count` frames of this size; reads no pixels."""
    indices, group = sample_frames(count, source_fps, fps), cfg.vision_temporal_patch_size
    shown = max(len(indices), group)
    high, wide = fit_size(shown, height, width, token_side(cfg), group, min_pixels, max_pixels)
    times = timestamps(indices, source_fps, group)
    return (len(times), high // cfg.vision_patch_size, wide // cfg.vision_patch_size), times


def video_patches(
    frames: Sequence[Image.Image],
    source_fps: float,
    cfg: ModelConfig,
    fps: float = 2.0,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, Grid, list[float]]:
    """(patches float32 [t·h·w, C·T·p·p], grid (t, h, w), seconds of each of the t groups of frames).

    frames: all frames of the video; only those of sample_frames are decoded. All are scaled to the size that the first
    frame gets. Raises UserError as sample_frames and image_patches.
    """
    indices = sample_frames(len(frames), source_fps, fps)
    group = cfg.vision_temporal_patch_size
    count, size = max(len(indices), group), None
    resized = []
    for index in indices:  # one at a time: all frames at their own size could take much memory
        picture = to_rgb(frames[index])
        if size is None:
            size = fit_size(count, picture.height, picture.width, token_side(cfg), group, min_pixels, max_pixels)
        resized.append(np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)))
    resized += [resized[-1]] * (-len(resized) % group)
    patches, grid = flat_patches(np.stack(resized), cfg)
    return patches, grid, timestamps(indices, source_fps, group)


def frame_text(seconds: float) -> str:
    """The text before a group of frames."""
    return f"<{seconds:.1f} seconds>"
