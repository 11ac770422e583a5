"""Numbers and changes in words, and what names mean."""

import math

import pytest

from qwen3f.eval.statistics import Estimate, paired
from qwen3f.report import names, words
from qwen3f.report.data import Measure
from tests.report.places import measure

SHARE = names.METRICS["val_accuracy"]
LOSS = names.METRICS["val_loss"]


def told(right, n=64):
    return Measure(**measure(right, n))


def test_a_difference_whose_interval_has_zero_in_it_is_no_gain():
    kind, said = words.change(told(30), told(33), SHARE)
    assert kind == "none"
    assert said.startswith("no gain that 64 questions can show: +4.7 points (−")


@pytest.mark.parametrize("before, after, kind", [(5, 40, "gain"), (40, 5, "loss")])
def test_a_difference_beyond_chance_is_a_gain_or_a_loss(before, after, kind):
    found, said = words.change(told(before), told(after), SHARE)
    assert found == kind
    assert said.startswith(f"a {kind}: ")


def test_the_same_questions_tell_what_two_samples_cannot():
    a, b = [1.0] * 20 + [0.0] * 44, [1.0] * 29 + [0.0] * 35
    found = paired(a, b)
    assert words.change(told(20), told(29), SHARE)[0] == "none"
    assert words.change(told(20), told(29), SHARE, Estimate(found.difference, found.low, found.high, 64))[0] == "gain"


def test_a_share_without_an_interval_is_never_called_better():
    kind, said = words.change(Measure(0.1), Measure(0.9), SHARE)
    assert (kind, said) == ("none", "+80.0 points; without an interval")


def test_a_loss_is_better_when_it_is_lower():
    assert words.change(Measure(3.0), Measure(2.5), LOSS) == ("gain", "−0.5, better")
    assert words.change(Measure(2.5), Measure(3.0), LOSS) == ("loss", "+0.5, worse")


@pytest.mark.parametrize("value, unit, text", [
    (0.4125, "share", "41.2%"), (1234567.0, "", "1,234,567"), (1234.5, "", "1,234"), (-2.5, "", "−2.5"),
    (2e-5, "", "2e−5"), (0.0, "", "0"), (-1.234e-7, "", "−1.23e−7"), (1.7e308, "", "1.7e+308"),
    (math.inf, "", "no number"),
])  # fmt: skip
def test_figures(value, unit, text):
    assert words.figure(value, unit) == text


@pytest.mark.parametrize("seconds, text", [
    (0, "time not known"), (0.2, "1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"),
    (3600, "1 h 0 min"), (90061, "25 h 1 min"), (1e308, "time not known"), (math.inf, "time not known"),
])  # fmt: skip
def test_durations(seconds, text):
    assert words.duration(seconds) == text


def test_names_have_groups_modes_and_stages():
    assert names.find("val_accuracy/sequence").title == "right answers, sequence"
    assert names.find("val_accuracy_plain").title == "right answers, at once"
    assert names.find("loss", "grpo").title == "policy loss"
    assert names.find("bench_gsm8k/exact_match_strict").title == "gsm8k: exact_match_strict"
    assert names.find("nobody_knows") is None


def test_every_line_of_the_table_of_names_is_whole():
    for name, meaning in names.METRICS.items():
        assert meaning.title, name
        assert meaning.meaning.endswith("."), name
        assert meaning.better in ("higher", "lower", ""), name


def test_a_benchmark_is_named_beside_its_mode_whatever_it_is():
    for benchmark in ("reasoning", "gsm8k"):
        found = names.find(f"{benchmark}_thinking")
        assert found.title == f"right answers, {benchmark}, thinking first"
        assert (found.unit, found.better) == ("share", "higher")
    assert names.find("never_heard_of") is None
