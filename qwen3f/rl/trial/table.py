"""The result of a trial as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.eval.statistics import paired

_COLUMNS = (
    ("greedy", "right"), ("sampled", "right"),
    ("greedy", "right_working"), ("greedy", "well_formed"), ("sampled", "well_formed"),
)  # fmt: skip


def table(found: Mapping[str, Any]) -> list[str]:
    """A line for each seed and arm, in per cent with 95% intervals; then the lead of GRPO over each of the others."""
    head = "".join(f"{way + ' ' + what.replace('_', ' '):>24}" for way, what in _COLUMNS)
    lines = [f"{'arm':<14}{'seed':>4}{head}{'tokens':>8}{'seconds':>9}"]
    for one in found["results"]:
        cells = "".join(f"{_share(one[way][what]):>24}" for way, what in _COLUMNS)
        lines.append(f"{one['arm']:<14}{one['seed']:>4}{cells}{one['greedy']['tokens']:>8.1f}{one['seconds']:>9.0f}")
    return [*lines, *_leads(found["results"])]


def _share(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} ({100 * estimate['low']:.1f}-{100 * estimate['high']:.1f})"


def _leads(results: Sequence[Mapping[str, Any]]) -> list[str]:
    by = {(one["arm"], one["seed"]): one for one in results}
    seeds = sorted({one["seed"] for one in results if one["arm"] == "grpo"})
    lines = []
    for other in sorted({one["arm"] for one in results} - {"grpo"}) if seeds else ():
        for way in ("greedy", "sampled"):
            pairs = [paired(by[other, s][way]["marks"], by["grpo", s][way]["marks"]) for s in seeds]
            each = ", ".join(f"{100 * p.difference:+.1f} ({100 * p.low:+.1f} to {100 * p.high:+.1f})" for p in pairs)
            mean = sum(p.difference for p in pairs) / len(pairs)
            lines.append(f"grpo over {other}, {way}: {each}; mean {100 * mean:+.1f} points")
    return lines
