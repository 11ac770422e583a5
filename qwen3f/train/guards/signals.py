"""SIGTERM and SIGINT: the first makes the loop stop after its current step, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context manager: the first signal of SIGNALS sets `name` instead of ending the process.

    name: the signal received, such as "SIGTERM"; "" if there was none. The second signal exits with 128 + its number,
    without any clean-up: a checkpoint that is being written is then lost; a committed one is not.

    Outside the main thread Python allows no handlers: signals then keep their meaning, and `name` stays "".
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # not print, because the signal may have interrupted another print
        os.write(2, f"\n{self.name}: stopping after this step; send it again to stop at once\n".encode())
