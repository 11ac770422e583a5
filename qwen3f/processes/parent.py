"""Ends a process when the process that started it ends, even if that one was killed (Linux, prctl(2))."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # opened here, because between fork and exec nothing may be loaded


def end_with(parent: int) -> None:
    """Called in a child process: it gets SIGTERM when `parent`, which started it, ends, or has ended already."""
    if sys.platform == "linux":  # other systems have no prctl: there a child outlives a parent that was killed
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
