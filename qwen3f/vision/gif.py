"""A GIF as a video of one rate: each of its frames says how long it is shown, and a long one counts as several.

Frames are decoded when they are asked for, so of a long GIF only those that are looked at (vision.video.sample_frames).
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

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

    fps: of the frames, whatever the file says. None: the file's own times, in ticks of the longest time that all of
    them are multiples of; a frame without a time is not shown, and where none has one the rate is None.
    """
    count = getattr(image, "n_frames", 1)
    if fps is not None:
        return HeldFrames(image, name, [1] * count), fps
    times = []  # in milliseconds
    for number in range(count):
        image.seek(number)
        times.append(round(image.info.get("duration", 0)))
    if not any(times):
        return HeldFrames(image, name, [1] * count), None
    tick = math.gcd(*times)
    return HeldFrames(image, name, [time // tick for time in times]), 1000 / tick
