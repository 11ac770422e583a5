"""The program of a `killable` process, until the pipe closes: reads a line of calls, and writes a line for each result.

All lines are JSON, except for an empty one before the results of a line of calls.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen3f.polling import ready

INSIDE = "QWEN3F_KILLABLE"  # environment variable that is set in such a process, so that it does not start another one
MEMORY_BYTES = 8 << 30
_F_SETSIG = 10  # Linux, fcntl(2)


def find(name: str) -> Any:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _load(name: str, modules: Sequence[str]) -> Callable[..., Any]:
    """Import `modules`, then `find`. A module that is missing is ignored: the call fails later if it needs it."""
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return find(name)


def main() -> None:
    os.environ[INSIDE] = "1"
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a function prints must not look like an answer
    for line in sys.stdin:
        name, modules, calls = json.loads(line)
        loaded = _outcome(_load, name, modules)
        print(file=answers, flush=True)  # from here on the deadline counts
        for arguments in calls:
            with _ended_with_parent():
                found = loaded if "failure" in loaded else _outcome(loaded["value"], **arguments)
            print(_as_json(found), file=answers, flush=True)


def _as_json(found: dict[str, Any]) -> str:
    try:
        return json.dumps(found)
    except (TypeError, ValueError) as error:
        return json.dumps({"failure": f"its result is not JSON: {error}"})


@contextlib.contextmanager
def _ended_with_parent() -> Iterator[None]:
    """A context in which this process and its children are killed if the parent is killed. Otherwise a call that hangs
    would run for ever.

    The kernel sends SIGKILL when the parent's end of the pipe closes, so it also works while C code holds the
    interpreter. The parent sends nothing else during a call. Only Linux has this signal; elsewhere a call continues.
    """
    pipe, flags = sys.stdin.fileno(), 0
    with contextlib.suppress(OSError):  # the system has no such signal
        flags = _ask_for_signal(pipe) if sys.platform == "linux" else 0
    try:
        if ready(pipe, select.POLLHUP, 0):  # the parent ended before the signal was set up
            os.killpg(0, signal.SIGKILL)
        yield
    finally:
        if flags:
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags & ~os.O_ASYNC)


def _ask_for_signal(pipe: int) -> int:
    """Have the kernel send SIGKILL to this process group when the pipe gets data or closes. Returns the new flags."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags)
    return flags


def _outcome(work: Callable[..., Any], *arguments: Any, **named: Any) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return {"value": work(*arguments, **named)}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return {"failure": f"{type(error).__name__}: {str(error)[:300]}"}


if __name__ == "__main__":
    main()
