"""One generated picture: a pure function of its kind, seed and index (and of the allowed sizes)."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from qwen3f.data.sources.images import shapes, text
from qwen3f.data.sources.images.canvas import Sketch
from qwen3f.data.sources.images.charts import CHARTS
from qwen3f.data.sources.random_choices import Draws
from qwen3f.errors import UserError

_MAKERS: dict[str, Callable[[Draws, int, int], Sketch]] = {"shapes": shapes.make, **CHARTS, "text": text.make}

KINDS = tuple(_MAKERS)
"""All kinds of pictures."""

SMALLEST_SIDE = 64
"""Pixels; on less, labels and words would not fit."""


@dataclass(frozen=True, eq=False)  # by identity: images are compared by their pixels
class Picture:
    """An image with what can be said and asked about it.

    Attributes:
        image: RGB, each side between the two sizes asked for.
        caption: one sentence that describes it.
        question: a question that the image answers.
        answer: a word, an integer or the text shown.
        kind: one of KINDS.
        index: its place in the sequence of its kind and seed.
        parameters: all that was drawn, with the size, as JSON. Pictures with equal parameters have equal pixels.
    """

    image: Image.Image
    caption: str
    question: str
    answer: str
    kind: str
    index: int
    parameters: str


def check_sides(min_side: int, max_side: int, section: str = "") -> None:
    """Raises UserError for sides that no picture can have. section: prefix of their flags, for the message."""
    if not SMALLEST_SIDE <= min_side <= max_side:
        raise UserError(
            f"Pictures of {min_side} to {max_side} pixels a side cannot be drawn: give {section}min_side of at least "
            f"{SMALLEST_SIDE}, and {section}max_side of at least that."
        )


def picture(kind: str, seed: int, index: int, min_side: int = 64, max_side: int = 256) -> Picture:
    """The picture number `index` of a kind and a seed; the same in every process.

    Args:
        kind: one of KINDS.
        seed: other seeds give other pictures.
        index: place in the sequence.
        min_side: least width and height in pixels, at least SMALLEST_SIDE.
        max_side: greatest width and height in pixels.

    Raises:
        UserError: unknown kind, or sides out of range.
    """
    if kind not in _MAKERS:
        raise UserError(f"Unknown kind of picture {kind!r}; there are {', '.join(KINDS)}: write one of these.")
    check_sides(min_side, max_side)
    draws = Draws("image", kind, seed, index)
    width, height = draws.between(min_side, max_side), draws.between(min_side, max_side)
    sketch = _MAKERS[kind](draws, width, height)
    parameters = json.dumps({"kind": kind, **sketch.parameters}, sort_keys=True)
    return Picture(sketch.image, sketch.caption, sketch.question, sketch.answer, kind, index, parameters)
