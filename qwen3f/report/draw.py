"""Draws charts as SVG by matplotlib: small enough for a page with a hundred, and in the colours of the page.

Matplotlib draws in stand-in colours, which are then replaced by `currentColor` and CSS variables. Texts stay texts, in
the page's font. Curves also differ by dashes and labels, so nobody needs to tell colours apart.
"""

import dataclasses
import functools
import html
import io
import itertools
import re

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from qwen3f.report.charts import Chart, Line

WIDTH, HEIGHT = 360, 200  # in units of the picture, which are CSS pixels on a phone
POINT = 72  # units per inch
FONT = 11
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_STEPS = (1, 2, 2.5, 5, 10)  # allowed steps between numbers on an axis, times a power of 10
ID = "\N{SECTION SIGN}"
MARKERS = ("o", "s", "^", "D")
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qwen3f",
    "font.size": FONT,
    "font.family": "DejaVu Sans",  # comes with matplotlib; only used to measure texts
    "path.simplify": True,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a name may have dollars
}


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of text, of grid lines, and of curves."""

    ink: str
    grid: str
    lines: tuple[str, ...]


STAND_INS = Theme("#100001", "#100002", ("#100011", "#100012", "#100013", "#100014"))
_VARIABLES = {
    STAND_INS.ink: "currentColor",
    STAND_INS.grid: "var(--grid)",
    **{colour: f"var(--line{number})" for number, colour in enumerate(STAND_INS.lines, 1)},
}


@functools.lru_cache(maxsize=512)
def svg(chart: Chart) -> str:
    """The chart as an <svg> element with a title; it takes the width of its container."""
    with mpl.rc_context(RC):
        figure = new_figure(WIDTH, HEIGHT)
        labels = [line.label for line in chart.lines if line.label]
        right = 8 + (6.2 * max(map(len, labels)) if labels else 4)
        left = 50
        axes = figure.add_axes((left / WIDTH, 28 / HEIGHT, (WIDTH - left - right) / WIDTH, (HEIGHT - 28 - 12) / HEIGHT))
        plot(axes, chart, STAND_INS)
        return as_svg(figure, _alternative(chart))


def _alternative(chart: Chart) -> str:
    """The text for readers who cannot see the picture; the caption beside it says the rest."""
    names = ", ".join(line.label for line in chart.lines if line.label)
    return f"{chart.title} by {chart.axis}" + (f": {names}" if names else "")


def named(text: str, name: str) -> str:
    """An SVG of `as_svg` whose ids begin with `name`, so that they are unique in a page."""
    return text.replace(ID, f"{name}-")


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width / POINT, height / POINT), dpi=POINT)
    figure.patch.set_alpha(0)
    return figure


def plot(axes: Axes, chart: Chart, theme: Theme, labels: bool = True) -> None:
    """Draws the curves. labels: also write their names at their ends, and the name of the x axis."""
    style(axes, chart.unit, theme)
    for number, line in enumerate(chart.lines):
        colour = theme.lines[number % len(theme.lines)]
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        marker = MARKERS[number % len(MARKERS)] if line.dots or len(line.x) == 1 else ""
        axes.plot(
            line.x, line.y, color=colour, linestyle=DASHES[number % len(DASHES)], linewidth=1.6,
            marker=marker, markersize=4, solid_capstyle="round",
        )  # fmt: skip
    axes.set_ylim(*bounds(chart.lines, chart.unit))
    axes.annotate(chart.axis if labels else "", (0, 0), xycoords="axes fraction", xytext=(-8, -13), ha="right",
                  textcoords="offset points", va="center", color=theme.ink, fontsize=FONT)  # fmt: skip
    if labels:
        _name(axes, chart.lines, theme)


def bounds(lines: tuple[Line, ...], unit: str) -> tuple[float, float]:
    """The limits of the y axis: all means, and the bands without outliers; within 0 … 1 for shares in that range."""
    means = np.concatenate([line.y for line in lines])
    edges = np.concatenate([(*line.low, *line.high) for line in lines if line.low] or [means])
    low, high = min(means.min(), np.quantile(edges, 0.02)), max(means.max(), np.quantile(edges, 0.98))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    out = low - (room if low < 0 or low > room else low + room / 2), high + room
    if unit == "share" and low >= 0 and high <= 1:
        top = min(out[1], 1.01)
        return min(out[0], top - 0.05), top
    return out


def style(axes: Axes, unit: str, theme: Theme) -> None:
    """Quiet axes: horizontal lines, few numbers."""
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=theme.ink, labelsize=FONT, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(percent if unit == "share" else lambda y, _: _short(y)))


def percent(value: float, _: int | None = None) -> str:
    """0.125 -> 12.5%"""
    return f"{100 * value:.3g}%".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    """1500 -> 1.5k, 0.0003 -> 3e-4"""
    if value and abs(value) < 1e-2:
        return re.sub(
            r"e-0*",
            "e\N{MINUS SIGN}",
            f"{value:.2g}" if abs(value) < 1e-4 else np.format_float_scientific(value, 2, trim="-"),
        )
    if abs(value) >= 1000:
        return EngFormatter(sep="", places=None)(value)
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _name(axes: Axes, lines: tuple[Line, ...], theme: Theme) -> None:
    """Writes the names beside the ends of the curves, moved apart so that they do not overlap."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * POINT
    gap = 13 * (high - low) / height
    named = [number for number, line in enumerate(lines) if line.label]
    places = apart([min(max(lines[number].y[-1], low), high) for number in named], gap, high)
    for number, place in zip(named, places):
        axes.annotate(
            lines[number].label, (1, place), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=theme.lines[number % len(theme.lines)], fontsize=FONT,
        )  # fmt: skip


def apart(places: list[float], gap: float, highest: float) -> list[float]:
    """The places, moved so that they are at least `gap` apart and none is above `highest`."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = list(places)
    for before, after in itertools.pairwise(order):
        out[after] = max(out[after], out[before] + gap)
    limit = highest
    for i in reversed(order):
        out[i] = min(out[i], limit)
        limit = out[i] - gap
    return out


def as_svg(figure: Figure, title: str) -> str:
    """The figure as SVG, without parts that a page does not need. Its ids begin with ID, which `named` replaces."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for stand_in, colour in _VARIABLES.items():
        text = text.replace(stand_in, colour)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"(\d+\.\d)\d{3,}", r"\1", text)
    text = re.sub(r"\n\s*", "\n", text)
    used = set(re.findall(r"(?:xlink:href=\"#|url\(#)([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{ID}{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(xlink:href=\"#|url\(#)", rf"\g<1>{ID}", text)
    [box] = re.findall(r'viewBox="[^"]*"', text)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" '
        f'aria-labelledby="{ID}t"><title id="{ID}t">{html.escape(title)}</title>'
    )
    return head + text[text.index(">") + 1 :]
