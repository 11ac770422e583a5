"""The parent's handle on a sandboxed process: messages with deadlines, and an end that leaves nothing behind."""

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen3f.polling import ready
from qwen3f.sandbox.tiers import Tier, find_python, readable, wrapper

_HERE = Path(__file__).parent
_CHILD = ("values", "confine", "child")  # files of this package, which need no other
# The sandbox's files may not be readable in it: they go in by the pipe, as modules.
_BOOT = """
import json, sys, types
for name, text in json.loads(sys.stdin.buffer.readline()):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main()
"""
_FIRST_USER, _USERS, _JOBS = 40_000, 19_200, 64  # below 65,536, where a container's map of users may end


class ConfineError(RuntimeError):
    """A sandboxed process ended, was late, or sent something that is no message."""


class Late(ConfineError):
    """It took longer than it may."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a job, which is one or two processes, may use.

    Attributes:
      seconds: by the clock, of both processes together, once they are up. cpu: seconds of processor time of each.
      memory: bytes of address space of each. message: bytes of one message.
      processes: processes and threads of the job's user, if it has a user of its own.
      start: seconds until a process must be up.
    """

    seconds: float = 10.0
    cpu: int = 5
    memory: int = 512 << 20
    message: int = 1 << 20
    processes: int = 32
    start: float = 30.0


LIMITS = Limits()

_lock, _free = threading.Lock(), queue.SimpleQueue[int]()
_made = False


@contextlib.contextmanager
def user() -> Iterator[int]:
    """The id of a user that no other job of this process has; 0 if this process may not choose a user, which takes
    root's rights. Waits while all are in use."""
    global _made
    if os.geteuid():
        yield 0
        return
    with _lock:
        if not _made:
            first = _FIRST_USER + os.getpid() * _JOBS % _USERS
            for number in range(_JOBS):
                _free.put(first + number)
            _made = True
    number = _free.get()
    try:
        yield number
    finally:
        _free.put(number)


class Confined:
    """A sandboxed process; a context manager.

    role: "code" or "tests"; see child.py, which gets `order`. number: the id of its user; 0: this process's user. The
    first message, {"up": True}, is sent before any judged code runs.
    """

    def __init__(self, tier: Tier, role: str, number: int, limits: Limits = LIMITS, **order: Any) -> None:
        python = find_python()
        drop = {"user": number, "group": number, "extra_groups": []} if number else {}
        self._limits, self._rest = limits, b""
        self._process = subprocess.Popen(
            [*wrapper(tier, python), python.program, "-I", "-S", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
            **drop,
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        confine = {
            "limits": {
                "memory": limits.memory,
                "cpu": limits.cpu,
                "processes": limits.processes if number else 0,
            },
            "seconds": limits.start + limits.seconds,
            "parent": 0 if tier == "bubblewrap" else os.getpid(),
            "read": readable(python) if tier == "landlock" else [],
            "filtered": tier != "none",
        }
        try:
            self.send(
                [(f"qwen3f.sandbox.{name}", _HERE.joinpath(f"{name}.py").read_text()) for name in _CHILD], limits.start
            )
            self.send({"role": role, "confine": confine, **order}, limits.start)
        except BaseException:
            self.close()
            raise

    def send(self, message: Any, seconds: float) -> None:
        """Raises Late, or ConfineError if it has ended."""
        data, until = memoryview(json.dumps(message).encode() + b"\n"), time.monotonic() + seconds
        pipe = self._process.stdin.fileno()
        try:
            while data:
                left = until - time.monotonic()
                if left <= 0 or not ready(pipe, select.POLLOUT, left):
                    raise Late(f"took longer than {seconds:.3g} s to read")
                data = data[os.write(pipe, data) :]
        except OSError as error:
            raise ConfineError(f"it has ended ({self._process.poll()})") from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises Late, or ConfineError if it has ended or says something else."""
        until, out = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not ready(out, select.POLLIN, left):
                raise Late(f"took longer than {seconds:.3g} s")
            if not (more := os.read(out, 1 << 16)):
                raise ConfineError("it ended without an answer")
            self._rest += more
            if len(self._rest) > self._limits.message:
                raise ConfineError(f"it said more than {self._limits.message:,} bytes at once")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfineError(f"it said what is no message: {error}") from error
        if not isinstance(message, dict):
            raise ConfineError("it said what is no message")
        if isinstance(why := message.get("unconfined"), str):
            raise ConfineError(why[:300])
        return message

    def close(self) -> None:
        """Kill it and all that it may have started. In bubblewrap that dies with its namespace; under landlock it can
        start nothing; under "none" only its own process group is killed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
