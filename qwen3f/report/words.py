"""Numbers and changes in words, so that readers need not read curves."""

import math
import re

from qwen3f.eval.statistics import Estimate, difference
from qwen3f.report.data import Measure
from qwen3f.report.names import Meaning

MINUS = "\N{MINUS SIGN}"


def figure(value: float, unit: str = "") -> str:
    """A number as text: shares as percent, large numbers with commas, others with four digits."""
    if not math.isfinite(value):
        return "no number"
    if unit == "share":
        text = f"{100 * value:.1f}%"
    elif value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1000 <= abs(value) < 1e15:
        text = f"{value:,.0f}"
    elif abs(value) >= 0.001:
        text = f"{value:.4g}"
    else:
        text = re.sub(r"e-0*", f"e{MINUS}", f"{value:.3g}")
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def interval(measure: Measure, unit: str = "") -> str:
    """41.0% (35.2 to 47.1%)"""
    text = figure(measure.value, unit)
    if not measure.has_interval:
        return text
    low = figure(measure.low, unit).removesuffix("%")
    return f"{text} ({low} to {figure(measure.high, unit)})"


def duration(seconds: float) -> str:
    """3 h 12 min, 5 min 20 s, 41 s"""
    if not 0 < seconds < 1e12:
        return "time not known"
    whole = max(1, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def change(before: Measure, after: Measure, meaning: Meaning, paired: Estimate | None = None) -> tuple[str, str]:
    """("gain", "loss" or "none", a sentence). "none" too if it cannot be told. If both have intervals, the interval of
    the difference decides.

    paired: the paired difference, if both measures are on the same questions; else two samples are compared.
    """
    delta = paired.value if paired else after.value - before.value
    if not (paired or (before.has_interval and after.has_interval)):
        if meaning.unit == "share":
            return "none", f"{_amount(delta, meaning)}; without an interval"
        if not meaning.better or delta == 0:
            return "none", "unchanged" if delta == 0 else ""
        good = (delta > 0) == (meaning.better == "higher")
        return ("gain" if good else "loss"), f"{_amount(delta, meaning)}, {'better' if good else 'worse'}"
    found = paired or difference(_estimate(before), _estimate(after))
    bounds = f"({_points(found.low, meaning)} to {_points(found.high, meaning)})"
    if found.low <= 0 <= found.high:
        return "none", f"no gain that {found.n:,} questions can show: {_amount(delta, meaning)} {bounds}"
    good = (delta > 0) == (meaning.better != "lower")
    return ("gain" if good else "loss"), f"{'a gain' if good else 'a loss'}: {_amount(delta, meaning)} {bounds}"


def _estimate(measure: Measure) -> Estimate:
    return Estimate(measure.value, measure.low, measure.high, measure.n)


def _amount(delta: float, meaning: Meaning) -> str:
    return _points(delta, meaning) + (" points" if meaning.unit == "share" else "")


def _points(value: float, meaning: Meaning) -> str:
    scaled = 100 * value if meaning.unit == "share" else value
    text = f"{scaled:+.1f}" if meaning.unit == "share" else f"{scaled:+.4g}"
    return text.replace("-", MINUS)
