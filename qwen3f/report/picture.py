"""A single compact figure of a whole pipeline or run, for a README.

Each stage is a column: above, the share of right answers after it, with 95% intervals; below, its training curve. The
SVG has its own background, and light and dark colours.
"""

import io
from pathlib import Path

import matplotlib as mpl

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.report import draw, names, overview
from qwen3f.report.charts import main_chart
from qwen3f.report.data import Report, Stage
from qwen3f.report.read import read

_LIGHT = draw.Theme("#1c2128", "#d5d9de", ("#0b57b7", "#b3470b", "#17734f", "#7b3fa8"))
_DARK = draw.Theme("#e4e8ec", "#3a424b", ("#86b7ff", "#ffa066", "#5fcf9f", "#cf9bf5"))
_PAPERS = ("#ffffff", "#14171b")
_WIDTH, _ABOVE, _BELOW = 900, 214, 130
_LEFT, _RIGHT, _GAP = 48, 14, 40  # margins left and right of the columns, and the gap between them
_SCALE = 2  # of a PNG


def write_picture(workdir: Path, out: Path) -> Path:
    """Writes the figure as .svg or .png. Raises UserError for another ending and as `read`, OSError if it cannot be
    written."""
    if out.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={out}: write a name that ends in .svg or .png")
    report = read(workdir)
    stages = [stage for stage in report.stages if stage.run.metrics.series]
    if not stages:
        raise UserError(f"{workdir} has no stage with metrics yet; there is nothing to draw")
    write_atomically(out, svg(report, stages).encode() if out.suffix == ".svg" else png(report, stages))
    return out


def svg(report: Report, stages: list[Stage]) -> str:
    with mpl.rc_context(draw.RC):
        text = draw.named(draw.as_svg(_figure(report, stages, draw.STAND_INS), _title(report)), "picture")
    text = text.replace("currentColor", "var(--ink)").replace("<svg ", f'<svg width="{_WIDTH}" ', 1)
    light, dark = (_variables(theme, paper) for theme, paper in zip((_LIGHT, _DARK), _PAPERS))
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}</style>"
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return text.replace("</title>", f"</title>{style}{paper}", 1)


def png(report: Report, stages: list[Stage]) -> bytes:
    out = io.BytesIO()
    with mpl.rc_context(draw.RC):
        figure = _figure(report, stages, _LIGHT)
        figure.savefig(out, format="png", dpi=_SCALE * draw.POINT, facecolor=_PAPERS[0])
    return out.getvalue()


def _variables(theme: draw.Theme, paper: str) -> str:
    lines = "".join(f"--line{number}:{colour};" for number, colour in enumerate(theme.lines, 1))
    return f"--ink:{theme.ink};--grid:{theme.grid};--paper:{paper};{lines}"


def _title(report: Report) -> str:
    return f"{report.title}: " + ", ".join(stage.name for stage in report.stages)


def _figure(report: Report, stages: list[Stage], theme: draw.Theme) -> draw.Figure:
    measures = overview.measured(report)[: len(theme.lines)]
    above = _ABOVE if measures else 0
    height = above + _BELOW + 50
    figure = draw.new_figure(_WIDTH, height)
    room = (_WIDTH - _LEFT - _RIGHT) / len(stages)
    if measures:
        _accuracies(figure, stages, measures, (room, height), theme)
    for place, stage in enumerate(stages):
        left = _LEFT + place * room
        chart = main_chart(stage.run)
        box = (left / _WIDTH, 30 / height, (room - _GAP) / _WIDTH, (_BELOW - 24) / height)
        if chart is None:
            continue
        axes = figure.add_axes(box)
        draw.plot(axes, chart, theme, labels=False)
        axes.xaxis.set_major_locator(draw.MaxNLocator(2, integer=True))
        axes.yaxis.set_major_locator(draw.MaxNLocator(3))
        axes.set_title(_said(stage, chart.title, bool(measures)), color=theme.ink, fontsize=draw.FONT, loc="left")
    said = "steps of each stage; solid: training, dashed: held out"
    figure.text(_LEFT / _WIDTH, 6 / height, said, color=theme.ink, fontsize=draw.FONT - 1)
    return figure


def _said(stage: Stage, what: str, named_above: bool) -> str:
    return what if named_above else f"{stage.name}: {what.lower()}"


def _broken(name: str, room: float) -> str:
    """The name; if it does not fit, with a line break after its first underscore."""
    return name if 7 * len(name) < room else name.replace("_", "_\n", 1)


def _accuracies(
    figure: draw.Figure, stages: list[Stage], measures: list[str], size: tuple[float, float], theme: draw.Theme
) -> None:
    """Draws a dot with its interval for each stage and measure, and a legend of the measures."""
    room, height = size
    box = (_LEFT / _WIDTH, (_BELOW + 60) / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, (_ABOVE - 64) / height)
    axes = figure.add_axes(box)
    draw.style(axes, "share", theme)
    axes.set_xlim(-0.5 + (_GAP / 2) / room, len(stages) - 0.5 + (_GAP / 2) / room)
    axes.set_xticks(range(len(stages)), [_broken(stage.name, room) for stage in stages])
    highest = 0.05
    for number, name in enumerate(measures):
        shift = (number - (len(measures) - 1) / 2) * 0.16
        found = [(place + shift, stage.after[name]) for place, stage in enumerate(stages) if name in stage.after]
        colour, marker = theme.lines[number], draw.MARKERS[number]
        meaning = names.find(name)
        label = meaning.title.removeprefix(f"{names.METRICS['answered'].title}, ") if meaning else name
        axes.plot([x for x, _ in found], [m.value for _, m in found], linestyle=draw.DASHES[number], color=colour,
                  linewidth=1, marker=marker, markersize=6, label=label)  # fmt: skip
        for x, m in found:
            if m.has_interval:
                axes.plot([x, x], [m.low, m.high], color=colour, linewidth=2.5, alpha=0.5)
                highest = max(highest, m.high)
            highest = max(highest, m.value)
    axes.set_ylim(0, min(1.02, highest * 1.1))
    counts = {m.n for stage in stages for name, m in stage.after.items() if name in measures and m.n}
    asked = f"{min(counts):,} held-out problems" if len(counts) == 1 else "held-out problems"
    said = f"Share of {asked} that are answered right after each stage; bars: 95% intervals"
    figure.text(_LEFT / _WIDTH, 1 - 18 / height, said, color=theme.ink, fontsize=draw.FONT + 1)
    axes.legend(loc="upper left", frameon=False, labelcolor=theme.ink, fontsize=draw.FONT, ncols=len(measures),
                borderaxespad=0, bbox_to_anchor=(0, 1.22), handlelength=3)  # fmt: skip
