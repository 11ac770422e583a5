"""Reads generated pictures from their pixels alone."""

from typing import NamedTuple

import numpy as np
from PIL import Image


class Blob(NamedTuple):
    """A connected region (by edges and corners) of one colour: its pixels, its box (right and bottom included), and
    how many of the pixels lie in the box's first and last row."""

    area: int
    left: int
    top: int
    right: int
    bottom: int
    first: int
    last: int

    @property
    def filled(self) -> float:
        """Share of the box that is of the colour."""
        return self.area / ((self.right - self.left + 1) * (self.bottom - self.top + 1))


def blobs(image: Image.Image, colour: tuple[int, int, int]) -> list[Blob]:
    """The connected regions of exactly `colour`, from left to right."""
    left = {(int(x), int(y)) for y, x in np.argwhere((np.asarray(image) == colour).all(-1))}
    found = []
    while left:
        region, front = [], [left.pop()]
        while front:
            x, y = front.pop()
            region.append((x, y))
            near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & left
            left -= near
            front += near
        xs, ys = zip(*region)
        edges = ys.count(min(ys)), ys.count(max(ys))
        found.append(Blob(len(region), min(xs), min(ys), max(xs), max(ys), *edges))
    return sorted(found, key=lambda blob: (blob.left, blob.top))


def opacity(image: Image.Image, colour: tuple[int, int, int], background: tuple[int, int, int]) -> np.ndarray:
    """How much of `colour` lies over `background` at each pixel [height, width], 0 to 1, by the strongest channel."""
    span = np.array(colour, float) - background
    channel = int(np.abs(span).argmax())
    return (np.asarray(image, float)[..., channel] - background[channel]) / span[channel]
