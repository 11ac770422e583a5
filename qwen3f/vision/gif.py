"""A GIF, APNG or animated WebP as a video of one rate: each frame says how long it is shown, a long one is several.

Frames are decoded when they are asked for, so of a long GIF only those that are looked at (vision.video.sample_frames)
and what their file builds them on.
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
    """The frame that is shown at each tick. Ask for ticks in order: going back decodes the file from its beginning."""

    def __init__(self, image: Image.Image, name: str, ticks: Sequence[int]) -> None:
        """ticks: of each frame. name: of the file, for errors."""
        self._image, self._name, self._ends = image, name, np.cumsum(ticks)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, tick: int) -> Image.Image:
        """In RGB. Raises UserError as to_rgb."""
        self._image.seek(int(np.searchsorted(self._ends, tick, side="right")))
        frame = self._image.copy()
        frame.info = dict(self._image.info)
        return to_rgb(frame, self._name)


def gif_frames(image: Image.Image, name: str, fps: float | None = None) -> tuple[Sequence[Image.Image], float | None]:
    """(frames, frames a second), as video_patches takes them.

    image: opened from a file. fps: of the frames, whatever the file says. None: the file's own times, in ticks of the
    longest time that all of them are multiples of; a frame without a time is not shown, and where none has one the rate
    is None. Raises UserError for a file that ends before its frames do.
    """
    count = getattr(image, "n_frames", 1)
    if fps is not None:
        return HeldFrames(image, name, [1] * count), fps
    ticks, fps = gif_ticks(image, name)
    return HeldFrames(image, name, ticks), fps


def gif_ticks(image: Image.Image, name: str) -> tuple[list[int], float | None]:
    """(ticks of each frame, ticks a second), without decoding one, as gif_frames has them."""
    count = getattr(image, "n_frames", 1)
    times = frame_times(Path(image.filename).read_bytes())
    if count != len(times):
        raise UserError(f"{name} cannot be read (it has {len(times)} of its {count} frames): copy it again.")
    if not any(times):
        return [1] * count, None
    tick = math.gcd(*times)
    return [time // tick for time in times], 1000 / tick
