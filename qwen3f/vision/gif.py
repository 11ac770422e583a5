"""A GIF, APNG or animated WebP as a video with a constant frame rate: a frame that is shown longer is repeated.

Frames are decoded on access. So of a long GIF only the sampled frames (vision.video.sample_frames) are decoded, and the
frames that they are built on in the file.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from qwen3f.errors import UserError
from qwen3f.vision.frame_times import frame_times
from qwen3f.vision.rgb import to_rgb

ANIMATED = ("GIF", "PNG", "WEBP")  # formats whose frames follow each other in time; a JPEG's are other views


class HeldFrames(Sequence[Image.Image]):
    """The frame that is shown at each tick. Access ticks in order: going back decodes the file from its beginning."""

    def __init__(self, image: Image.Image, name: str, ticks: Sequence[int]) -> None:
        """ticks: number of ticks of each frame. name: of the file, for errors."""
        self._image, self._name, self._ends = image, name, np.cumsum(ticks)
        self._undone = False

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, tick: int) -> Image.Image:
        """The frame at a tick, in RGB. Raises UserError as to_rgb."""
        number = int(np.searchsorted(self._ends, tick, side="right"))
        if self._image.format == "PNG" and (self._undone or number < self._image.tell()):
            self._image.close()
            self._image = Image.open(self._image.filename, formats=("PNG",))
        self._image.seek(number)
        frame = self._image.copy()
        frame.info = dict(self._image.info)
        # pillow undoes such a frame of a PNG from a buffer that loading the frame has overwritten, and it cannot go
        # back in a PNG of which a frame was loaded: in both cases the file is opened anew
        self._undone = frame.info.get("disposal") == PngImagePlugin.Disposal.OP_PREVIOUS
        return to_rgb(frame, self._name)


def gif_frames(image: Image.Image, name: str, fps: float | None = None) -> tuple[Sequence[Image.Image], float | None]:
    """(frames, frames per second), as video_patches takes them.

    image: opened from a file. fps: each frame is shown once, at this rate. None: use the file's own times. A tick is
    then the greatest common divisor of these times; a frame without a time is left out; if no frame has a time, the
    returned rate is None. Raises UserError for a file that ends before its last frame.
    """
    if fps is not None:
        return HeldFrames(image, name, [1] * _frames(image)), fps
    ticks, fps = gif_ticks(image, name)
    return HeldFrames(image, name, ticks), fps


def gif_ticks(image: Image.Image, name: str) -> tuple[list[int], float | None]:
    """(number of ticks of each frame, ticks per second or None), as in gif_frames, without decoding a frame."""
    count = _frames(image)
    times = frame_times(Path(image.filename).read_bytes())
    if count != len(times):
        raise UserError(f"{name} cannot be read (it has {len(times)} of its {count} frames): copy it again.")
    if not any(times):
        return [1] * count, None
    tick = math.gcd(*times)
    return [time // tick for time in times], 1000 / tick


def _frames(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
