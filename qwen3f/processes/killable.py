"""Runs functions in separate processes. A call that exceeds its deadline is killed with its process.

It is for work that may hang or take all memory. A thread could not be killed; a time limit by signal does not interrupt
C code, and works only in the main thread. Arguments and results are lines of JSON, so that no output of such a process
is executed here.

Many short calls go to a process together, in one line, since a message of its own would take longer than the call. Each
answer still comes in its own line, when its call is done, so every call has its own deadline.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from qwen3f.polling import ready

LINE_BYTES = 1 << 20  # limit for a result; a longer one is a failure
MOST = 16  # calls that a process gets at once
START_SECONDS = 60.0  # limit for a process to start and import the function


@dataclasses.dataclass(frozen=True)
class Outcome:
    """value: what the function returned, None if it failed. failure: why it failed, "" if it succeeded."""

    value: Any = None
    failure: str = ""


class Killable:
    """Worker processes that call functions given as "module:function"; a context manager. Threads may share it.

    count: number of processes; each is started when it is first needed. deadline: seconds per call, counted from when
    its process has started and loaded the function's module and `modules`. If this process is killed, running calls
    are killed too.
    """

    def __init__(self, count: int, deadline: float) -> None:
        self.deadline = deadline
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)
        self._count, self._threads = count, ThreadPoolExecutor(count, thread_name_prefix="killable")
        self._lock, self._children = threading.Lock(), set[_Child]()

    def call(self, function: str, modules: Sequence[str] = (), /, **arguments: Any) -> Outcome:
        """Call the function with `arguments`; waits for a free process. Never raises for a call that fails or is late.

        modules: to import before the deadline counts; missing ones are ignored.
        """
        (outcome,) = self._calls(function, modules, [arguments])
        return outcome

    def map(self, function: str, arguments: Sequence[dict[str, Any]], modules: Sequence[str] = ()) -> list[Outcome]:
        """The outcomes of a call of `function` with each of `arguments`, in order; in all processes at once.

        If a process is killed, its calls that had not begun are made again, by another one.
        """
        found: dict[int, Outcome] = {}
        most = MOST
        while left := [number for number in range(len(arguments)) if number not in found]:
            batches = list(_batches(left, self._count, most))
            several = self._threads.map(
                lambda batch: self._calls(function, modules, [arguments[number] for number in batch]), batches
            )
            for batch, outcomes in zip(batches, several):
                found.update(zip(batch, outcomes))
            most = 1  # what is left came after a call that ended its process; some of it may do so too
        return [found[number] for number in range(len(arguments))]

    def _calls(self, function: str, modules: Sequence[str], arguments: Sequence[dict[str, Any]]) -> list[Outcome]:
        """The outcomes of calls, one after the other in one process, up to the first that ends the process."""
        child, sound = self._free.get(), False
        try:
            if child is not None and not child.alive():
                self._end(child)
                child = None
            child = child or self._started()
            outcomes, sound = child.calls(function, modules, arguments, self.deadline)
            return outcomes
        finally:
            if child is not None and not sound:  # else, after Ctrl-C, the next call would read this call's answer
                self._end(child)
                child = None
            self._free.put(child)

    def close(self) -> None:
        """Ends the processes; more calls do nothing."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            children, self._children = self._children, set()
        for child in children:
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _started(self) -> "_Child":
        child = _Child()
        with self._lock:
            self._children.add(child)
        return child

    def _end(self, child: "_Child") -> None:
        child.kill()
        with self._lock:
            self._children.discard(child)


class _Child:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen3f.processes.killable_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # its own process group, so that its children can be killed with it
        )
        self._rest = b""

    def alive(self) -> bool:
        return self._process.poll() is None

    def calls(
        self, function: str, modules: Sequence[str], arguments: Sequence[dict[str, Any]], deadline: float
    ) -> tuple[list[Outcome], bool]:
        """(the outcomes, up to the first call that ended the process; whether the process may be used again)."""
        line = json.dumps([function, list(modules), arguments]).encode() + b"\n"
        outcomes: list[Outcome] = []
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            limit, what = START_SECONDS, " to start and import"
            self._line(time.monotonic() + limit)  # an empty line: the imports are done
            limit, what = deadline, ""
            for _ in arguments:
                found = json.loads(self._line(time.monotonic() + limit))
                outcomes.append(Outcome(found.get("value"), found.get("failure", "")))
        except TimeoutError:
            return [*outcomes, Outcome(failure=f"took longer than {limit:g} s{what}")], False
        except (OSError, ValueError) as error:
            return [*outcomes, Outcome(failure=f"its process ended: {error}")], False
        return outcomes, True

    def _line(self, until: float) -> bytes:
        out = self._process.stdout
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not ready(out.fileno(), select.POLLIN, left):
                raise TimeoutError
            if not (more := os.read(out.fileno(), 1 << 16)):
                raise OSError(f"exit code {self._process.wait()}")
            self._rest += more
            if len(self._rest) > LINE_BYTES:
                raise ValueError(f"its answer has more than {LINE_BYTES:,} bytes")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # closing stdin may flush unwritten input
                pipe.close()


def _batches(numbers: Sequence[int], count: int, most: int) -> Iterator[Sequence[int]]:
    """Cuts numbers into batches of at most `most` for `count` processes. The last ones are short, so that processes end
    at about the same time, even if some calls take longer than others."""
    begin = 0
    while left := len(numbers) - begin:
        size = max(1, min(most, left // (4 * count)))
        yield numbers[begin : begin + size]
        begin += size


def shared(count: int, deadline: float) -> Callable[[], Killable]:
    """A function that makes one Killable at its first call, and closes it when this process exits."""
    lock, made = threading.Lock(), []

    def get() -> Killable:
        with lock:
            if not made:
                made.append(Killable(count, deadline))
                atexit.register(made[0].close)
            return made[0]

    return get
