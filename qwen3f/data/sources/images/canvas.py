"""What the kinds of pictures share: colours, a blank canvas, text in pillow's own font, and what a kind returns.

Nothing is smoothed but text: each shape has exactly its colour of COLOURS, so that a picture can be checked by pixels.
"""

import functools
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "orange": (250, 150, 30),
    "purple": (140, 60, 170),
    "cyan": (30, 190, 200),
    "brown": (130, 80, 40),
    "pink": (250, 130, 190),
}
"""Colours of what is drawn, by the name that questions and answers use (RGB)."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light yellow": (255, 250, 215),
    "light grey": (232, 232, 232),
}
INK = (0, 0, 0)
"""Axes and labels."""


class Sketch(NamedTuple):
    """A picture of one kind.

    Attributes:
        image: RGB.
        caption: one sentence that describes it.
        question: about the image.
        answer: a word, an integer or a short text.
        parameters: everything that was drawn, enough to tell any two images apart and to work the answer out.
    """

    image: Image.Image
    caption: str
    question: str
    answer: str
    parameters: dict[str, object]


def blank(width: int, height: int, background: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An RGB image of one colour of BACKGROUNDS and its drawing handle."""
    image = Image.new("RGB", (width, height), BACKGROUNDS[background])
    return image, ImageDraw.Draw(image)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that pillow brings along, `size` pixels high. Its edges are smoothed, by FreeType's version."""
    return ImageFont.load_default(size)


def plural(count: int, word: str) -> str:
    """ "1 circle", "2 circles"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
