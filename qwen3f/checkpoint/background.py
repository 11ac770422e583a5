"""Work in a thread of its own, which a deadline may be set to."""

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable


class Background:
    """Runs `work` in a daemon thread: one that never ends does not keep the process from ending.

    name: the thread's, as a stack dump shows it. error: what `work` raised, once it has ended.
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
        except Exception as error:
            self.error = error

    def ended(self, timeout: float = 0.0) -> bool:
        """Waits for the end, until `timeout` seconds after the beginning (0: for ever); whether it has come."""
        left = max(0.0, self._since + timeout - time.monotonic()) if timeout else None
        self._thread.join(left)
        return not self._thread.is_alive()


_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """Ends the process here if work is still under way, which is an error.

    The interpreter's own end would abort instead, whenever a thread inside a C++ library next asks for its lock.
    """
    if names := [thread.name for thread in _THREADS if thread.is_alive()]:
        print(f"the process ends while it still had to {', '.join(names)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
