"""Whether code passes its tests: judged by the parent, from plain values, with the code in a process of its own."""

import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qwen3f.sandbox.confined import LIMITS, Confined, ConfineError, Late, Limits, user
from qwen3f.sandbox.tiers import Tier, find_tier
from qwen3f.sandbox.values import pack, unpack

WORKERS = max(1, os.cpu_count() or 1)
_at_a_time = threading.BoundedSemaphore(WORKERS)  # more jobs would only steal each other's seconds


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether code passed its tests.

    Attributes:
      passed: every test was right.
      reason: "passed"; "wrong": a test failed; "error": the code or a test raised; "late": it took too long; or
        "ended": a process died or sent something that is no answer.
      detail: in words, for a log; parts of it may be the code's.
      seconds: by the clock, start included. tier: of the sandbox.
    """

    passed: bool
    reason: str
    detail: str = ""
    seconds: float = 0.0
    tier: Tier = "bubblewrap"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the entry point and what it must return. A list equals a tuple of the same items; numbers are compared
    by value, floats with the relative tolerance `relative`."""

    arguments: Sequence[Any]
    expected: Any
    relative: float = 1e-9


Tests = str | Sequence[Case]


def run_tests(
    code: str,
    tests: Tests,
    entry_point: str,
    limits: Limits = LIMITS,
    *,
    setup: str = "",
    tier: str = "",
) -> Verdict:
    """Runs `code` in a sandbox, calls its function `entry_point`, and judges what it returns.

    Args:
      code: Python text of a model. It never sees the tests.
      tests: cases, which this process compares. Or a Python text of asserts, which runs in a sandbox of its own and
        calls the function by its name or as `candidate`; if it defines check(candidate), that is called.
      entry_point: the function's name.
      setup: Python text that runs before the tests, such as helpers. A name that tests use and neither text defines is
        called in the code's process: its result is then the judged code's own, and may be forged.
      tier: of tiers.TIERS; default: the best that works here.

    As many calls run at a time as there are processors; others wait. Raises UserError if no sandbox works here.
    """
    found = find_tier(tier)
    with _at_a_time, user() as number:
        begin = time.monotonic()
        try:
            with Confined(found, "code", number, limits, code=code) as child:
                judge = _judge_text if isinstance(tests, str) else _judge_cases
                verdict = judge(child, _Job(tests, entry_point, setup, found, number, limits))
        except Late as error:
            verdict = Verdict(False, "late", str(error))
        except ConfineError as error:
            verdict = Verdict(False, "ended", str(error))
        return dataclasses.replace(verdict, seconds=time.monotonic() - begin, tier=found)


@dataclasses.dataclass(frozen=True)
class _Job:
    tests: Tests
    entry_point: str
    setup: str
    tier: Tier
    number: int
    limits: Limits


def _judge_cases(child: Confined, job: _Job) -> Verdict:
    left = _begin(child, job)
    if isinstance(left, Verdict):
        return left
    for case in job.tests:
        call = {"name": job.entry_point, "arguments": pack(list(case.arguments)), "named": pack({})}
        child.send(call, left())
        answer = child.receive(left())
        if "error" in answer:
            return _raised(answer)
        with _answered():
            value = unpack(answer["value"])
        if not same(value, case.expected, case.relative):
            detail = f"{job.entry_point}{_shown(tuple(case.arguments))} gave {_shown(value)}"
            return Verdict(False, "wrong", detail)
    return Verdict(True, "passed")


def _judge_text(child: Confined, job: _Job) -> Verdict:
    order = {"tests": job.tests, "setup": job.setup, "entry_point": job.entry_point}
    with Confined(job.tier, "tests", job.number, job.limits, **order) as tester:
        tester.receive(job.limits.start)
        left = _begin(child, job)
        if isinstance(left, Verdict):
            return left
        while True:
            message = tester.receive(left())
            if message.get("passed") is True:
                return Verdict(True, "passed")
            if "passed" in message:
                reason = "wrong" if message.get("error") == "AssertionError" else "error"
                return dataclasses.replace(_raised(message), reason=reason)
            child.send({key: message.get(key) for key in ("name", "arguments", "named")}, left())
            answer = child.receive(left())
            if "error" in answer:
                error, words = _said(answer)
                answer = {"error": error, "words": words}
            else:
                with _answered():
                    answer = {"value": pack(unpack(answer["value"]))}
            tester.send(answer, left())


def _begin(child: Confined, job: _Job) -> Verdict | Callable[[], float]:
    """Wait until the code is loaded. Returns a function that gives the seconds left; or a Verdict if the code
    raised."""
    child.receive(job.limits.start)
    until = time.monotonic() + job.limits.seconds

    def left() -> float:
        return max(0.0, until - time.monotonic())

    ready = child.receive(left())
    return _raised(ready) if "error" in ready else left


def _raised(answer: Mapping[str, Any]) -> Verdict:
    error, words = _said(answer)
    return Verdict(False, "error", f"{error}: {words}")


def _said(answer: Mapping[str, Any]) -> tuple[str, str]:
    """(name, message) of the exception in an answer. Raises ConfineError if they are no strings."""
    found = answer.get("error"), answer.get("words", "")
    if not all(isinstance(text, str) for text in found):
        raise ConfineError("it said what is no exception")
    return found[0][:100], found[1][:300]


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """A context for reading an answer. Any exception in it becomes a ConfineError: the code can write to the pipe
    itself, so an answer may be anything."""
    try:
        yield
    except Exception as error:  # see the docstring
        raise ConfineError(f"its answer is no value: {error}") from error


def _shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # an integer has more digits than may be written
        return f"a {type(value).__name__} with a very long integer"


def same(value: Any, expected: Any, relative: float = 1e-9) -> bool:
    """Whether two plain values are equal as in JSON: a list equals a tuple of the same items, True is not 1."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        try:
            return value == expected or math.isclose(value, expected, rel_tol=relative)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(same(a, b, relative) for a, b in zip(value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k], relative) for k in expected)
    return type(value) is type(expected) and value == expected


def run_all(
    jobs: Iterable[tuple[str, Tests, str]], limits: Limits = LIMITS, *, tier: str = "", workers: int = WORKERS
) -> Iterator[Verdict]:
    """run_tests of each (code, tests, entry point), in order, `workers` at a time. At most 2 · workers jobs are taken
    ahead of the results, so that a slow judge slows down the producer of `jobs`."""
    find_tier(tier)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Verdict]] = []
        for job in jobs:
            waiting.append(pool.submit(run_tests, *job, limits, tier=tier))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
