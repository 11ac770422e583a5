"""Intervals and paired differences from single answers."""

import math

import pytest

from qwen3f.eval.statistics import paired
from qwen3f.report import marks
from qwen3f.report.data import Run, Stage, Texts
from qwen3f.report.metrics_file import Metrics, Series


def lines(marks_, prompts=None):
    """Lines of answers as eval.answers.kept writes them: only the first ones have their prompts."""
    return tuple(
        {"evaluation": "val", "mode": "plain", "number": i, "mark": mark, "formed": True}
        | ({"prompt": (prompts or "abcdef")[i]} if i < 3 else {})
        for i, mark in enumerate(marks_)
    )


def mean(marks_):
    judged = [mark for mark in marks_ if mark is not None]
    return math.fsum(judged) / len(judged)


def run_of(before, after, values=None, prompts=None):
    """A run with two evaluations."""
    series = {"val_accuracy": Series((1, 2), values or (mean(before), mean(after)))}
    return Run(
        {"eval": {"modes": "plain"}}, {}, Metrics(series), (Texts(1, lines(before)), Texts(2, lines(after, prompts)))
    )


def test_each_question_is_compared_with_itself_where_some_could_not_be_judged():
    before = [None, 1.0, 0.0, 1.0, 0.0, 1.0]
    after = [1.0, 1.0, 0.0, 1.0, 0.0, None]
    found = marks.difference_in_run(run_of(before, after), "val_accuracy", 1, 2)
    same = paired([1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0])
    assert (found.value, found.low, found.high, found.n) == (0.0, same.low, same.high, 4)
    asked = [Stage("s", "", Run(), asked=lines(marks_)) for marks_ in (before, after)]
    assert marks.difference_of_stages(*asked, "val_plain") == found


@pytest.mark.parametrize("run", [
    run_of([1.0, 0.0], [1.0, 0.0], prompts="xyz"), run_of([1.0, 0.0], [1.0, 0.0, 1.0]),
    run_of([1.0, 0.0], [1.0, 0.0], values=(0.5, 0.7)),  # metrics of more questions than are kept
    run_of([1.0, None], [None, 0.0]),
])  # fmt: skip
def test_other_questions_have_no_difference(run):
    assert marks.difference_in_run(run, "val_accuracy", 1, 2) is None


@pytest.mark.parametrize("damaged", [10**400, 1e308, -1, math.nan, "x", [1.0]], ids=lambda x: f"{x!r:.9}")
def test_a_damaged_mark_is_none(damaged):
    run = run_of([1.0, 0.0], [1.0, 0.0])
    broken = Texts(2, ({**run.answers[1].lines[0], "mark": damaged}, *run.answers[1].lines[1:]))
    assert marks.marks(Run(run.config, {}, run.metrics, (run.answers[0], broken)), "val_accuracy", 2) == [0.0]
