"""Videos of a chat, read when they are needed: an animation's file, or files of frames and the rate they were taken at.

Frames are sampled as in Qwen3-VL (vision.video.sample_frames); the other frames are not used. Sizes and times are read
from headers; pixels are read when a row is built.

A part of a message, as qwen-vl-utils has it:
    {"type": "video", "video": "a.gif"}                    GIF, APNG or WebP, which says how long its frames are shown
    {"type": "video", "video": "frames", "fps": 2.0}       a directory's images in the order of their names
    {"type": "video", "video": ["1.jpg", "2.jpg"], "fps": 2.0}
fps is the rate at which the frames were taken. A file that says it itself must have none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.data.sources.adapters.multimodal import ImageFile, image_inside, path_inside
from qwen3f.data.sources.adapters.rows import RowFault
from qwen3f.data.sources.image_file import FRAME_SUFFIXES, FramesAsked, frame_files, opened, upright_size
from qwen3f.errors import UserError
from qwen3f.vision.gif import gif_frames, gif_ticks
from qwen3f.vision.preprocess import Grid
from qwen3f.vision.video import LEAST_RATE, MOST_RATE, is_rate, sample_frames, video_grid, video_limits, video_patches

Result = TypeVar("Result")
Frames = Sequence[Image.Image]

_SHOWN = 80  # characters of a part that an error shows


class Header(NamedTuple):
    """frames: number of frames. fps: frames a second. height, width: of the first frame, in pixels."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class VideoFile:
    """A video in one file. fps: None if the file says it. row: "file:row" that names the video, for errors."""

    path: Path
    fps: float | None
    row: str

    def __str__(self) -> str:
        return f"the video {self.path}"

    def header(self) -> Header:
        """Its sizes, without pixels; a frame that is shown longer counts as several.

        Raises UserError, naming row and file, if it cannot be read, or if its rate is missing or given twice.
        """

        def read(image: Image.Image, name: str) -> Header:
            ticks, fps = gif_ticks(image, name)
            if fps is None and self.fps is None:
                raise UserError(f'{name} does not say how fast it is: write "fps": FRAMES_A_SECOND in its part')
            if fps is not None and self.fps is not None:
                raise UserError(f'{name} says itself how fast it is: leave "fps" out of its part')
            return Header(sum(ticks), fps or self.fps, *upright_size(image, name))

        return self._opened(read)

    def read(self, use: Callable[[Frames, float], Result]) -> Result:
        """use(its frames, frames a second), while the file is open. Raises UserError as header."""
        return self._opened(lambda image, name: use(*gif_frames(image, name, self.fps)))

    def _opened(self, use: Callable[[Image.Image, str], Result]) -> Result:
        try:
            return opened(self.path, use, f"the video {self.path}")
        except UserError as error:
            raise UserError(f"{self.row}: {error}") from error


@dataclass(frozen=True)
class VideoFrames:
    """A video of `count` files, one for each frame. looked_at: paths of the sampled frames. row: as in VideoFile."""

    looked_at: tuple[str, ...]
    count: int
    fps: float
    row: str

    def __str__(self) -> str:
        return f"the video of {self.path}"

    @property
    def path(self) -> Path:
        """The path of its first sampled frame."""
        return Path(self.looked_at[0])

    def header(self) -> Header:
        """Its sizes, without pixels. Raises UserError, naming row and file, for a frame that cannot be read."""
        first, *_ = [ImageFile(Path(path), self.row).size() for path in self.looked_at]
        return Header(self.count, self.fps, *first)

    def read(self, use: Callable[[Frames, float], Result]) -> Result:
        """As VideoFile.read; a frame is opened when `use` reads it."""
        paths = dict(zip(sample_frames(self.count, self.fps), self.looked_at))
        return use(FramesAsked(self.count, lambda number: ImageFile(Path(paths[number]), self.row).open()), self.fps)


Video = VideoFile | VideoFrames


def planned(video: Video, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> tuple[Grid, list[float]]:
    """(grid, seconds of each group of frames), from headers. The limits are those of an image; see
    vision.video.video_limits."""
    low, high = video_limits(min_pixels, max_pixels)
    return video_grid(*video.header(), cfg, min_pixels=low, max_pixels=high)


def patches_of(video: Video, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, Grid]:
    """(patches, grid) of a video, as video_patches gives them within the limits of `planned`."""
    low, high = video_limits(min_pixels, max_pixels)
    return video.read(lambda frames, fps: video_patches(frames, fps, cfg, min_pixels=low, max_pixels=high)[:2])


def decode(video: Video) -> None:
    """Raises UserError unless its header and every frame to look at can be read."""

    def look(frames: Frames, fps: float) -> None:
        for number in sample_frames(len(frames), fps):
            frames[number]

    video.header()
    video.read(look)


def video_of(part: Mapping[str, Any], root: Path, where: str) -> Video:
    """The video of a message's part, of files below `root`. where: the row. Raises RowFault for a bad part."""
    others = sorted(map(str, set(part) - {"type", "video", "fps"}))
    if others:
        raise RowFault(
            "invalid_rows",
            f'{where} has {others[0]!r} in the part of a video: "video" and "fps", the rate its frames were taken at, '
            "are read; leave it out.",
        )
    place, fps = part.get("video"), part.get("fps")
    if fps is not None and not (type(fps) in (int, float) and is_rate(fps)):
        raise RowFault(
            "invalid_rows", f"{where} has fps={fps!r}: write frames a second, {LEAST_RATE:g} to {MOST_RATE:g}."
        )
    if isinstance(place, list) and place and all(isinstance(name, str) for name in place):
        names, said = place, f"{len(place)} files"
    elif isinstance(place, str):
        path = path_inside(root, place, where, "video")
        if path.is_file():
            return VideoFile(path, fps, where)
        if not path.is_dir():
            raise RowFault(
                "bad_images", f"{where} names the video {place!r}, which is neither a file nor a directory of frames."
            )
        try:
            names, said = [str(PurePosixPath(place, file.name)) for file in frame_files(path)], repr(place)
        except UserError as error:
            raise RowFault("bad_images", f"{where}: {error}") from error
    else:
        raise RowFault(
            "invalid_rows",
            f'{where} has the video {repr(place)[:_SHOWN]}: write "video": PATH, of a file or of a '
            "directory of frames, or a list of files.",
        )
    if not names:
        kinds = ", ".join(FRAME_SUFFIXES)
        raise RowFault("invalid_rows", f"{where} names the video {said}, which holds no frame: {kinds} are read.")
    if fps is None:
        raise RowFault(
            "invalid_rows",
            f'{where} has a video of {said} without a rate: write "fps": FRAMES_A_SECOND, at which they were taken.',
        )
    looked_at = [image_inside(root, names[number], where).path for number in sample_frames(len(names), fps)]
    return VideoFrames(tuple(map(str, looked_at)), len(names), fps, where)
