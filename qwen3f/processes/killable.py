"""Functions run in processes of their own, each call with a deadline, after which its process is killed.

For work that may hang or take all memory: in a thread it could not be ended, and a time limit by signal ends no C code
and works in no thread. Arguments and results are JSON, a line each; so nothing that a process writes is run here.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from qwen3f.polling import ready

LINE_BYTES = 1 << 20  # of a result; a longer one is a failure
START_SECONDS = 60.0  # for a process to come up and import the function


@dataclasses.dataclass(frozen=True)
class Outcome:
    """value: what the function returned, None if it failed. failure: why, "" if it did not."""

    value: Any = None
    failure: str = ""


class Killable:
    """Worker processes that call "module:function" of this Python; a context manager. Threads may share it.

    count: processes, started when they are first needed. deadline: seconds of a call, once its process is up and has
    loaded the function's module and further `modules`. If this process is killed, calls under way are, too.
    """

    def __init__(self, count: int, deadline: float) -> None:
        self.deadline = deadline
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="killable")
        self._lock, self._children = threading.Lock(), set[_Child]()

    def call(self, function: str, modules: Sequence[str] = (), /, **arguments: Any) -> Outcome:
        """The function's result. Waits for a free process; a call that fails or is late costs only itself."""
        child, sound = self._free.get(), False
        try:
            if child is not None and not child.alive():
                self._end(child)
                child = None
            child = child or self._started()
            outcome, sound = child.call(function, modules, arguments, self.deadline)
            return outcome
        finally:
            if child is not None and not sound:  # of a call that Ctrl-C ended the answer would be the next one's
                self._end(child)
                child = None
            self._free.put(child)

    def map(self, calls: Sequence[tuple[str, dict[str, Any]]], modules: Sequence[str] = ()) -> list[Outcome]:
        """The outcomes of (function, arguments), in order; as many at a time as there are processes."""
        return list(self._threads.map(lambda call: self.call(call[0], modules, **call[1]), calls))

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
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self._rest = b""

    def alive(self) -> bool:
        return self._process.poll() is None

    def call(
        self, function: str, modules: Sequence[str], arguments: dict[str, Any], deadline: float
    ) -> tuple[Outcome, bool]:
        """(outcome, whether the process may be used again)."""
        line = json.dumps([function, list(modules), arguments]).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            self._line(time.monotonic() + START_SECONDS)  # it has imported what it needs
            found = json.loads(self._line(time.monotonic() + deadline))
        except TimeoutError:
            return Outcome(failure=f"took longer than {deadline:g} s"), False
        except (OSError, ValueError) as error:
            return Outcome(failure=f"its process ended: {error}"), False
        if "failure" in found:
            return Outcome(failure=found["failure"]), True
        return Outcome(found["value"]), True

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
            with contextlib.suppress(OSError):  # what was not yet written
                pipe.close()


def shared(count: int, deadline: float) -> Callable[[], Killable]:
    """A function that makes one Killable at its first call, and ends it with this process."""
    lock, made = threading.Lock(), []

    def get() -> Killable:
        with lock:
            if not made:
                made.append(Killable(count, deadline))
                atexit.register(made[0].close)
            return made[0]

    return get
