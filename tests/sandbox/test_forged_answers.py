"""Code that writes forged lines to its result pipe gets a verdict like any other, and does not slow its judge."""

import contextlib
import os
import resource
import time

import pytest

from qwen3f.processes.killable import Killable
from qwen3f.sandbox import Case, Limits, run_tests
from qwen3f.sandbox.tiers import why_not
from qwen3f.sandbox.values import pack, unpack

RUNS = pytest.mark.skipif(
    bool(why_not("bubblewrap") and why_not("landlock")), reason=f"no sandbox here: {why_not('bubblewrap')}"
)
RAW = """
import sys
def f(x):
    sys._getframe(1).f_locals["say"].__closure__[0].cell_contents.write(LINE + b"\\n")
    return 1
LINE = """
M = 2**61 - 1  # all its multiples have the hash 0
LIMITS = Limits(seconds=3.0, cpu=2)
DEEP, DEEPER, DEEPEST = (f"b'{{\"KEY\":' + b'[' * {n} + b']' * {n} + b'}}'" for n in (60, 900, 9000))
LINES = {
    "nested": DEEP.replace("KEY", "value"),
    "nested more": DEEPER.replace("KEY", "value"),
    "nested for ever": DEEPEST.replace("KEY", "value"),
    "a complex of an integer": "b'{\"value\": {\"c\": [1' + b'0' * 400 + b', 0]}}'",
    "a complex of texts": 'b\'{"value": {"c": ["1", "2"]}}\'',
    "an integer of no digits": 'b\'{"value": {"i": "zz"}}\'',
    "an integer of no text": 'b\'{"value": {"i": [1]}}\'',
    "an integer as a float": "b'{\"value\": 1e999}'",
    "too many digits": "b'{\"value\": 1' + b'0' * 9000 + b'}'",
    "a very long integer": "b'{\"value\": {\"i\": \"0x' + b'f' * 900000 + b'\"}}'",
    "no value": "b'{}'",
    "a list": "b'[]'",
    "an error of lists": DEEPER.replace("KEY", "error"),
    "an error of many lists": DEEPEST.replace("KEY", "error"),
    "an error without a text": 'b\'{"error": null, "words": 3}\'',
    "words of lists": "b'{\"error\": \"E\", \"words\": ' + b'[' * 900 + b']' * 900 + b'}'",
    "unconfined by lists": DEEPER.replace("KEY", "unconfined"),
    "unconfined": "b'{\"unconfined\": \"' + b'x' * 9999 + b'\"}'",
    "a dict of no pairs": 'b\'{"value": {"d": [1, [2]]}}\'',
    "a set of lists": 'b\'{"value": {"s": [[1]]}}\'',
    "half a letter": 'b\'{"value": "\\\\\\\\ud800"}\'',
    "no UTF-8": 'b\'{"value": "\\xff"}\'',
}


@RUNS
@pytest.mark.parametrize("name", LINES)
def test_a_forged_line_is_a_wrong_answer_and_nothing_more(name):
    for tests in ("assert candidate(1) == 1", [Case([1], 1)]):
        verdict = run_tests(RAW + LINES[name], tests, "f", LIMITS)
        assert not verdict.passed
        assert verdict.reason in ("wrong", "error", "ended"), verdict
        assert len(verdict.detail) < 2000


def shared(tag, n):
    return {tag: [M * k for k in range(1, n)]}


def pairs(n, size):
    """Tuples that share a hash and differ only in their last item."""
    return {"s": [{"t": [1000] * size + [M * k]} for k in range(1, n)]}


FLOODS = {
    "a set": shared("s", 45_000),
    "a frozen set": shared("z", 45_000),
    "a dict": {"d": [[M * k, 0] for k in range(1, 40_000)]},
    "floats": {"s": [float(2 ** (61 * k)) for k in range(1, 16)] * 2_000},
    "few long keys": pairs(480, 400),
    "many short keys": pairs(5_000, 30),
    "sets of sets": {"s": [{"z": [M * k for k in range(1, 40)] + [M * (1_000 + j)]} for j in range(400)]},
    "many sets": [shared("s", 450) for _ in range(90)],
}


@pytest.mark.parametrize("name", FLOODS)
def test_no_value_takes_long_to_read(name):
    """If keys share a hash, each would be compared with every other: 13 s for 25,000 keys."""
    begin = time.process_time()
    with contextlib.suppress(ValueError):
        unpack(FLOODS[name])
    assert time.process_time() - begin < 2  # far less on an idle machine


@RUNS
def test_a_flood_of_equal_hashes_is_an_answer_that_is_none():
    line = "b'{\"value\":{\"s\":[' + b','.join(b'%d' % (2305843009213693951 * k) for k in range(1, 25000)) + b']}}'"
    for tests in ("assert candidate(1) == 1", [Case([1], 1)]):
        begin = time.process_time()
        verdict = run_tests(RAW + line, tests, "f", LIMITS)
        assert (verdict.reason, "share their hashes" in verdict.detail) == ("ended", True), verdict
        assert time.process_time() - begin < 2


def test_real_answers_of_thousands_of_items_are_read():
    for value in (
        set(range(-20_000, 20_000)),
        {(a, b) for a in range(100) for b in range(100)},
        {k / 7: k for k in range(-9_000, 9_000)},
        {2**k for k in range(3000)},
        {str(k): {k} for k in range(9_000)},
        {frozenset((k, k + 1)) for k in range(9_000)},
        {k * 2**40 for k in range(9_000)},
    ):
        assert unpack(pack(value)) == value


# -- many descriptors --------------------------------------------------------------------------------------------------


@pytest.fixture
def descriptors():
    """Open more descriptors than select() can take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this process may not open 2,048 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@RUNS
def test_a_process_with_many_open_files_can_judge(descriptors):
    assert run_tests("def f(x): return x", [Case([1], 1)], "f").passed
    assert run_tests("import time\ndef f(x): time.sleep(60)", [Case([1], 1)], "f", Limits(seconds=0.5)).reason == "late"


def test_a_process_with_many_open_files_can_call(descriptors):
    with Killable(1, 20.0) as one:
        assert one.call("os.path:basename", p="a/b").value == "b"
