"""Intervals equal scipy's or hold in simulations; McNemar's test equals scipy's; pass@k has its expectation."""

import random
from math import comb

import numpy as np
import pytest
import scipy.stats

from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.humaneval import pass_at_k
from qwen3f.eval.compare import compare, described, main
from qwen3f.eval.statistics import Estimate, bootstrap, difference, estimate, mcnemar, paired, wilson


@pytest.mark.parametrize("successes, n", [(0, 5), (5, 5), (1, 7), (81, 263), (700, 1000)])
def test_wilson_is_scipys(successes, n):
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_right_and_wrong_get_wilson_and_other_values_the_bootstrap():
    assert (estimate([1.0, 0.0, 1.0]).low, estimate([1.0, 0.0, 1.0]).high) == wilson(2, 3)
    values = [0.0, 1 / 3, 2 / 3, 1.0] * 25
    found = estimate(values)
    assert found.value == pytest.approx(0.5)
    # For a mean of 100 values it is close to the normal interval: 2,000 resamples move its ends by some 3% of its width
    half = 1.96 * np.std(values) / 10
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.1 * half)
    assert bootstrap(values) == bootstrap(values[::-1])


@pytest.mark.parametrize("better, worse", [(0, 0), (3, 0), (10, 4), (7, 7), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(better, worse):
    expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_many_questions_counts_no_combination_from_its_beginning(monkeypatch):
    """VQAv2 has 214,354 questions: computing each binomial coefficient from its beginning would be slow."""
    counted = []
    monkeypatch.setattr("qwen3f.eval.statistics.math.comb", lambda n, k: counted.append(k) or comb(n, k))
    assert mcnemar(900, 1100) == pytest.approx(scipy.stats.binomtest(900, 2000).pvalue, rel=1e-9)
    assert not counted


def test_paired_intervals_hold_the_true_difference_as_often_as_they_say():
    """Of 600 intervals of 95%, between 92.3% and 98.5% must hold the true difference.

    The lower bound is 3 standard errors, of 0.9 points each, below 95%. Both models find the same questions easy.
    """
    rand, hits = np.random.default_rng(0), 0
    for _ in range(600):
        easy = rand.random(150) < 0.5
        a, b = (np.where(easy, rand.random(150) < 0.9, rand.random(150) < p).astype(float) for p in (0.3, 0.4))
        found = paired(a.tolist(), b.tolist())
        hits += found.low <= 0.05 <= found.high
        assert found.difference == pytest.approx(b.mean() - a.mean())
    assert 0.923 <= hits / 600 <= 0.985


@pytest.mark.parametrize("n, c, k", [(10, 3, 1), (10, 3, 5), (20, 1, 10), (5, 0, 2), (5, 5, 1), (6, 4, 3)])
def test_pass_at_k_is_the_chance_by_simulation(n, c, k):
    """Within 5 standard errors of 40,000 draws without replacement; one is at most 0.5 / 200."""
    rand = random.Random(f"{n} {c} {k}")
    hits = sum(any(i < c for i in rand.sample(range(n), k)) for _ in range(40_000)) / 40_000
    assert pass_at_k(n, c, k) == pytest.approx(hits, abs=5 * 0.5 / 200)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 − (1 − p)^k, exactly."""
    n, k, p = 12, 5, 0.3
    counts = scipy.stats.binom(n, p).pmf(np.arange(n + 1))
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(counts)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def results(marks, **changes):
    said = {"group": "", "question": "why?", "gold": 0} | changes
    samples = [{"number": i, "name": f"r{i}", **said, "metrics": {"acc": float(x)}} for i, x in marks.items()]
    return {"benchmarks": {"arc_challenge": {"samples": samples}}}


def test_two_results_are_compared_question_by_question():
    a, b = results({0: 0, 1: 1, 2: 0, 3: 1}), results({4: 1, 3: 1, 2: 1, 1: 0, 0: 1})
    found = compare(a, b)["arc_challenge", "acc"]
    assert (found.better, found.worse, found.all.n, found.all.difference) == ((0, 2), (1,), 4, 0.25)
    text = described(compare(a, b))
    assert "| arc_challenge | acc | +25.00 |" in text
    assert "- arc_challenge acc, better: 0, 2\n- arc_challenge acc, worse: 1\n" in text


@pytest.mark.parametrize(
    "b, words",
    [
        *((results({0: 1}, **{key: "x"}), "question 0 of arc_challenge is another one")
          for key in ("gold", "group", "question")),
        (results({9: 1}), "in common"),
    ],
)  # fmt: skip
def test_results_of_other_questions_are_refused(b, words):
    with pytest.raises(UserError, match=words):
        compare(results({0: 0, 1: 1}), b)


def test_metrics_of_two_definitions_are_not_compared():
    a, b = ({"benchmarks": {"docvqa": {"samples": [], "settings": {"metrics": x}}}} for x in ("harness", "official"))
    with pytest.raises(UserError, match="docvqa has the metrics of harness in A and of official in B"):
        compare(a, b)


SAMPLE = '{"number": 0, "name": "a", "group": "", "question": "q", "gold": "g", "metrics": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"benchmarks": 1}',
        '{"benchmarks": {"x": {"samples": [{"number": 0}]}}}',
        *(
            '{"benchmarks": {"x": {"samples": [%s]}}}' % (SAMPLE % metrics)
            for metrics in ("null", "{}", '{"accuracy": null}', '{"accuracy": "1"}', '{"accuracy": NaN}')
        ),
        '{"benchmarks": {"x": {"samples": [%s, %s]}}}' % ((SAMPLE % '{"accuracy": 1}',) * 2),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json holds no results .*: name the results.json of an evaluation"):
        main([str(tmp_path / "a.json")] * 2)


@pytest.mark.parametrize("name, words", [("", "is a directory; write .*/results.json"), ("x.json", "there is no file")])
def test_what_is_no_file_says_what_to_write(tmp_path, name, words):
    with pytest.raises(UserError, match=f"{words}.*") as caught:
        main([str(tmp_path / name)] * 2)
    assert "results.json" in str(caught.value)
    assert "give a directory" not in str(caught.value)


def test_difference_of_two_shares_is_newcombes():
    """Newcombe (1998), table II, (a): 56/70 − 48/80 by his method 10."""
    before, after = (Estimate(k / n, *wilson(k, n), n) for k, n in ((48, 80), (56, 70)))
    found = difference(before, after)
    assert (found.value, found.n) == (pytest.approx(0.2), 70)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
