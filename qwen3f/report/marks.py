"""How single questions were marked, where a run kept it: what intervals and paired differences are made of."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.eval.statistics import Estimate, Paired, estimate, paired, wilson
from qwen3f.report.data import Measure, Run, Stage

# metric -> (evaluation, what a line says of it); of the accuracies a mode may stand behind
_KEPT = {
    "val_accuracy": ("val", "mark"),
    "val_well_formed": ("val", "formed"),
    "answers_accuracy": ("answers", "mark"),
    "answers_well_formed": ("answers", "formed"),
    "val_exact": ("val", "mark"),
}
EXACT = "exact"  # the mode of lines behind val_exact


def marks(run: Run, name: str, step: int) -> list[float]:
    """What the questions behind a logged name were marked at a step, in order; [] where that is not kept."""
    base, mode = name, ""
    if base not in _KEPT:
        base, _, mode = name.rpartition("_")
    if base not in _KEPT:
        return []
    evaluation, key = _KEPT[base]
    mode = EXACT if name == "val_exact" else mode or first_mode(run)
    lines = [line for texts in run.answers if texts.step == step for line in texts.lines]
    own = [line for line in lines if line.get("evaluation") == evaluation and mode in ("", line.get("mode"))]
    return [float(line[key]) for line in own if isinstance(line.get(key), int | float)]


def first_mode(run: Run) -> str:
    """That whose results have no mode in their names; "" where there is one alone."""
    section = run.config.get("eval")
    modes = section.get("modes") if isinstance(section, dict) else None
    return modes.partition(",")[0].strip() if isinstance(modes, str) else ""


def measure(run: Run, name: str, step: int) -> Measure:
    """A logged value; with its interval where the marks that are kept are those it is the mean of."""
    series = run.metrics.at(name)
    value, found = series.values[series.steps.index(step)], marks(run, name, step)
    if not found or not math.isclose(math.fsum(found) / len(found), value, abs_tol=1e-6):
        return Measure(value)
    one = estimate(found)
    return Measure(one.value, one.low, one.high, one.n)


def band(run: Run, name: str) -> tuple[list[float], list[float], int] | None:
    """Wilson's bounds of each value of a share, and of how many questions; None where that is not kept."""
    series = run.metrics.at(name)
    count = max((len(marks(run, name, texts.step)) for texts in run.answers), default=0)
    if not count or not all(0 <= value <= 1 for value in series.values):
        return None
    bounds = [wilson(value * count, count) for value in series.values]
    return [low for low, _ in bounds], [high for _, high in bounds], count


def difference_in_run(run: Run, name: str, before: int, after: int) -> Estimate | None:
    """Of two evaluations that asked the same questions."""
    return _difference(marks(run, name, before), marks(run, name, after))


def difference_of_stages(before: Stage, after: Stage, name: str) -> Estimate | None:
    """Of two stages whose models were asked the same questions; None where these differ or are not kept."""
    (old, asked_before), (new, asked_after) = (_asked(stage.asked, name) for stage in (before, after))
    return _difference(old, new) if asked_before == asked_after else None


def _asked(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[str]]:
    own = [line for line in lines if f"{line.get('evaluation')}_{line.get('mode')}" == name]
    own = [line for line in own if isinstance(line.get("mark"), int | float)]
    return [float(line["mark"]) for line in own], [str(line.get("prompt")) for line in own]


def _difference(before: Sequence[float], after: Sequence[float]) -> Estimate | None:
    if not before or len(before) != len(after):
        return None
    found: Paired = paired(before, after)
    return Estimate(found.difference, found.low, found.high, found.n)
