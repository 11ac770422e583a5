"""A GIF, APNG or animated WebP as a video with a constant frame rate: a frame that is shown longer is repeated.

Frames are decoded on access. So of a long GIF only the sampled frames (vision.video.sample_frames) are decoded, and the
frames that they are built on in the file.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwen3f.errors import UserError
from qwen3f.vision.frame_times import frame_times
from qwen3f.vision.rgb import to_rgb


class HeldFrames(Sequence[Image.Image]):
    """The frame that is shown at each tick. Access ticks in order: going back decodes the file from its beginning."""

    def __init__(self, image: Image.Image, name: str, ticks: Sequence[int]) -> None:
        """ticks: number of ticks of each frame. name: of the file, for errors."""
        self._image, self._name, self._ends = image, name, np.cumsum(ticks)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, tick: int) -> Image.Image:
        """The frame at a tick, in RGB. Raises UserError as to_rgb."""
        self._image.seek(int(np.searchsorted(self._ends, tick, side="right")))
        frame = self._image.copy()
        frame.info = dict(self._image.info)
        return to_rgb(frame, self._name)


def gif_frames(image: Image.Image, name: str, fps: float | None = None) -> tuple[Sequence[Image.Image], float | None]:
    """(frames, frames per second), as video_patches takes them.

    image: opened from a file. fps: each frame is shown once, at this rate. None: use the file's own times. A tick is
    then the greatest common divisor of these times; a frame without a time is left out; if no frame has a time, the
    returned rate is None. Raises UserError for a file that ends before its last frame.
    """
    count = getattr(image, "n_frames", 1)
    if fps is not None:
        return HeldFrames(image, name, [1] * count), fps
    ticks, fps = gif_ticks(image, name)
    return HeldFrames(image, name, ticks), fps


def gif_ticks(image: Image.Image, name: str) -> tuple[list[int], float | None]:
    """(number of ticks of each frame, ticks per second or None), as in gif_frames, without decoding a frame."""
    count = getattr(image, "n_frames", 1)
    times = frame_times(Path(image.filename).read_bytes())
    if count != len(times):
        raise UserError(f"{name} cannot be read (it has {len(times)} of its {count} frames): copy it again.")
    if not any(times):
        return [1] * count, None
    tick = math.gcd(*times)
    return [time // tick for time in times], 1000 / tick
