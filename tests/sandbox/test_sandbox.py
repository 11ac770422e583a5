"""The sandbox against attacks, on both tiers: none wins, none outlives its job, none disturbs what runs beside it."""

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwen3f.errors import UserError
from qwen3f.sandbox import Case, Limits, run_all, run_tests, tiers
from qwen3f.sandbox import confined as confined_module
from qwen3f.sandbox.confine import filter_program
from qwen3f.sandbox.run import same
from qwen3f.sandbox.values import pack, unpack
from tests.sandbox import attacks

SHORT = Limits(seconds=1.0, cpu=1)
BOTH = ("bubblewrap", "landlock")


def needs(tier):
    reason = tiers.why_not(tier)
    return pytest.mark.skipif(bool(reason), reason=f"tier {tier} does not work here: {reason}")


@pytest.fixture(params=[pytest.param(tier, marks=needs(tier)) for tier in BOTH])
def tier(request):
    return request.param


DOUBLE = "def f(x):\n    return [2 * y for y in x]\n"


# -- what is right passes ----------------------------------------------------------------------------------------------


def test_right_code_passes_and_wrong_code_does_not(tier):
    good, bad = [Case(([1, 2],), [2, 4]), Case(((),), [])], [Case(([1],), [3])]
    assert run_tests(DOUBLE, good, "f", tier=tier).reason == "passed"
    assert run_tests(DOUBLE, bad, "f", tier=tier).reason == "wrong"
    assert run_tests(DOUBLE, "assert f([1]) == [2]\nassert candidate([2]) == [4]", "f", tier=tier).passed
    verdict = run_tests(DOUBLE, "def check(g):\n    assert g([1]) == [3], 'no'", "f", tier=tier)
    assert (verdict.passed, verdict.reason, verdict.detail, verdict.tier) == (
        False,
        "wrong",
        "AssertionError: no",
        tier,
    )
    assert run_tests("def f(:", good, "f", tier=tier).detail.startswith("SyntaxError")
    assert run_tests("", good, "f", tier=tier).detail == "KeyError: 'f'"
    assert run_tests("def f(x): return 1 / 0", good, "f", tier=tier).detail == "ZeroDivisionError: division by zero"


def test_the_standard_library_threads_and_exceptions_work(tier):
    code = """
import collections, concurrent.futures, dataclasses, datetime, decimal, fractions, heapq, itertools, math, random, re
import statistics, string, typing, hashlib, json, copy, functools, operator, bisect, threading, asyncio
def f(x):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return sum(pool.map(math.factorial, range(x)))
def g(x):
    raise ValueError("bad " + x)
"""
    tests = "assert f(4) == 10\ntry:\n    g('y')\nexcept ValueError as e:\n    said = str(e)\nassert said == 'bad y'"
    verdict = run_tests(code, tests, "f", tier=tier)
    assert verdict.passed, verdict


def test_helpers_of_the_tests_are_their_own_if_they_are_given(tier):
    """Without `setup`, a helper that the tests use is the code's own, which may lie."""
    tests = "def check(c):\n    assert helper(c(1)) == 4"
    setup = "def helper(x): return x * x"
    assert run_tests("def f(x): return 2", tests, "f", setup=setup, tier=tier).passed
    liar = "def f(x): return 9\ndef helper(x): return 4"
    assert not run_tests(liar, tests, "f", setup=setup, tier=tier).passed
    assert run_tests(liar, tests, "f", tier=tier).passed


def test_values_travel_as_they_are():
    values = [None, True, 1, -(10**30), 1.5, float("inf"), "é\ud800", [1, [2]], (1, (2,)), {"a": 1}, {1: 2, (1, 2): []},
              {1, 2}, frozenset({3}), b"\x00\xff", 1 + 2j, {"t": [1]}, {"f": "nan"}]  # fmt: skip
    for value in values:
        got = unpack(pack(value))
        assert got == value
        assert type(got) is type(value)

    for value in ([object()], object(), range(3), DOUBLE.__len__, type, (1).__class__):
        with pytest.raises(TypeError, match="none of the plain built-in types"):
            pack(value)
    for wrong in ({"q": 1}, {"t": 1}, {"a": 1, "b": 2}, {"f": "1"}, {"c": [1, 2, 3]}, {"d": [1]}, {"s": [[1]]}):
        with pytest.raises((ValueError, TypeError)):
            unpack(wrong)


