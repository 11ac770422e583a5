"""A pipeline at a glance: a measure before and after each stage, a row for each stage, with 95% intervals."""

import functools

import matplotlib as mpl

from qwen3f.report import draw, names
from qwen3f.report.data import Measure, Report
from qwen3f.report.words import figure

_ROW = 30
Row = tuple[str, Measure | None, Measure | None]


def measured(report: Report) -> list[str]:
    """Names of the shares that at least two stages have."""
    found = {name: 0 for stage in report.stages for name in stage.after if _is_share(name)}
    for stage in report.stages:
        for name in found.keys() & stage.after.keys():
            found[name] += 1
    return [name for name, count in found.items() if count > 1]


def _is_share(name: str) -> bool:
    meaning = names.find(name)
    return meaning is not None and meaning.unit == "share"


def rows_of(report: Report, name: str) -> tuple[Row, ...]:
    """(name, before, after) of the stages that train; an evaluation has other questions. A stage that was skipped, or
    that is done but was never asked (such as pretraining), has no row."""
    ended = ("done", "skipped")
    trained = [stage for stage in report.stages if not stage.run.results]
    stages = [stage for stage in trained if stage.status not in ended or name in {*stage.before, *stage.after}]
    return tuple((stage.name, stage.before.get(name), stage.after.get(name)) for stage in stages)


@functools.lru_cache(maxsize=64)
def dots(title: str, rows: tuple[Row, ...]) -> str:
    """An <svg>: hollow dots before, filled dots after, a bar for each interval."""
    height = _ROW * len(rows) + 34
    with mpl.rc_context(draw.RC):
        fig = draw.new_figure(draw.WIDTH, height)
        left = min(150, 14 + 6.4 * max(len(name) for name, _, _ in rows))
        axes = fig.add_axes(
            (left / draw.WIDTH, 28 / height, (draw.WIDTH - left - 52) / draw.WIDTH, (height - 34) / height)
        )
        draw.style(axes, "share", draw.STAND_INS)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=draw.STAND_INS.grid, linewidth=0.8)
        highest = max((m.high if m.has_interval else m.value for _, *both in rows for m in both if m), default=1.0)
        end = min(1.0, max(0.05, 1.08 * highest))
        axes.set_xlim(-0.03 * end, end)
        axes.xaxis.set_major_locator(draw.MaxNLocator(4))
        axes.xaxis.set_major_formatter(draw.FuncFormatter(draw.percent))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows])
        for place, (_, before, after) in enumerate(rows):
            _row(axes, place, before, after)
        return draw.as_svg(fig, title)


def _short(name: str) -> str:
    return name if len(name) <= 21 else f"{name[:20]}…"


def _row(axes: draw.Axes, place: int, before: Measure | None, after: Measure | None) -> None:
    ink, colour = draw.STAND_INS.ink, draw.STAND_INS.lines[0]
    if before:
        axes.plot([before.value], [place], "o", mfc="none", mec=ink, markersize=6, clip_on=False)
    if not after:
        axes.annotate("not yet", (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0),
                      textcoords="offset points", va="center", color=ink)  # fmt: skip
        return
    if after.has_interval:
        axes.plot([after.low, after.high], [place, place], color=colour, linewidth=3, alpha=0.45, clip_on=False)
    axes.plot([after.value], [place], "o", color=colour, markersize=6, clip_on=False)
    axes.annotate(figure(after.value, "share"), (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0),
                  textcoords="offset points", va="center", color=ink)  # fmt: skip
