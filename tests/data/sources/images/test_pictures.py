"""Generated pictures: every answer is checked by the pixels, and a picture depends on its arguments alone."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from qwen3f.data.sources.images import KINDS, picture
from qwen3f.data.sources.images.canvas import BACKGROUNDS, COLOURS
from qwen3f.data.sources.images.shapes import SHAPES
from qwen3f.data.sources.images.text import WORDS
from qwen3f.errors import UserError
from tests.data.sources.images.pixels import blobs, opacity


def _pictures(kind, count, seed=3):
    return [picture(kind, seed, index, max_side=128) for index in range(count)]


def _of_colours(item):
    return {name: found for name, colour in COLOURS.items() if (found := blobs(item.image, colour))}


def _shape(blob):
    # A square fills its box, a disc π/4 of it. A diamond ends in points, a triangle in its widest row, else: a ring.
    if blob.filled > 0.68:
        return "square" if blob.filled == 1 else "circle"
    if blob.first == blob.last == 1:
        return "diamond"
    return "triangle" if blob.last == blob.right - blob.left + 1 else "ring"


def test_shapes_are_counted_and_found_by_pixels():
    asked = Counter()
    for item in _pictures("shapes", 80):
        found = [(name, blob) for name, regions in _of_colours(item).items() for blob in regions]
        shapes = Counter((colour, _shape(blob)) for colour, blob in found)
        caption = re.findall(r"(\d) (\w+) (circle|square|triangle|diamond|ring)s?\b", item.caption)
        assert shapes == {(colour, shape): int(n) for n, colour, shape in caption}
        total, sums = re.match(r"(\d) shapes?: (.*)", item.caption).groups()
        assert int(total) == len(found)
        colours, kinds = Counter(colour for colour, _ in found), Counter(_shape(blob) for _, blob in found)
        for names, counts in ((COLOURS, colours), (SHAPES, kinds)):
            said = re.findall(rf"(\d) ({'|'.join(names)})s?(?:,| and|$)", sums)
            assert counts == {name: int(n) for n, name in said}
        # Shapes touch neither each other nor the border: there are as many regions that are not background.
        rest = (np.asarray(item.image) != BACKGROUNDS[json.loads(item.parameters)["background"]]).any(-1)
        assert len(blobs(Image.fromarray(np.uint8(rest)).convert("RGB"), (1, 1, 1))) == len(found)
        assert not rest[[0, -1]].any()
        assert not rest[:, [0, -1]].any()
        question = item.question
        if question == "How many shapes are there?":
            expected = len(found)
        elif match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
            expected = sum(colour == match[1] for colour, _ in found)
        elif match := re.fullmatch(r"How many (\w+)s are there\?", question):
            expected = sum(shape == match[1] for _, shape in shapes.elements())
        elif match := re.fullmatch(r"Which shape is the (\w+) one\?", question):
            (expected,) = (_shape(blob) for colour, blob in found if colour == match[1])
        else:
            side = "left" in question
            colour, _ = min(found, key=lambda f: f[1].left + f[1].right if side else f[1].top + f[1].bottom)
            expected = colour
        assert item.answer == str(expected), item
        asked[re.sub(r"(many|is the) (?!shape)\w+", r"\1 some", question)] += 1
    # The forms of question: how many shapes, how many of a colour, how many of a kind; the colour of the leftmost and
    # of the topmost shape; the shape of a colour.
    assert len(asked) == 6, asked


def test_bars_have_the_heights_of_their_values():
    for item in _pictures("bar", 40):
        ((_, bars),) = _of_colours(item).items()
        values = [int(v) for v in re.findall(r"[A-H] is (\d+)", item.caption)]
        assert len(bars) == len(values) >= 4
        assert all(bar.filled == 1 for bar in bars)
        assert len({bar.bottom for bar in bars}) == 1
        heights = [bar.bottom - bar.top + 1 for bar in bars]
        assert np.argsort(heights).tolist() == np.argsort(values).tolist()
        # One unit is at least 1.9 pixels high, so heights relative to the tallest bar round to the values.
        assert [round(h / max(heights) * max(values)) for h in heights] == values
        at = ["ABCDEFGH".index(name) for name in re.findall(r"\b([A-H])\b", item.question)]
        if match := re.fullmatch(r"Which bar is the (tallest|shortest)\?", item.question):
            extreme = max(heights) if match[1] == "tallest" else min(heights)
            expected = "ABCDEFGH"[heights.index(extreme)]
        else:
            assert re.fullmatch(r"What is the value of bar [A-H]\?", item.question)
            expected = values[at[0]]
        assert item.answer == str(expected), item


def test_lines_go_as_told():
    for item in _pictures("line", 60):
        line, marker = re.match(r"A (\w+) line with (\w+) markers", item.caption).groups()
        assert set(_of_colours(item)) == {line, marker}
        points = blobs(item.image, COLOURS[marker])
        assert all((p.area, p.filled) == (25, 1) for p in points)
        heights = [-p.top for p in points]
        assert len(set(heights)) == len(heights) >= 3
        ups = [b > a for a, b in itertools.pairwise(heights)]
        assert re.findall(r"\b(up|down)\b", item.caption) == ["up" if up else "down" for up in ups]
        expected = {
            "At which point is the line highest?": "ABCDEFGH"[heights.index(max(heights))],
            "At which point is the line lowest?": "ABCDEFGH"[heights.index(min(heights))],
            "How many times does the line go up from one point to the next?": str(sum(ups)),
            "Does the line end higher than it begins?": "yes" if heights[-1] > heights[0] else "no",
        }
        assert item.answer == expected[item.question], item


def test_pies_have_the_areas_of_their_shares():
    for item in _pictures("pie", 40):
        slices = _of_colours(item)
        # Each slice is one region; the tip of a thin slice may leave single pixels around the centre.
        assert all(sum(region.area > 1 for region in regions) == 1 for regions in slices.values())
        areas = {colour: sum(region.area for region in regions) for colour, regions in slices.items()}
        # Shares are multiples of 5 percent: 130 pixels of the smallest pie, whose blurred edges have about 15.
        shares = {colour: 5 * round(20 * area / sum(areas.values())) for colour, area in areas.items()}
        assert shares == {c: int(n) for n, c in re.findall(r"(\d+) percent (\w+)", item.caption)}
        # An image has only one description: its slices are sorted by colour, and each begins where another ends.
        described = json.loads(item.parameters)
        assert set(described) == {"kind", "size", "background", "slices"}
        slices = described["slices"]
        assert slices == sorted(slices)
        assert sorted(start for _, start, _ in slices) == sorted((start + 18 * part) % 360 for _, start, part in slices)
        match = re.search(r"How many percent of the pie are (\w+)\?", item.question)
        expected = {
            "Which colour has the largest share of the pie?": max(areas, key=areas.get),
            "Which colour has the smallest share of the pie?": min(areas, key=areas.get),
            "How many slices does the pie have?": str(len(areas)),
        }
        assert item.answer == (str(shares[match[1]]) if match else expected[item.question]), item
        assert sorted(shares.values())[-1] > sorted(shares.values())[-2]


def _cropped(values):
    rows, columns = np.flatnonzero(values.any(1)), np.flatnonzero(values.any(0))
    return values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _looks_like(seen, word, font):
    mask = font.getmask(word)
    expected = _cropped(np.asarray(mask, float).reshape(mask.size[::-1]) / 255)
    return expected.shape == seen.shape and np.abs(expected - seen).max() < 0.02  # colours have 8 bits


def test_text_is_what_it_says():
    for item in _pictures("text", 60):
        drawn = json.loads(item.parameters)
        count, colour, background, text = re.fullmatch(
            r'(\d) lines? of (\w+) text on a (.*) background: "(.*)"\.', item.caption
        ).groups()
        lines = text.split(" ")
        assert int(count) == len(lines)
        ink = opacity(item.image, COLOURS[colour], BACKGROUNDS[background])
        assert -0.01 < ink.min() == 0 < 0.85 < ink.max() < 1.01
        assert not ink[[0, -1]].any()  # nothing is cut off
        assert not ink[:, [0, -1]].any()
        step = item.image.height // len(lines)
        font = ImageFont.load_default(drawn["font"])
        for i, line in enumerate(lines):
            seen = _cropped(ink[i * step : (i + 1) * step].round(3))
            assert _looks_like(seen, line, font), (item, line)
            assert not any(_looks_like(seen, word, font) for word in WORDS if word != line)
        expected = {
            "What does the text say?": text,
            "What does the last line say?": lines[-1],
            "Which colour is the text?": colour,
            "How many lines are numbers?": str(sum(line.isdigit() for line in lines)),
        }
        assert item.answer == expected[item.question]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(), st.integers(), st.integers(64, 200), st.integers(0, 100))
def test_sizes_and_purity(kind, seed, index, least, more):
    item, again = picture(kind, seed, index, least, least + more), picture(kind, seed, index, least, least + more)
    assert item.image.mode == "RGB"
    assert all(least <= side <= least + more for side in item.image.size)
    assert json.loads(item.parameters)["size"] == list(item.image.size)
    assert item.image.tobytes() == again.image.tobytes()
    assert (item.caption, item.question, item.answer, item.parameters) == (
        again.caption,
        again.question,
        again.answer,
        again.parameters,
    )
    assert item.kind == kind


def test_sizes_vary():
    sizes = {picture("pie", 0, index).image.size for index in range(60)}
    sides = [side for size in sizes for side in size]
    assert len(sizes) > 50
    assert min(sides) < 80
    assert max(sides) > 240


_DIGEST_CODE = """
import hashlib
from qwen3f.data.sources.images import KINDS, picture
digest = hashlib.sha256()
for kind in KINDS:
    for index in range(10):
        item = picture(kind, 0, index)
        digest.update(item.image.tobytes() + repr((item.caption, item.question, item.answer, item.parameters)).encode())
print(digest.hexdigest())
"""


def test_other_processes_give_the_same():
    command = [sys.executable, "-c", _DIGEST_CODE]
    path = ":".join(p for p in sys.path if p)
    outputs = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    # The digest pins everything but the pixels, on every machine: pixels of text may depend on FreeType's version.
    digest = hashlib.sha256()
    for kind in KINDS:
        for index in range(10):
            item = picture(kind, 0, index)
            digest.update(repr((item.caption, item.question, item.answer, item.parameters)).encode())
    assert digest.hexdigest()[:16] == "42fde8c35022aa51"


def test_errors():
    with pytest.raises(UserError, match=r"Unknown kind of picture 'photo'; there are shapes, bar, .*: write one"):
        picture("photo", 0, 0)
    for sides in ((63, 100), (100, 99)):
        with pytest.raises(UserError, match=rf"Pictures of {sides[0]} to {sides[1]} pixels .*: give min_side of at"):
            picture("pie", 0, 0, *sides)
