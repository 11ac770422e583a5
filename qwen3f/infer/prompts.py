"""Prompts of a chat with images and a video in the first user's turn: from files to token ids and pixels."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import segments
from qwen3f.data.multimodal.samples import PICTURE, count_pictures, expanded, image_segments, video_segments
from qwen3f.data.sources.image_file import FRAME_SUFFIXES, FramesAsked, frame_files, opened, read_image
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import read_bounded, user_path
from qwen3f.infer.pictures import Pictures
from qwen3f.vision.gif import gif_frames
from qwen3f.vision.preprocess import Grid, image_patches, merged_tokens
from qwen3f.vision.video import LEAST_RATE, MOST_RATE, is_rate, video_limits, video_patches


class Shown(NamedTuple):
    """An image or a video: its patches and grid, and the segments with placeholders that stand for it in the text."""

    patches: np.ndarray
    grid: Grid
    text: list[Segment]


def read_images(paths: str, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> list[Shown]:
    """Read images. paths: separated by commas. min_pixels, max_pixels: already checked by run.check_shown.

    Raises UserError for a file that cannot be read or used."""
    found = []
    for path in filter(None, map(str.strip, paths.split(","))):
        image = read_image(user_path(path, "config.images"))
        try:
            patches, grid = image_patches(image, cfg, min_pixels, max_pixels)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        found.append(Shown(patches, grid, image_segments(merged_tokens(grid, cfg))))
    if paths and not found:
        raise UserError(f"config.images={paths!r} names no file; write --config.images=a.png,b.jpg")
    return found


def read_video(place: str, fps: float | None, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> Shown:
    """Read a video: a directory of frames taken at `fps`, or a GIF. fps=None takes the GIF's own times.

    min_pixels, max_pixels: limits of an image; vision.video.video_limits derives those of a video, as in training.
    Raises UserError if there are no frames, if fps is missing or no rate, or if a sampled frame cannot be read.
    """
    if fps is not None and not is_rate(fps):
        raise UserError(f"config.video_fps={fps}: write frames a second, {LEAST_RATE:g} to {MOST_RATE:g}")
    path, limits = user_path(place, "config.video"), video_limits(min_pixels, max_pixels)

    def show(frames: Sequence[Image.Image], fps: float | None) -> Shown:
        return _shown_video(frames, fps, place, cfg, limits)

    if not path.is_dir():
        return opened(path, lambda image, name: show(*gif_frames(image, name, fps)), f"the video {path}")
    files = frame_files(path)
    return show(FramesAsked(len(files), lambda number: read_image(files[number])), fps)


def _shown_video(
    frames: Sequence[Image.Image], fps: float | None, place: str, cfg: ModelConfig, limits: tuple[int, int]
) -> Shown:
    if not frames:
        raise UserError(f"the video {place} holds no frame: files ending in {', '.join(FRAME_SUFFIXES)} are read")
    if fps is None:
        raise UserError(f"the video {place} has no frame rate: write --config.video_fps=FRAMES_PER_SECOND")
    patches, grid, times = video_patches(frames, fps, cfg, min_pixels=limits[0], max_pixels=limits[1])
    return Shown(patches, grid, video_segments(times, merged_tokens(grid, cfg) // grid[0]))


def encode_shown(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    shown: Sequence[Sequence[Segment]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool | None,
) -> list[int]:
    """Token ids of the chat with all images and videos at the beginning of the first user's turn.

    shown: the segments that stand for each image or video. tools: as for template.render. A special token written in a
    user's text is encoded as plain words.
    """
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    if count_pictures([*messages, *tools]):
        raise UserError("the prompt or its tools hold U+FFFC, which stands for an image here; remove it")
    turns = [dict(message) for message in messages]
    turns[first]["content"] = PICTURE * len(shown) + turns[first]["content"]
    kind = kind_of(tokenizer)
    parts = segments(turns, tools, add_generation_prompt=True, enable_thinking=thinking, kind=kind)
    texts = iter(shown)
    return tokenizer.encode_segments([piece for part in parts for piece in expanded(part, texts)])


def read_tools(path: str) -> tuple[Mapping[str, Any], ...]:
    """The list in a JSON file, TextOptions.tools; "" is no file. Raises UserError for a file without a list."""
    if not path:
        return ()
    try:
        content = read_bounded(user_path(path, "config.tools"))
    except OSError as error:
        raise UserError(f"config.tools={path}: {error.strerror}; name a .json file with a list of functions") from error
    except UserError as error:
        raise UserError(f"config.tools: {error}") from error
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"config.tools={path} is not JSON ({error}); write a list of functions") from error
    if not isinstance(found, list):
        raise UserError(f"config.tools={path} holds a JSON {type(found).__name__}; write a list of functions")
    return tuple(found)


def pictures_of(shown: Sequence[Shown]) -> Pictures | None:
    return Pictures.of([(one.patches, one.grid) for one in shown]) if shown else None
