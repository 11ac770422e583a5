"""A chat with pictures as ids: each picture stands in the text as one character, and becomes its run of placeholders.

In Qwen3-VL's chats a picture is written at its place in the turn as <|vision_start|>, one <|image_pad|> for each merged
token, <|vision_end|>. For a video each group of frames is written like this with <|video_pad|>, after its time in
words. These ids come only from the format's own markup: a user who types "<|image_pad|>" gets ordinary characters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.data.chat.examples import chat_runs
from qwen3f.data.chat.samples import Sample
from qwen3f.data.multimodal.videos import Video
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.vision.video import frame_text

PICTURE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Marks the place of a picture in the text of a chat with pictures. A row with pictures whose own text holds this
character is refused."""

_BEGIN, _PAD, _VIDEO, _END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"


def count_pictures(told: object) -> int:
    """How often PICTURE occurs in the texts of messages, tools or parts of them."""
    if isinstance(told, str):
        return told.count(PICTURE)
    if isinstance(told, Mapping):
        return sum(count_pictures(part) for pair in told.items() for part in pair)
    return sum(map(count_pictures, told)) if isinstance(told, list | tuple) else 0


class Picture(Protocol):
    """A picture that is read when it is needed. Both methods raise UserError with its name."""

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, cheaply."""
        ...

    def open(self) -> Image.Image: ...


@dataclass(frozen=True)
class VisualSample:
    """A chat to learn from.

    Attributes:
        chat: its messages hold PICTURE once for each picture or video, in order.
        pictures: its pictures and videos; () for a text-only chat, in which PICTURE is an ordinary character.
        group: what held-out results are listed by; "" for none.
    """

    chat: Sample
    pictures: tuple[Picture | Video, ...] = ()
    group: str = ""


def tokenise(
    sample: VisualSample, texts: Sequence[list[Segment]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint32 [n], trained bool [n]) up to the last trained token. texts: the segments for each of its pictures."""
    chat, shown = sample.chat, iter(texts)
    ids, trained = [], []
    for run, is_trained in chat_runs(chat.messages, chat.tools, chat.all_turns, chat.enable_thinking, chat.kind)[:-1]:
        parts = [part for segment in run for part in expanded(segment, shown)] if texts else list(run)
        piece = tokenizer.encode_segments(parts)
        ids += piece
        trained += [is_trained] * len(piece)
    if (left := len(list(shown))) > 0:
        raise UserError(f"{chat.name} has {left} more pictures than places for them in its text")
    return np.array(ids, np.uint32), np.array(trained)


def image_segments(count: int) -> list[Segment]:
    """The segments that stand for an image of `count` merged tokens."""
    return [Segment(_BEGIN + _PAD * count + _END, True)]


def video_segments(times: Sequence[float], count: int) -> list[Segment]:
    """The segments that stand for a video: for each group of frames its time in words, then `count` merged tokens.

    times: seconds, one for each group of frames.
    """
    group = Segment(_BEGIN + _VIDEO * count + _END, True)
    return [part for seconds in times for part in (Segment(frame_text(seconds), False), group)]


def expanded(segment: Segment, shown: Iterator[list[Segment]]) -> Iterator[Segment]:
    """The segment with each PICTURE in it replaced by the next segments from `shown`."""
    first, *rest = segment.text.split(PICTURE)
    yield Segment(first, segment.is_markup)
    for text in rest:
        yield from next(shown)
        yield Segment(text, segment.is_markup)


def check_tokenizer(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """Raises UserError unless the model's ids of the vision tokens are the tokenizer's."""
    names = {
        "vision_start_token_id": _BEGIN,
        "vision_end_token_id": _END,
        "image_token_id": _PAD,
        "video_token_id": _VIDEO,
    }
    for field, name in names.items():
        if (found := tokenizer.special_id(name)) != getattr(cfg, field):
            raise UserError(
                f"the tokenizer's {name} is {found}, but --config.model.{field}={getattr(cfg, field)}; write {found}"
            )
