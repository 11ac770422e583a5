"""Coloured shapes that never touch: count them, or find one by its place or its colour.

The question is chosen first and the picture is made for it, so that the counts 1 to 5 are equally frequent.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from PIL import ImageDraw

from qwen3f.data.sources.images.canvas import BACKGROUNDS, COLOURS, Sketch, blank, plural
from qwen3f.data.sources.random_choices import Draws

SHAPES = ("circle", "square", "triangle", "diamond", "ring")

MOST = 5
"""The largest count that a question asks for; other shapes may be in the picture too."""

_CELL = 20  # least side of a shape's cell in pixels
_CLEAR = 8  # pixels by which the shape furthest to the left, or highest, is ahead of the next


class Item(NamedTuple):
    """A shape of a colour whose centre is at x, y; it reaches `radius` pixels from there."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int


def make(draws: Draws, width: int, height: int) -> Sketch:
    """One to seven shapes, each inside its own cell of a grid with at least one pixel of background around it."""
    grid = min(3, width // _CELL), min(3, height // _CELL)
    background = draws.choice(tuple(BACKGROUNDS))
    colours = draws.sample(tuple(COLOURS), 3)  # few colours, so that counting takes more than a look
    question, answer, items = draws.choice(_FORMS)(draws, colours, grid, (width, height))

    image, draw = blank(width, height, background)
    for item in items:
        _draw(draw, item, BACKGROUNDS[background])
    parameters = {"size": (width, height), "background": background, "items": sorted(items)}
    return Sketch(image, _caption(items, background), question, answer, parameters)


def _caption(items: list[Item], background: str) -> str:
    """Counts in all, by colour, by shape, and by colour and shape: "3 shapes: 2 red and 1 blue, 3 rings, …"."""
    colours = _listed([item.colour for item in items], "{} {}".format)
    shapes = _listed([item.shape for item in items], plural)
    both = _listed([f"{item.colour} {item.shape}" for item in items], plural)
    return f"{plural(len(items), 'shape')}: {colours}, {shapes}, {both} on a {background} background."


def _listed(names: list[str], counted: Callable[[int, str], str]) -> str:
    """ "2 red and 1 blue"."""
    parts = [counted(n, name) for name, n in sorted(Counter(names).items())]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _draw(draw: ImageDraw.ImageDraw, item: Item, behind: tuple[int, int, int]) -> None:
    shape, colour, x, y, radius = *item[:1], COLOURS[item.colour], *item[2:]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "square":
        side = math.ceil(radius * 0.85)  # so that its area is near the circle's
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x - radius, y), (x, y + radius), (x + radius, y)], fill=colour)
    else:
        draw.ellipse(box, fill=colour)
    if shape == "ring":
        hole = radius // 2
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=behind)


Grid = tuple[int, int]  # columns and rows of cells
Asked = tuple[str, str, list[Item]]  # question, answer, what is drawn


def _placed(draws: Draws, looks: list[tuple[str, str]], grid: Grid, size: tuple[int, int]) -> list[Item]:
    """Shapes of these kinds and colours in cells that differ, each nearly as large as its cell allows."""
    (columns, rows), (wide, high) = grid, (size[0] // grid[0], size[1] // grid[1])
    cells = draws.sample([(c, r) for c in range(columns) for r in range(rows)], len(looks))
    items = []
    for (shape, colour), (column, row) in zip(looks, cells, strict=True):
        largest = min(wide, high) // 2 - 2
        radius = draws.between(max(min(6, largest), 5 * largest // 6), largest)
        # The centre keeps radius + 1 pixels away from the cell's edges.
        x = column * wide + draws.between(radius + 1, wide - radius - 2)
        y = row * high + draws.between(radius + 1, high - radius - 2)
        items.append(Item(shape, colour, x, y, radius))
    return items


def _looks(draws: Draws, count: int, shapes: tuple[str, ...], colours: list[str]) -> list[tuple[str, str]]:
    return [(draws.choice(shapes), draws.choice(colours)) for _ in range(count)]


def _counts(draws: Draws, grid: Grid) -> tuple[int, int]:
    """(number of shapes that the question counts, number of other shapes)."""
    room = grid[0] * grid[1]
    count = draws.between(1, min(MOST, room))
    return count, draws.between(0, min(2, room - count))


def _count_all(draws: Draws, colours: list[str], grid: Grid, size: tuple[int, int]) -> Asked:
    count, _ = _counts(draws, grid)
    return "How many shapes are there?", str(count), _placed(draws, _looks(draws, count, SHAPES, colours), grid, size)


def _count_colour(draws: Draws, colours: list[str], grid: Grid, size: tuple[int, int]) -> Asked:
    count, more = _counts(draws, grid)
    looks = _looks(draws, count, SHAPES, colours[:1]) + _looks(draws, more, SHAPES, colours[1:])
    return f"How many {colours[0]} shapes are there?", str(count), _placed(draws, looks, grid, size)


def _count_shape(draws: Draws, colours: list[str], grid: Grid, size: tuple[int, int]) -> Asked:
    count, more = _counts(draws, grid)
    shape, *others = draws.shuffled(SHAPES)
    looks = _looks(draws, count, (shape,), colours) + _looks(draws, more, tuple(others), colours)
    return f"How many {shape}s are there?", str(count), _placed(draws, looks, grid, size)


def _extreme(draws: Draws, colours: list[str], grid: Grid, size: tuple[int, int]) -> Asked:
    """The shape furthest to the left or highest, by the centre of its box (a triangle's area has another centre).
    Places are drawn again until that shape is clear."""
    axis, where = draws.choice((("x", "furthest to the left"), ("y", "highest")))
    looks = _looks(draws, draws.between(2, min(4, grid[0] * grid[1])), SHAPES, colours)
    while True:
        items = _placed(draws, looks, grid, size)
        first, second, *_ = sorted(items, key=lambda item: getattr(item, axis))
        if getattr(second, axis) - getattr(first, axis) >= _CLEAR:
            return f"Which colour has the shape whose centre is {where}?", first.colour, items


def _named(draws: Draws, colours: list[str], grid: Grid, size: tuple[int, int]) -> Asked:
    """The only one of a colour."""
    shape = draws.choice(SHAPES)
    more = draws.between(0, min(4, grid[0] * grid[1]) - 1)
    looks = [(shape, colours[0]), *_looks(draws, more, SHAPES, colours[1:])]
    return f"Which shape is the {colours[0]} one?", shape, _placed(draws, looks, grid, size)


_FORMS: tuple[Callable[[Draws, list[str], Grid, tuple[int, int]], Asked], ...] = (
    _count_all,  # easier questions are rarer
    *(_count_colour, _extreme, _named) * 2,
    *(_count_shape,) * 4,
)
