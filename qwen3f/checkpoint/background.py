"""Work in a background thread, with an optional deadline."""

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable


class Background:
    """Runs `work` in a daemon thread. So work that never ends does not stop the process from ending.

    name: of the thread, for stack dumps; it completes "the process ended before it could …". error: the exception that
    `work` raised, set when it has ended.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._work = work
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _THREADS.add(self._thread)

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # any error: the thread that waits for the work raises it
            self.error = error

    def ended(self, timeout: float = 0.0) -> bool:
        """Wait for the end of the work, at most until `timeout` seconds after its start (0: no limit). Returns whether
        it has ended."""
        left = max(0.0, self._since + timeout - time.monotonic()) if timeout else None
        self._thread.join(left)
        return not self._thread.is_alive()


_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """Exit with code 1 if work is still running.

    The interpreter's normal exit would abort instead, as soon as a thread in a C++ library requests the interpreter's
    lock.
    """
    if names := [thread.name for thread in _THREADS if thread.is_alive()]:
        print(f"the process ended before it could {', '.join(names)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
