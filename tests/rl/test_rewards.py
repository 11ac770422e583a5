"""Rewards: their values. A reward that fails is counted, affects only its own sample, and never blocks the run."""

import math
import threading

import pytest

from qwen3f.errors import UserError
from qwen3f.rl.judge import Judge, parse_rewards
from qwen3f.rl.rewards import REWARDS, Sample, math_reward
from qwen3f.tasks.equivalence import final_answer, judge

BAD = "tests.rl.toy_rewards"


def sample(text, gold="5", **more):
    fields = {"task": "reasoning", "prompt": "How many?", "ended": True, "thinking": True, "tokens": 10, "longest": 100}
    return Sample(gold=gold, text=text, **(fields | more))


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{3} or \boxed{4}", "4"),
        (r"<think>\boxed{3}</think>it is 4", "it is 4"),
        ("<think>\\boxed{3}", None),
        ("<think>#### 3</think>\nso\n#### 1,234", "1234"),
        ("Long talk.\nThe answer is **7**.", "7"),
        ("#### Step 1: add 3 and 4\n3 + 4 = 7.\n\nThe answer is **7**.", "7"),
        ("#### 7\nI hope this answer is helpful.", "7"),
        ("a\n\nfinal answer: $x+1$.\n\n", "$x+1$"),
        ("12", "12"),
        ("### Final Answer\n$$\n42\n$$", "42"),
        ("So the final answer is: **7**", "7"),
        ("**Answer**: 7", "7"),
        ("", None),
        ("<think>7</think>  ", None),
        ("\\boxed{" + "1" * 600 + "}", None),
    ],
)
def test_the_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.50}", r"\frac12", 1.0),
        (r"\boxed{x+1}", "1+x", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{(2,1)}", "(1,2)", 0.0),
        (r"\boxed{6}", "5", 0.0),
        ("I do not know", "5", 0.0),
        ("", "5", 0.0),
        (r"\boxed{}", "5", 0.0),
        (r"\boxed{5}", "", None),
        (r"\boxed{1; import os}", "1", 0.0),
        (r"\boxed{__import__('os')._exit(0)}", "1", 0.0),
        (r"\boxed{14/5}", r"1\frac{4}{5}", 0.0),
        (r"\boxed{1\frac{4}{5}}", r"\frac{14}{5}", 0.0),
        (r"\boxed{9/5}", r"1\frac{4}{5}", 1.0),
        (r"\boxed{1\frac{4}{5}}", "9/5", 1.0),
        (r"\boxed{-1\frac{4}{5}}", "-1.8", 1.0),
        (r"\boxed{2\frac12}", r"\frac52", 1.0),
        (r"\boxed{\frac{21}{2}}", r"2\frac12", 0.0),
        (r"\boxed{x\frac{1}{2}}", "x/2", 1.0),
        (r"\boxed{\frac{1}{2}^2}", "0.25", 1.0),
        (r"\boxed{\frac{3}{2}^2}", "3/4", 0.0),
        (r"\boxed{(\frac{1}{2}, 3)}", "(1/2,3)", 1.0),
        (r"\boxed{(1,200)}", "(1200)", 0.0),
        (r"\boxed{(1200)}", "(1,200)", 0.0),
        (r"\boxed{1,2,300}", "1,2300", 0.0),
        ("#### (1,200)", "(1200)", 0.0),
        ("#### 1,200", "1200", 1.0),
        (r"\boxed{\$1,200}", "1200", 1.0),
        (r"\boxed{10\%}", "10", 1.0),
        (r"\boxed{10\%}", "0.1", 1.0),
        (r"\boxed{12.5}", r"12.5\%", 1.0),
        (r"\boxed{1/8}", "12.5%", 1.0),
        (r"\boxed{10\text{ percent}}", r"10\%", 1.0),
        (r"\boxed{0.1}", "10", 0.0),
        (r"\boxed{5\%}", r"50\%", 0.0),
        (r"\boxed{72 clips}", "72", 1.0),
        (r"\boxed{1,800 dollars}", "1800", 1.0),
        (r"\boxed{20 miles per hour}", "20", 1.0),
        ("The answer is $7$ dollars.", "7", 1.0),
        (r"\boxed{5\text{ million}}", "5", 0.0),
        (r"\boxed{5 million}", "5000000", 1.0),
        (r"\boxed{\$5 hundred thousand}", "500,000", 1.0),
        (r"\boxed{2 dozens}", "2", 0.0),
        (r"\boxed{2 squared}", "2", 0.0),
        (r"\boxed{5\text{ hours }30\text{ minutes}}", "5", 0.0),
        (r"\boxed{5\text{ or }6}", "5,6", 1.0),
        (r"\boxed{3 dozen eggs}", "36", 1.0),
        (r"\boxed{5 and a half}", "5", 0.0),
        (r"\boxed{2 pi}", "2", 0.0),
        (r"\boxed{90°}", r"90^\circ", 1.0),
        (r"\boxed{(-∞,2)}", r"(-\infty,2)", 1.0),
        (r"\boxed{3√2}", r"\sqrt{18}", 1.0),
        (r"\boxed{x²}", "x^2", 1.0),
        (r"\boxed{101_2}", "101_3", 0.0),
        (r"\boxed{(101)_{2}}", "101_2", 1.0),
        (r"\boxed{2516}", "2516_8", 1.0),
        (r"\boxed{A2_{12}}", "2A_{12}", 0.0),
        (r"\boxed{0.\overline{3}}", "1/3", 1.0),
        (r"\boxed{0.3}", r"0.\overline{3}", 0.0),
        (r"\boxed{2^2-4}", "0", 1.0),  # sympy gives 1e-124 for it
        (r"\boxed{0}", "1-1", 1.0),
        (r"\boxed{0.0001}", "0", 0.0),
        (r"\boxed{On}", "No", 0.0),
        (r"\boxed{seat}", "east", 0.0),
        (r"\boxed{\text{East}}", "east", 1.0),
        (r"\boxed{ba}", "ab", 1.0),
        (r"\boxed{\infty}", "infinity", 1.0),
        (r"\boxed{\theta}", "theta", 1.0),
        (r"\boxed{7:00}", "6:00", 0.0),
        (r"\boxed{6:00}", "6:00", 1.0),
        (r"\boxed{5 weeks}", "5 days", 0.0),
        (r"\boxed{5}", "5 days", 1.0),
        (r"\boxed{60 km/h}", "60 mph", 0.0),
        (r"\boxed{60 mi/h}", "60 mph", 1.0),
        (r"\boxed{3 square feet}", r"3\text{ square meters}", 0.0),
        (r"\boxed{3\text{ m}^2}", "3 square meters", 1.0),
        (r"\boxed{1 1/2}", "3/2", 1.0),
        (r"\boxed{1 1/2}", "1", 0.0),
        (r"\boxed{1 1/2, 3}", "1,3", 0.0),
        (r"\boxed{1½}", "1.5", 1.0),
        (r"\boxed{2⁻¹}", "0.5", 1.0),
        (r"\boxed{5 km/h}", "5", 1.0),
        (r"\boxed{9.8\ \mathrm{m/s^2}}", r"9.8\text{ m}/\text{s}^2", 1.0),
        (r"\boxed{12 cm^2}", "12", 1.0),
        (r"\boxed{12 cm^2}", "144", 0.0),
        (r"\boxed{36\pi\text{ cubic inches}}", r"36\pi", 1.0),
        (r"\boxed{5 feet}", r"5\text{ inches}", 0.0),
        (r"\boxed{3 hrs}", "3 hours", 1.0),
        (r"\boxed{10\text{ a.m.}}", r"10\text{ p.m.}", 0.0),
        (r"\boxed{5\text{ or more}}", "5", 0.0),
        (r"\boxed{5\text{ squared}}", "5", 0.0),
        (r"\boxed{5\text{M}}", "5", 0.0),
        (r"\boxed{3\text{ to }\frac{1}{2}}", "3", 0.0),
        (r"\boxed{5d}", "5", 0.0),
        (r"\boxed{3 + 2t}", "5", 0.0),
        (r"\boxed{3m+2}", "2+3m", 1.0),
        (r"\boxed{c+b+a}", "a + b + c", 1.0),
        (r"\boxed{> 5}", "5", 0.0),
        (r"\boxed{\neq 5}", "5", 0.0),
        (r"\boxed{50\% \text{ or } 20\%}", "20", 0.0),
        (r"\boxed{y = 5}", "x = 5", 0.0),
        (r"\boxed{1.6\times10^{-19}}", r"1.7\times10^{-19}", 0.0),
        (r"\boxed{1.6\times10^{-19}}", r"1.60\cdot10^{-19}", 1.0),
        (r"\boxed{100\pi \mathrm{~cm}^2}", r"100\pi", 1.0),
        (r"\boxed{2\sqrt{3} cm}", r"2\sqrt3", 1.0),
        (r"\boxed{3\text{ at least}}", "3", 0.0),
        (r"\boxed{x = 21 apples}", "21", 1.0),
        (r"\boxed{\$7.0.}", "7", 1.0),
        (r"\boxed{x > 2}", r"(2,\infty)", 1.0),
        (r"\boxed{x > 2}", r"[2,\infty)", 0.0),
        (r"\boxed{5}", "5" * 5000, None),
    ],
)
def test_math_reward(answer, gold, expected):
    assert math_reward(answer, gold) == expected


