"""The charts of a stage as plain values: which curves are drawn together, their captions, and how they are thinned."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3f.report import marks, names
from qwen3f.report.data import Run
from qwen3f.report.metrics_file import Series
from qwen3f.report.words import figure

MOST_POINTS = 300  # points of a curve, at most
MOST_LINES = 4  # curves of a chart, at most: each has its own dashes
_FARTHEST = 1e300  # values are clipped to this size: sums and differences of larger ones could overflow


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve. low, high: a band around it (range of a mean, or an interval); () for none. dots: mark each point."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """title: text above the chart. caption: explains it. unit: of y, as in Meaning. axis: what x counts."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    unit: str = ""
    axis: str = "step"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A chart to draw.

    names: logged names that are drawn together, if they were logged. labels: of the curves; default: Meaning.title.
    stages: kinds of stage that have the chart; () for all. part: of the page, "quality" or "cost".
    """

    title: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    part: str = "quality"


_EVALUATED = ("val_", "answers_", "bench_")  # names of evaluations begin with these
RANKING = ("dpo", "reward_model")
CHARTS = (
    Plan("Reward", ("reward",), stages=("grpo", "dpo_online")),
    Plan("Loss", ("loss", "val_loss"), ("training", "held out")),
    Plan("Bits a byte of held-out text", ("val_bpb",)),
    Plan("Pairs ranked right", ("accuracy", "val_accuracy"), ("training", "held out"), RANKING),
    Plan("Right answers", ("val_accuracy", "val_accuracy_plain", "val_accuracy_thinking"), ("", "at once", "thinking"),
         ("sft", "grpo", "dpo_online")),
    Plan("Right answers", ("answers_accuracy",)),
    Plan("Well-formed answers", ("val_well_formed", "val_well_formed_plain", "val_well_formed_thinking"),
         ("", "at once", "thinking")),
    Plan("Well-formed answers", ("answers_well_formed",)),
    Plan("Wins against the reference", ("answers_wins",)),
    Plan("Wins against the reference", ("val_wins",)),
    Plan("Right answers about pictures", ("val_exact", "val_blind", "val_majority"),
         ("right", "other pictures", "most frequent")),
    Plan("Rewards by rule", ("reward/*",)),
    Plan("Margin", ("reward_margin", "score_margin", "val_margin"), ("training", "training", "held out")),
    Plan("Rewards of both answers", ("chosen_reward", "rejected_reward"), ("better", "worse")),
    Plan("Scores of both answers", ("chosen_score", "rejected_score"), ("better", "worse")),
    Plan("Length of answers", ("completion_tokens", "completion_tokens_max"), ("mean", "longest")),
    Plan("Length of answers", ("answer_tokens", "answers_tokens"), ("training", "held out")),
    Plan("Prompts and answers lost", ("truncated", "groups_wasted", "groups_all_best"),
         ("cut off", "no difference", "all right"), ("grpo",)),
    Plan("Prompts lost", ("ties",)),
    Plan("Entropy", ("entropy",)),
    Plan("Distance to the start", ("kl",)),
    Plan("Engine against trainer", ("sampler_kl", "moved"), ("sampler KL", "moved")),
    Plan("Clipped tokens", ("clip_low", "clip_high"), ("below", "above")),
    Plan("Experts: unevenness of the load", ("load_max_violation", "load_mean_violation"), ("fullest", "mean")),
    Plan("Experts: balancing loss", ("aux_loss",)),
    Plan("Learning rate", ("lr",), part="cost"),
    Plan("Gradient norm", ("grad_norm", "grad_norm_clipped"), ("before clipping", "clipped"), part="cost"),
    Plan("Speed", ("tokens_per_sec",), part="cost"),
    Plan("MFU", ("mfu",), part="cost"),
    Plan("Seconds of a step", ("rollout_seconds", "reward_seconds", "update_seconds"),
         ("sampling", "judging", "updating"), part="cost"),
    Plan("Use of rows", ("padding", "supervised", "visual", "patches"),
         ("padding", "supervised", "pictures", "patches"), part="cost"),
    Plan("Peak memory", ("peak_memory_gib",), part="cost"),
)  # fmt: skip


def charts_of(run: Run, part: str) -> list[Chart]:
    """The charts of what the run logged. A curve that is always 0 is left out."""
    found = (_chart(run, plan) for plan in CHARTS if plan.part == part and (not plan.stages or run.kind in plan.stages))
    return [chart for chart in found if chart is not None]


def main_chart(run: Run) -> Chart | None:
    """The one chart that shows best how a stage went: the reward if there is one, else the loss."""
    return next(iter(charts_of(run, "quality")), None)


def _chart(run: Run, plan: Plan) -> Chart | None:
    logged, lines, shown = run.metrics.series, [], []
    labels = dict(zip(plan.names, plan.labels, strict=bool(plan.labels))) if plan.labels else {}
    for name in _matching(plan.names, logged):
        meaning, series = names.find(name, run.kind), logged[name]
        idle = not any(series.values) and not name.startswith((*_EVALUATED, "reward"))
        if meaning is None or not series.values or idle or len(lines) == MOST_LINES:
            continue
        label = labels.get(name) or _mode(run, name) or meaning.title
        lines.append(_line(run, name.partition("/")[2] or label, name, series))
        shown.append((name, meaning, series))
    if not lines:
        return None
    if len(lines) == 1:
        lines = [dataclasses.replace(lines[0], label="")]
    unit = shown[0][1].unit
    return Chart(plan.title, _caption(run, shown, lines), tuple(lines), unit)


def _matching(patterns: tuple[str, ...], logged: Mapping[str, Any]) -> list[str]:
    out = []
    for pattern in patterns:
        prefix = pattern.removesuffix("*")
        out += [name for name in logged if name == pattern or (prefix != pattern and name.startswith(prefix))]
    return out


def _mode(run: Run, name: str) -> str:
    """The label for the mode of a name without one, if questions were also asked in the other mode; else ""."""
    asked = marks.first_mode(run)
    other = {"thinking": "plain", "plain": "thinking"}.get(asked)
    if other and f"{name}_{other}" in run.metrics.series:
        return "thinking" if asked == "thinking" else "at once"
    return ""


def _line(run: Run, label: str, name: str, series: Series) -> Line:
    evaluated = name.startswith(_EVALUATED)
    x, y = np.array(series.steps, dtype=float), np.clip(series.values, -_FARTHEST, _FARTHEST)
    if len(x) <= MOST_POINTS:
        bounds = marks.band(run, name) if evaluated else None
        low, high = (tuple(bounds[0]), tuple(bounds[1])) if bounds else ((), ())
        return Line(label, tuple(x.tolist()), tuple(y.tolist()), low, high, dots=evaluated and len(x) <= 40)
    parts = np.array_split(np.arange(len(x)), math.ceil(len(x) / math.ceil(len(x) / MOST_POINTS)))
    means, low, high = ([f(y[part]) for part in parts] for f in (np.mean, np.min, np.max))
    middle = [x[part].mean() for part in parts]
    return Line(label, *(tuple(float(v) for v in values) for values in (middle, means, low, high)))


def _caption(run: Run, shown: list[tuple[str, names.Meaning, Series]], lines: list[Line]) -> str:
    """The meaning of each curve, and its first and last value."""
    parts = []
    for (_, meaning, series), line in zip(shown, lines):
        better = f" {meaning.better.capitalize()} is better." if meaning.better else ""
        unit = f", in {meaning.unit}" if meaning.unit not in ("", "share") else ""
        label = f"{line.label[:1].upper()}{line.label[1:]}: " if line.label else ""
        said = meaning.meaning.removesuffix(".")
        parts.append(f"{label}{said}{unit}.{better} {_course(meaning, series)}")
    if (most := max(len(series.steps) for _, _, series in shown)) > MOST_POINTS:
        parts.append(thinned(run, most))
    elif any(line.low for line in lines):
        counts = [found[2] for name, _, _ in shown if (found := marks.band(run, name))]
        parts.append(f"The band is the 95% interval of {max(counts):,} questions.")
    return " ".join(parts)


def _course(meaning: names.Meaning, series: Series) -> str:
    missing = f" In {series.missing:,} lines it was no finite number." if series.missing else ""
    first, last = (figure(series.values[i], meaning.unit) for i in (0, -1))
    if len(series.values) == 1:
        return f"At step {series.steps[0]:,}: {first}.{missing}"
    return f"From {first} to {last}.{missing}"


def thinned(run: Run, values: int) -> str:
    """The sentence that says how a curve with more values than points was thinned."""
    text = (
        f"Each point is the mean of {math.ceil(values / MOST_POINTS)} logged values; the band spans the lowest and the "
        "highest"
    )
    if run.metrics.parsed < run.metrics.lines:
        text += f" of the {run.metrics.parsed:,} of {run.metrics.lines:,} lines that were read"
    return text + "."