def test_equality_is_that_of_json():
    assert same((1, [2.0]), [1.0, (2,)])
    assert same({"a": 0.1 + 0.2}, {"a": 0.3})
    for a, b in (
        (True, 1),
        ("1", 1),
        (None, 0),
        ([1], [1, 2]),
        (float("nan"), float("nan")),
        (10**400, 1.5),
        ({1}, [1]),
    ):
        assert not same(a, b)


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_the_list_is_long_enough():
    assert len(attacks.ALL) + len(attacks.CALLS) >= 40


@pytest.mark.parametrize("name", attacks.ALL)
def test_no_attack_wins(name, tier, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", attacks.SECRET)
    begin, before = time.monotonic(), set(Path("/tmp").glob("[0-9x]*"))
    limits = Limits() if name in attacks.ESCAPES else SHORT
    # With cases this process compares the results: no second sandboxed process runs the tests.
    by_cases = name in attacks.FLOODS or name in attacks.ESCAPES
    tests = [Case((), attacks.SECRET)] if by_cases else attacks.TESTS
    verdict = run_tests(attacks.ALL[name], tests, "f", limits, tier=tier)
    assert not verdict.passed
    assert verdict.reason in ("wrong", "error", "late", "ended")
    assert "the-answer-was-readable" not in verdict.detail
    if name in attacks.ESCAPES:
        assert verdict.reason == "error", verdict
    assert time.monotonic() - begin < 60  # a hang is killed; how fast is a matter of the machine
    assert set(Path("/tmp").glob("[0-9x]*")) == before
    deadline = time.monotonic() + 30
    while (left := _processes_of_jobs()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def _processes_of_jobs():
    """Live processes with a user id of this process's jobs. Dead ones may wait until the first process reaps them."""
    first = confined_module._FIRST_USER + os.getpid() * confined_module._JOBS % confined_module._USERS
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            mine = first <= place.stat().st_uid < first + confined_module._JOBS
            if mine and (place / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append((place / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_system_calls_that_are_not_listed_are_denied(tier):
    """Called by number with ctypes: each fails with EPERM (1) or ENOSYS (38). Other errors would mean it was tried."""
    tests = "\n".join(
        [
            f"r = f({number})\nassert r[0] == -1 and r[1] in (1, 38), ({name!r}, r)"
            for name, number in attacks.CALLS.items()
        ]
    )
    verdict = run_tests(attacks.SYSTEM_CALLS, tests, "f", tier=tier)
    assert verdict.passed, verdict


def test_the_32_bit_calls_of_x86_are_denied():
    program = filter_program("x86_64", 7)
    assert program[1][3] == 0xC000003E  # another architecture
    assert program[2][3] == 0x80000000  # ends the process
    assert program[4] == (0x35, 0, 1, 0x40000000)
    assert program[-1][3] == 0x50001
    assert all(0 <= jump < 256 for line in program for jump in line[1:3])
    with pytest.raises(OSError, match="no list of system calls for riscv64"):
        filter_program("riscv64", 7)


def test_only_what_is_needed_can_be_read(tier):
    """Code cannot read /etc/passwd, /root or this repository, and in a namespace it sees only its own processes."""
    code = """
import os
def f(path):
    try: return bool(os.listdir(path)) if os.path.isdir(path) else bool(open(path).read(1))
    except OSError: return False
def pids():
    try: return len([n for n in os.listdir("/proc") if n.isdigit()])
    except OSError: return 0
"""
    here = str(Path(__file__).parent)
    tests = "\n".join(f"assert not f({path!r})" for path in ("/etc/passwd", "/etc/shadow", "/root", "/home", here))
    verdict = run_tests(code, tests + "\nassert f('/usr/lib')\nassert pids() <= 2, pids()", "f", tier=tier)
    assert verdict.passed, verdict


def test_a_job_leaves_nothing_for_the_next(tier):
    code = """
import builtins, os, sys
seen = [hasattr(builtins, "mark"), os.path.exists("/tmp/mark")]
builtins.mark = 1
try: open("/tmp/mark", "w").write("x")
except OSError: pass
def f(): return seen
"""
    for _ in range(2):
        assert run_tests(code, [Case((), [False, False])], "f", tier=tier).passed


def test_bombs_do_not_disturb_their_neighbours(tier):
    """Right code passes within its limits while other jobs take all that they can."""
    names = ("fork bomb that forgives", "memory by and by", "thread bomb", "a loop that ignores signals", "answers")
    jobs = [(attacks.ALL[name], attacks.TESTS, "f") for name in names]
    good = (DOUBLE, [Case(([3],), [6])], "f")
    mixed = [job for bomb in jobs for job in (bomb, good)]
    found = list(run_all(mixed, Limits(seconds=4.0, cpu=1), tier=tier))
    assert [verdict.passed for verdict in found] == [False, True] * len(jobs)


def test_the_job_dies_with_its_parent(tier):
    """A judging process is killed; then the processes that it had started are gone too."""
    program = (
        "from qwen3f.sandbox import run_tests, Limits\n"
        f"run_tests('import time\\ntime.sleep(600)', [], 'f', Limits(seconds=600, start=600), tier={tier!r})\n"
    )
    judge = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60

    def confined(of=None):
        """Processes under seccomp that descend from the judge, or those of them that are left."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if "Seccomp:\t2" in (place / "status").read_text():
                    found += [place.name] if (place.name in of if of else _descends(place, judge.pid)) else []
            except OSError:
                continue
        return found

    while not (seen := confined()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert seen
    judge.kill()
    judge.wait()
    while confined(seen) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert confined(seen) == []


def _descends(place, ancestor):
    while True:
        parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        if parent in (0, 1):
            return False
        if parent == ancestor:
            return True
        place = Path(f"/proc/{parent}")


def test_jobs_are_read_no_further_ahead_than_they_are_run(tier):
    read = []

    def jobs():
        for n in range(30):
            read.append(n)
            yield (DOUBLE, [Case(([n],), [2 * n])], "f")

    verdicts = run_all(jobs(), tier=tier, workers=2)
    for done in range(1, 31):
        assert next(verdicts).passed
        assert len(read) <= done + 4


def test_many_threads_may_judge_at_once(tier):
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(run_tests(DOUBLE, [Case(([n],), [2 * n])], "f", tier=tier)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.passed for verdict in found] == [True] * 6


# -- the tiers ---------------------------------------------------------------------------------------------------------


def test_without_a_sandbox_nothing_is_run_unless_that_is_named(monkeypatch):
    monkeypatch.setattr(tiers, "why_not", lambda tier: "" if tier == "none" else "not here")
    with pytest.raises(UserError, match="none works here.*bubblewrap: not here; landlock: not here.*sandbox=none runs"):
        run_tests(DOUBLE, [], "f")
    with pytest.raises(UserError, match="sandbox=bubblewrap does not work here: not here"):
        run_tests(DOUBLE, [], "f", tier="bubblewrap")
    monkeypatch.setenv(tiers.VARIABLE, "none")
    verdict = run_tests(DOUBLE, [Case(([1],), [2])], "f")
    assert (verdict.passed, verdict.tier) == (True, "none")
    monkeypatch.setenv(tiers.VARIABLE, "jail")
    with pytest.raises(UserError, match="sandbox=jail: write auto, bubblewrap, landlock, none"):
        run_tests(DOUBLE, [], "f")


def test_a_missing_bwrap_is_said(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "apt-get install bubblewrap" in tiers.why_not.__wrapped__("bubblewrap")