def test_an_answer_that_would_compute_for_ever_is_not_judged_and_the_next_one_is(monkeypatch):
    """sympy would compute 9^9^9 without end. So the judging process is killed at its deadline (verl PR 5839 hung)."""
    monkeypatch.setattr("qwen3f.tasks.equivalence._workers", _short)
    outcome = judge(r"\boxed{9^{9^9}}", "5")
    assert outcome.value is None
    assert outcome.failure.startswith("took longer than")
    assert math_reward(r"\boxed{\frac{10}{2}}", "5") == 1.0


def _short(made=[]):  # noqa: B006 (one for the module)
    from qwen3f.processes.killable import Killable

    if not made:
        made.append(Killable(1, 3.0))
    return made[0]


def test_an_answer_of_a_megabyte_is_wrong_at_once():
    assert math_reward("1" * 1_000_000, "5") == 0.0
    assert math_reward("\\boxed{" * 150_000, "5") == 0.0
    assert math_reward("x " * 500_000 + r"\boxed{5}", "5") == 1.0


def test_math_reward_works_in_a_thread():
    """verl PR 5635: math-verify uses signals, which raise in a thread. So every reward was 0, without a message."""
    found = []
    thread = threading.Thread(target=lambda: found.append(math_reward(r"\boxed{\frac{2}{4}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_rewards_by_rule():
    good = sample("<think>\n2+3\n</think>\n\n\\boxed{5}")
    assert REWARDS["correct"](good) == REWARDS["format"](good) == 1.0
    cut = sample(good.text, ended=False)
    assert REWARDS["correct"](cut) == REWARDS["math"](cut) == REWARDS["format"](cut) == 0.0
    plain = sample("\\boxed{5}", thinking=False)
    assert (REWARDS["format"](plain), REWARDS["format"](sample("\\boxed{5}"))) == (1.0, 0.0)
    parts = [sample(f"\\boxed{{{text}}}", "10 20 30 40") for text in ("10 20 40 30", "10 20 30 40 50", "20 30 40", "")]
    assert [REWARDS["places"](one) for one in (*parts, sample("10 20", "10 20"))] == [0.5, 0.8, 0.0, 0.0, 0.0]
    assert (REWARDS["places"](good), REWARDS["places"](cut)) == (1.0, 0.0)
    assert REWARDS["length"](good) == -0.1
    assert [REWARDS["overlong"](sample("x", tokens=n)) for n in (75, 80, 100)] == [0.0, -0.2, -1.0]
    assert REWARDS["language"](sample("five пять")) == 0.5
    assert REWARDS["language"](sample("\\boxed{5}", prompt="多少？")) == 0.0
    assert REWARDS["language"](sample("5 5")) == 1.0


def test_failures_are_counted_and_nothing_waits_for_them():
    """Each reward gives one value for each sample, in order (NeMo PR 3058: two values after an exception)."""
    good, bad = sample("abc"), sample("raise")
    names = [f"{BAD}:{n}" for n in ("raises", "lines", "hangs", "dies", "says_nothing", "nan", "text", "huge")]
    fine = [f"{BAD}:{n}" for n in ("fine", "of_numpy", "sometimes", "shouts")]
    with Judge(dict.fromkeys([*fine, *names], 1.0), 2, 1.5) as judge_all:
        found = judge_all([good, bad])
    assert found.values[f"{BAD}:fine"] == [3.0, 5.0]
    assert found.values[f"{BAD}:of_numpy"] == [2.0, 0.5]
    assert found.values[f"{BAD}:sometimes"][0] == 1.0
    assert math.isnan(found.values[f"{BAD}:sometimes"][1])
    assert found.values[f"{BAD}:shouts"] == [0.5, 0.5]
    for name in names:
        assert all(map(math.isnan, found.values[name])), name
    said = {name.partition(": ")[0]: (name.partition(": ")[2], count) for name, count in found.failures.items()}
    assert said.pop(f"{BAD}:sometimes") == ("RuntimeError: on this one", 1)
    words = {
        "raises": "KeyError: 'gold'",
        "lines": "RuntimeError: one two",
        "hangs": "took longer than 1.5 s",
        "dies": "its process ended: exit code 0",
        "says_nothing": "cannot be judged",
        "nan": "it gave nan",
        "text": "it gave '1.0', which is no number",
        "huge": "it gave 1000000000.0, which is not within",
    }
    assert said.keys() == {f"{BAD}:{name}" for name in words}
    for name, part in words.items():
        why, count = said[f"{BAD}:{name}"]
        assert part in why
        assert count == 2


def test_math_verify_is_loaded_before_the_deadline_where_it_is_asked():
    """math-verify is loaded before the first deadline starts, if a reward needs it. Otherwise it is not loaded, since
    that takes a second."""
    told = []
    for asked, task in (("math", "reasoning"), ("correct", "gsm8k"), ("correct", "reasoning"), ("format", "gsm8k")):
        with Judge({f"{BAD}:verifier_is_loaded": 1.0, asked: 1.0}, 1, 20.0) as judge_all:
            told += judge_all([sample("x", task=task)]).values[f"{BAD}:verifier_is_loaded"]
    assert told == [1.0, 1.0, 0.0, 0.0]


def test_rewards_are_named_with_weights():
    assert parse_rewards("correct=1,format=0.2") == {"correct": 1.0, "format": 0.2}
    assert parse_rewards(f"{BAD}:fine") == {f"{BAD}:fine": 1.0}
    for text, words in (
        ("corect", "names 'corect': write one of correct"),
        (f"{BAD}:missing", "cannot be imported"),
        ("no.such:module", "cannot be imported"),
        (f"{BAD}:number", "is not a function"),
        ("correct=0", "positive"),
    ):
        with pytest.raises(UserError, match=words):
            parse_rewards(text)
