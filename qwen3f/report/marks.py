"""Marks of single questions, if a run kept them: the basis of intervals and paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.eval.statistics import Estimate, Paired, estimate, paired, wilson
from qwen3f.finite import as_finite
from qwen3f.report.data import Measure, Run, Stage

# metric -> (evaluation, key of a line). A mode may follow the name of a metric, such as val_accuracy_plain.
_KEPT = {
    "val_accuracy": ("val", "mark"),
    "val_well_formed": ("val", "formed"),
    "answers_accuracy": ("answers", "mark"),
    "answers_well_formed": ("answers", "formed"),
    "val_exact": ("val", "mark"),
}
Line = Mapping[str, Any]
EXACT = "exact"  # the mode of the lines that val_exact is computed from


def marks(run: Run, name: str, step: int) -> list[float]:
    """The marks of the questions that a logged value at a step is the mean of, in order; [] if they were not kept."""
    lines, key = _lines(run, name, step)
    return [value for line in lines if (value := _mark(line, key)) is not None]


def _lines(run: Run, name: str, step: int) -> tuple[list[Line], str]:
    """(all lines of the evaluation, the key of their mark) for a logged name."""
    base, mode = name, ""
    if base not in _KEPT:
        base, _, mode = name.rpartition("_")
    if base not in _KEPT:
        return [], ""
    evaluation, key = _KEPT[base]
    mode = EXACT if name == "val_exact" else mode or first_mode(run)
    lines = [line for texts in run.answers if texts.step == step for line in texts.lines]
    own = [line for line in lines if line.get("evaluation") == evaluation and mode in ("", line.get("mode"))]
    return own, key


def _mark(line: Line, key: str) -> float | None:
    """The mark, a number in 0 … 1; None if the task could not tell, or if the line is damaged."""
    value = line.get(key)
    found = float(value) if isinstance(value, bool) else as_finite(value)
    return found if found is not None and 0 <= found <= 1 else None


def first_mode(run: Run) -> str:
    """The mode whose results have no mode in their names; "" if the stage has no modes."""
    section = run.config.get("eval")
    modes = section.get("modes") if isinstance(section, dict) else None
    return modes.partition(",")[0].strip() if isinstance(modes, str) else ""


def measure(run: Run, name: str, step: int) -> Measure:
    """A logged value, with its interval if all marks were kept that it is the mean of."""
    series = run.metrics.at(name)
    value, found = series.values[series.steps.index(step)], marks(run, name, step)
    if not found or not math.isclose(math.fsum(found) / len(found), value, abs_tol=1e-6):
        return Measure(value)
    one = estimate(found)
    return Measure(one.value, one.low, one.high, one.n)


def band(run: Run, name: str) -> tuple[list[float], list[float], int] | None:
    """(lower, upper) Wilson bounds of each value of a share, and the number of questions; None if it is not known."""
    series = run.metrics.at(name)
    count = max((len(marks(run, name, texts.step)) for texts in run.answers), default=0)
    if not count or not all(0 <= value <= 1 for value in series.values):
        return None
    bounds = [wilson(value * count, count) for value in series.values]
    return [low for low, _ in bounds], [high for _, high in bounds], count


def difference_in_run(run: Run, name: str, before: int, after: int) -> Estimate | None:
    """The difference of two evaluations with the same questions; None if they differ or not all marks were kept."""
    if not all(measure(run, name, step).has_interval for step in (before, after)):
        return None
    (old, key), (new, _) = (_lines(run, name, step) for step in (before, after))
    return _difference(old, new, key)


def difference_of_stages(before: Stage, after: Stage, name: str) -> Estimate | None:
    """The difference of two stages whose models answered the same questions; None if they differ or were not kept."""
    old, new = (
        [line for line in stage.asked if f"{line.get('evaluation')}_{line.get('mode')}" == name]
        for stage in (before, after)
    )
    return _difference(old, new, "mark")


def _difference(before: Sequence[Line], after: Sequence[Line], key: str) -> Estimate | None:
    """The paired difference over the questions that were judged both times. Questions are the same if their order,
    modes and (if kept) prompts are."""
    asked_before, asked_after = ([(line.get("mode"), line.get("prompt")) for line in some] for some in (before, after))
    if asked_before != asked_after:
        return None
    both = [(_mark(old, key), _mark(new, key)) for old, new in zip(before, after)]
    judged = [(old, new) for old, new in both if old is not None and new is not None]
    if not judged:
        return None
    found: Paired = paired(*zip(*judged))
    return Estimate(found.difference, found.low, found.high, found.n)
