"""Right code of every kind passes and nearly right code does not, since the returned values themselves are compared."""

import collections
import enum
import math

import pytest

from qwen3f.sandbox import Case, run_tests
from qwen3f.sandbox.run import same
from qwen3f.sandbox.tiers import why_not
from qwen3f.sandbox.values import pack, unpack

RUNS = pytest.mark.skipif(
    bool(why_not("bubblewrap") and why_not("landlock")), reason=f"no sandbox here: {why_not('bubblewrap')}"
)
ONE = "def f(x):\n    return x\n"
POINT = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 0\n"
CHECK = "def check(c):\n    assert c(1) == 1\n"
DEEP = "def f(n):\n    return [] if n == 0 else [f(n - 1)]"


@RUNS
@pytest.mark.parametrize(
    "code, tests",
    [
        (POINT + "def f(a): return P(a).x", [Case([1], 1)]),
        (ONE, POINT + "assert f(P(1).x) == 1"),
        ("def g(x: int): pass\ndef f(a): return g.__annotations__['x'] is int", [Case([1], True)]),
        (ONE, "def g(x: int): pass\nassert f(1) == 1 and g.__annotations__['x'] is int"),
        ("from __future__ import annotations\ndef f(a: b): return f.__annotations__['a']", [Case([1], "b")]),
        (
            "import pickle\nclass P: pass\ndef f(a): return type(pickle.loads(pickle.dumps(P()))) is P",
            [Case([1], True)],
        ),
        ("import typing\n" + POINT + "def f(a): return typing.get_type_hints(P)['x'] is int", [Case([1], True)]),
        ("import enum\nclass C(enum.Enum):\n    A = 1\ndef f(a): return C(a).name", [Case([1], "A")]),
    ],
)
def test_code_and_tests_are_modules_without_this_packages_future(code, tests):
    verdict = run_tests(code, tests, "f")
    assert verdict.passed, verdict


@RUNS
def test_neither_process_has_the_others_module():
    seen = "import sys\ndef f(): return [name in sys.modules for name in ('solution', 'tests', '__main__')]"
    assert run_tests(seen, [Case((), [True, False, False])], "f").passed
    text = "import sys\nassert [n in sys.modules for n in ('solution', 'tests')] == [False, True]\nassert f(1) == 1"
    assert run_tests(ONE, text, "f").passed


@RUNS
@pytest.mark.parametrize(
    "code, tests, entry, setup, passed",
    [
        ("def check(n): return n + 1", "assert check(1) == 2", "check", "", True),
        ("def check(n): return n + 1", "assert check(1) == 3", "check", "", False),
        (ONE + "def check(x): return x == 1", "assert candidate(1)\nassert check(1)", "f", "", True),
        (ONE, "assert f(1) == 1\nassert check(1)", "f", "def check(x): return 1 // (x == 1)", True),
        (ONE, CHECK, "f", "", True),
        ("def f(x): return 2", CHECK, "f", "", False),
        ("def check(x): return x", CHECK, "check", "", True),
        ("def check(x): return 2", CHECK, "check", "", False),
        ("def f(x): return 2", CHECK, "f", "def check(c): pass", False),
    ],
)
def test_the_tests_own_check_is_called_and_no_other(code, tests, entry, setup, passed):
    verdict = run_tests(code, tests, entry, setup=setup)
    assert verdict.passed is passed, verdict


def test_of_a_subclass_the_built_in_value_travels():
    """So a Counter equals a dict, as it does within one program. Methods of the subclass have no effect."""

    class Liar(dict):
        def items(self):
            return [("a", 9)]

        def __eq__(self, other):
            return True

    class Word(str):
        def __str__(self):
            return "other"

    Point, Colour = collections.namedtuple("Point", "x y"), enum.IntEnum("Colour", "RED")
    counts = collections.defaultdict(int, a=1)
    values = [collections.Counter("a"), counts, collections.OrderedDict(a=1), Liar(a=1), Point(1, [2]), Colour.RED]
    plain = [{"a": 1}, {"a": 1}, {"a": 1}, {"a": 1}, (1, [2]), 1]
    for value, expected in zip([*values, [Word("w")]], [*plain, ["w"]], strict=True):
        got = unpack(pack(value))
        assert (got, type(got)) == (expected, type(expected))


@RUNS
def test_a_counter_equals_a_dict():
    code = "from collections import Counter\ndef f(s):\n    return Counter(s)\n"
    assert run_tests(code, "def check(c):\n    assert c('aab') == {'a': 2, 'b': 1}\n", "f").passed
    assert not run_tests(code, "def check(c):\n    assert c('aab') == {'a': 1, 'b': 1}\n", "f").passed


@RUNS
def test_integers_of_any_size_go_both_ways():
    factorial = "import math\ndef f(n): return math.factorial(n)"
    assert run_tests(factorial, "import math\nassert f(2000) == math.factorial(2000)", "f").passed
    assert run_tests(factorial, [Case([2000], math.factorial(2000))], "f").passed
    assert run_tests("def f(n): return -n", [Case([10**5000], -(10**5000))], "f").passed
    verdict = run_tests("def f(n): return -n", [Case([10**5000], 10**5000)], "f")
    assert (verdict.passed, verdict.reason) == (False, "wrong")
    for value in (0, -1, 2**63, 2**64, -(2**64), 2**64 - 1, 10**4299, 10**4300, -(10**9000)):
        assert unpack(pack([value, {value: (value,)}])) == [value, {value: (value,)}]


@RUNS
@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt"])
def test_no_exception_ends_a_loop_of_the_tests_in_silence(name):
    code = f"def f(x): raise {name}('done')"
    for tests in (
        "assert all(map(candidate, [1, 2, 3]))",
        "for got, want in zip(map(candidate, [1, 2]), [2, 3]):\n    assert got == want",
        "assert not list(filter(candidate, [1, 2]))",
        "assert list(iter(lambda: candidate(1), 2)) == []",
    ):
        verdict = run_tests(code, tests, "f")
        assert (verdict.passed, verdict.detail) == (False, "RuntimeError: done"), verdict


@RUNS
def test_integers_are_equal_to_the_last_digit():
    assert not run_tests("def f(n): return 10**9 + 1", [Case([1], 10**9)], "f").passed
    assert not run_tests("def f(n): return [10**18 + 12345]", [Case([1], [10**18])], "f").passed
    assert run_tests("def f(n): return 1e9 + 0.1", [Case([1], 10**9)], "f").passed
    assert not same(10**9 + 1, 10**9)
    assert not same({"a": (10**10,)}, {"a": [10**10 + 1]})
    for close in ((10**9 + 1.0, 10**9), (10**9, 10**9 + 1.0), (1e9 + 1, 1e9)):
        assert same(*close)
    assert not same(1.1, 1)
    assert not same(1, 1.1)


@RUNS
def test_values_of_every_depth_that_can_be_sent_can_be_read():
    assert run_tests(DEEP, "assert f(40) == f(40)\nassert f(50)", "f").passed
    assert run_tests(DEEP, "f(51)", "f").detail.startswith("TypeError: a value that is nested too deeply")
    nested = complex(1, float("nan"))
    for _ in range(50):
        nested = (nested,)
    assert repr(unpack(pack(nested))) == repr(nested)
