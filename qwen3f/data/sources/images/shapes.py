"""Coloured circles, squares and triangles that never touch: count them, or find one by its size or place."""

import math
from collections import Counter

from PIL import ImageDraw

from qwen3f.data.sources.images.canvas import BACKGROUNDS, COLOURS, Sketch, blank, plural
from qwen3f.data.sources.random_choices import Draws

SHAPES = ("circle", "square", "triangle")

_CELL = 20  # least side of a shape's cell in pixels


def make(draws: Draws, width: int, height: int) -> Sketch:
    """One to nine shapes, each inside its own cell of a grid with at least one pixel of background around it."""
    columns, rows = min(3, width // _CELL), min(3, height // _CELL)
    cells = draws.sample([(c, r) for c in range(columns) for r in range(rows)], draws.between(1, columns * rows))
    background = draws.choice(tuple(BACKGROUNDS))
    colours = draws.sample(tuple(COLOURS), 3)  # few colours, so that counting takes more than a look
    items = []
    cell = min(width // columns, height // rows)
    for column, row in cells:
        radius = draws.between(4, cell // 2 - 2)
        # The centre keeps radius + 1 pixels away from the cell's edges.
        x = column * (width // columns) + draws.between(radius + 1, width // columns - radius - 2)
        y = row * (height // rows) + draws.between(radius + 1, height // rows - radius - 2)
        items.append((draws.choice(SHAPES), draws.choice(colours), x, y, radius))

    image, draw = blank(width, height, background)
    for shape, colour, x, y, radius in items:
        _draw(draw, shape, COLOURS[colour], x, y, radius)
    question, answer = _question(draws, items)
    counted = Counter((colour, shape) for shape, colour, *_ in items)
    parts = [plural(n, f"{colour} {shape}") for (colour, shape), n in sorted(counted.items())]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    caption = f"{listed} on a {background} background."
    parameters = {"size": (width, height), "background": background, "items": sorted(items)}
    return Sketch(image, caption, question, answer, parameters)


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int, radius: int) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        side = math.ceil(radius * 0.85)  # so that its area is near the circle's
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)


def _question(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    forms = [_count_all, _count_colour, _count_shape]
    if len(items) > 1:
        # Only where the extreme is clear: the next one is at least 3 pixels away.
        lefts = sorted(x for _, _, x, _, _ in items)
        tops = sorted(y for _, _, _, y, _ in items)
        if lefts[1] - lefts[0] >= 3:
            forms.append(_leftmost)
        if tops[1] - tops[0] >= 3:
            forms.append(_topmost)
    return draws.choice(forms)(draws, items)


def _count_all(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    return "How many shapes are there?", str(len(items))


def _count_colour(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    colour = draws.choice([item[1] for item in items])
    return f"How many {colour} shapes are there?", str(sum(item[1] == colour for item in items))


def _count_shape(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    shape = draws.choice(SHAPES)
    return f"How many {shape}s are there?", str(sum(item[0] == shape for item in items))


def _leftmost(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    shape, colour, *_ = min(items, key=lambda item: item[2])
    if draws.chance(1, 2):
        return "Which colour has the shape whose centre is furthest to the left?", colour
    return "Which shape has its centre furthest to the left?", shape


def _topmost(draws: Draws, items: list[tuple[str, str, int, int, int]]) -> tuple[str, str]:
    shape, colour, *_ = min(items, key=lambda item: item[3])
    if draws.chance(1, 2):
        return "Which colour has the shape whose centre is highest?", colour
    return "Which shape has its centre highest?", shape
