"""Ending a run that hangs, in a collective, a data worker or a file system, with the stacks that show where."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """A context that yields alive(); between two calls of it, and before the first, at most `seconds` may pass.

    Otherwise every thread's stack goes to stderr and the process exits with code 1, at once, from a thread of the
    interpreter's own that needs no lock: also when the hang holds the GIL. 0: no limit. What is on disk stays.
    """

    def alive() -> None:
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    alive()
    try:
        yield alive
    finally:
        if seconds > 0:
            faulthandler.cancel_dump_traceback_later()
