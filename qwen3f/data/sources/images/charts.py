"""Bar, line and pie charts with labels, and questions that are answered by reading them."""

import itertools
from collections.abc import Callable

from qwen3f.data.sources.images.canvas import BACKGROUNDS, COLOURS, INK, Sketch, blank, font
from qwen3f.data.sources.random_choices import Draws

LABELS = "ABCDEFGH"

_BAR_VALUES = 20
_PIE_PARTS = 20  # equal parts of a pie; a share is a number of them
_PART_DEGREES = 360 // _PIE_PARTS


def _text_size(width: int, height: int) -> int:
    return min(16, max(9, min(width, height) // 10))


def bar(draws: Draws, width: int, height: int) -> Sketch:
    """Bars of different values, with the value above each and a label below."""
    # Four bars at least, so that no label is the answer too often.
    count = draws.between(4, max(4, min(len(LABELS), width // 18)))
    # Numbers of two digits do not touch, and a level is at least 2 pixels high.
    size = min(16, max(9, min(height // 5, width // count * 3 // 4)))
    levels = min(_BAR_VALUES, (height - 2 * size - 8) // 2)
    values = draws.sample(range(1, levels + 1), count)
    colour = draws.choice(tuple(COLOURS))
    background = draws.choice(tuple(BACKGROUNDS))
    image, draw = blank(width, height, background)
    floor, slot = height - size - 4, width // count
    unit = (floor - size - 4) / max(values)
    for i, value in enumerate(values):
        left = i * slot + slot // 5
        top = floor - max(1, round(value * unit))
        draw.rectangle((left, top, left + slot * 3 // 5, floor - 1), fill=COLOURS[colour])
        middle = left + slot * 3 // 10
        draw.text((middle, top - 2), str(value), fill=INK, font=font(size), anchor="ms")
        draw.text((middle, height - 2), LABELS[i], fill=INK, font=font(size), anchor="ms")
    draw.line((0, floor, width, floor), fill=INK)

    names = LABELS[:count]
    read = draws.below(count)
    if draws.chance(1, 2):
        question, answer = f"What is the value of bar {names[read]}?", str(values[read])
    else:
        most, kind = draws.choice(((max, "tallest"), (min, "shortest")))
        question, answer = f"Which bar is the {kind}?", names[values.index(most(values))]
    facts = ", ".join(f"{name} is {value}" for name, value in zip(names, values, strict=True))
    parameters = {"size": (width, height), "background": background, "colour": colour, "values": values}
    return Sketch(image, f"A bar chart in {colour}: {facts}.", question, answer, parameters)


def line(draws: Draws, width: int, height: int) -> Sketch:
    """A line through points of different heights, a square marker at each and a label below."""
    size = _text_size(width, height)
    count = draws.between(3, max(3, min(len(LABELS), width // (2 * size))))
    # A level is at least 3 pixels high (2 when rounded), and no two points have the same.
    floor = height - size - 4
    levels = min(_BAR_VALUES, (floor - 6) // 3)
    values = draws.sample(range(1, levels + 1), count)
    colour, marker = draws.sample(tuple(COLOURS), 2)
    background = draws.choice(tuple(BACKGROUNDS))
    image, draw = blank(width, height, background)
    slot = width // count
    unit = (floor - 6) / levels
    points = [(i * slot + slot // 2, floor - 2 - round(value * unit)) for i, value in enumerate(values)]
    draw.line(points, fill=COLOURS[colour], width=1)
    for i, (x, y) in enumerate(points):
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill=COLOURS[marker])
        draw.text((x, height - 2), LABELS[i], fill=INK, font=font(size), anchor="ms")
    draw.line((0, floor, width, floor), fill=INK)

    names = LABELS[:count]
    rises = sum(b > a for a, b in itertools.pairwise(values))
    question, answer = draws.choice(
        (
            ("At which point is the line highest?", names[values.index(max(values))]),
            ("At which point is the line lowest?", names[values.index(min(values))]),
            ("How many times does the line go up from one point to the next?", str(rises)),
            ("Does the line end higher than it begins?", "yes" if values[-1] > values[0] else "no"),
        )
    )
    way = ", ".join("up" if b > a else "down" for a, b in itertools.pairwise(values))
    caption = f"A {colour} line with {marker} markers at {', '.join(names)}: it goes {way}."
    parameters = {
        "size": (width, height),
        "background": background,
        "colours": (colour, marker),
        "values": values,
    }
    return Sketch(image, caption, question, answer, parameters)


def pie(draws: Draws, width: int, height: int) -> Sketch:
    """A pie whose slices are multiples of 5 percent, each in its own colour; the largest and smallest are clear."""
    count = draws.between(2, 5)
    largest_alone = smallest_alone = False
    while not (largest_alone and smallest_alone):
        cuts = sorted(draws.sample(range(1, _PIE_PARTS), count - 1))
        parts = [b - a for a, b in itertools.pairwise([0, *cuts, _PIE_PARTS])]
        largest_alone, smallest_alone = parts.count(max(parts)) == 1, parts.count(min(parts)) == 1
    colours = draws.sample(tuple(COLOURS), count)
    background = draws.choice(tuple(BACKGROUNDS))
    starts = [draws.below(360)]
    for part in parts[:-1]:
        starts.append((starts[-1] + _PART_DEGREES * part) % 360)
    # Drawn and kept in the order of the colours: the same slices, counted from another one, are the same picture.
    slices = sorted(zip(colours, starts, parts, strict=True))
    image, draw = blank(width, height, background)
    radius, x, y = min(width, height) // 2 - 3, width // 2, height // 2
    for colour, start, part in slices:
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.pieslice(box, start, start + _PART_DEGREES * part, fill=COLOURS[colour])

    percent = [100 // _PIE_PARTS * part for part in parts]
    asked = draws.below(count)
    question, answer = draws.choice(
        (
            ("Which colour has the largest share of the pie?", colours[parts.index(max(parts))]),
            ("Which colour has the smallest share of the pie?", colours[parts.index(min(parts))]),
            ("How many slices does the pie have?", str(count)),
            (
                f"All shares are multiples of 5 percent. How many percent of the pie are {colours[asked]}?",
                str(percent[asked]),
            ),
        )
    )
    facts = ", ".join(f"{share} percent {colour}" for share, colour in zip(percent, colours, strict=True))
    parameters = {"size": (width, height), "background": background, "slices": slices}
    return Sketch(image, f"A pie chart: {facts}.", question, answer, parameters)


CHARTS: dict[str, Callable[[Draws, int, int], Sketch]] = {"bar": bar, "line": line, "pie": pie}
"""The kinds of charts."""
