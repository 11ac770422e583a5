"""Rendered text: a line of words or a number in one colour, as large as fits."""

from qwen3f.data.sources.images.canvas import BACKGROUNDS, COLOURS, Sketch, blank, font, plural
from qwen3f.data.sources.random_choices import Draws

WORDS = (
    *("apple", "river", "stone", "light", "green", "seven", "paper", "house", "cloud", "train", "music", "water"),
    *("table", "glass", "horse", "night", "dream", "sugar", "metal", "forest", "window", "garden", "bridge", "silver"),
    *("orange", "winter", "summer", "market", "letter", "number", "circle", "square", "simple", "yellow", "purple"),
    *("bread", "chair", "plant", "tiger", "ocean"),
)

_SMALLEST, _LARGEST = 9, 40  # font sizes in pixels


def make(draws: Draws, width: int, height: int) -> Sketch:
    """One to three lines, each a word or a number of 1 to 5 digits; at 64 pixels and more the smallest size fits."""
    count = draws.between(1, min(3, height // 16))
    lines = [
        str(draws.below(10 ** draws.between(1, 5))) if draws.chance(1, 3) else draws.choice(WORDS) for _ in range(count)
    ]
    colour = draws.choice(tuple(COLOURS))
    background = draws.choice(tuple(BACKGROUNDS))
    size = _size_that_fits(lines, width, height)
    image, draw = blank(width, height, background)
    step = height // count
    free = width - max(round(font(size).getlength(line)) for line in lines)
    left = draws.between(2, max(2, free - 2))
    for i, line in enumerate(lines):
        # The top of the font's box at whole pixels: the anchor "lm" would put odd heights between two.
        top = i * step + (step - sum(font(size).getmetrics())) // 2
        draw.text((left, top), line, fill=COLOURS[colour], font=font(size), anchor="la")

    text = " ".join(lines)
    digits = sum(line.isdigit() for line in lines)
    question, answer = draws.choice(
        (
            ("What does the text say?", text),
            ("What does the text say?", text),
            ("What does the last line say?", lines[-1]),
            ("Which colour is the text?", colour),
            ("How many lines are numbers?", str(digits)),
        )
    )
    caption = f'{plural(count, "line")} of {colour} text on a {background} background: "{text}".'
    parameters = {
        "size": (width, height),
        "background": background,
        "colour": colour,
        "left": left,
        "font": size,
        "lines": lines,
    }
    return Sketch(image, caption, question, answer, parameters)


def _size_that_fits(lines: list[str], width: int, height: int) -> int:
    size = _LARGEST
    while size > _SMALLEST and not _fits(lines, size, width, height):
        size -= 1
    return size


def _fits(lines: list[str], size: int, width: int, height: int) -> bool:
    widest = max(font(size).getlength(line) for line in lines)
    return widest <= width - 4 and sum(font(size).getmetrics()) <= height // len(lines) - 2
