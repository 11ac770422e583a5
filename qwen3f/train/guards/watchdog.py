"""Ends a run that hangs (in a collective, a data worker or a file system), and prints stacks that show where."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BACKUP = 5.0  # seconds after which faulthandler's thread acts, which needs no interpreter lock, if ours could not
_BEHIND = 2.0  # a rank that only waits for others ends this many seconds later, so that the culprit ends first
# files in the stack of a rank that waits for other ranks
_WAITING = (
    "torch/distributed/",
    "torch/_ops.py",
    "sharding/collectives.py",
    "qwen3f/processes/world.py",
    "sharding/ring.py",
)


@contextmanager
def watchdog(seconds: float, who: str = "the run") -> Iterator[Callable[[], None]]:
    """A context that yields alive(). Call it at least once every `seconds`, also for the first time; 0: no limit.

    Otherwise the watchdog prints to stderr a line that says where `who` hangs, and every thread's stack, and the
    process exits with code 1. A rank that only waits for others exits 2 s later. If the hang holds the interpreter's
    lock, the stacks come 5 s later and without the line. Files on disk are not changed.
    """
    if seconds <= 0:
        yield lambda: None
        return
    main, moved, ended = threading.current_thread().ident, threading.Condition(), False
    deadline = time.monotonic() + seconds

    def alive() -> None:
        nonlocal deadline
        faulthandler.dump_traceback_later(seconds + _BACKUP, exit=True, file=sys.__stderr__)
        with moved:
            deadline = time.monotonic() + seconds

    def watch() -> None:
        with moved:
            while not ended and (left := deadline - time.monotonic()) > 0:
                moved.wait(left)
            if ended:
                return
        stack = traceback.extract_stack(sys._current_frames()[main])
        waits = any(part in frame.filename.replace(os.sep, "/") for frame in stack for part in _WAITING)
        at = f"{Path(stack[-1].filename).name}:{stack[-1].lineno}"
        where = f"it waits for other ranks, at {at}" if waits else f"it is at {at} ({stack[-1].name})"
        print(f"{who} has not finished a step in {seconds:g} s; {where}:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__)
        if waits:
            time.sleep(_BEHIND)
        os._exit(1)

    alive()
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
        with moved:
            ended = True
            moved.notify_all()
