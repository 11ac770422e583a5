"""SIGTERM and SIGINT: the first asks the loop to stop after the step it is in, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context manager under which the first of SIGNALS sets `name` instead of ending the process.

    name: the signal that asked, such as "SIGTERM"; "" as long as none did. The second one exits with 128 + its number,
    without any clean-up: a checkpoint that is being written then is lost, a committed one cannot be.

    Outside the main thread Python allows no handlers: signals keep their meaning there, and `name` stays "".
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
        # not print: the signal may have come inside another print
        os.write(2, f"\n{self.name}: stopping after this step; once more to stop at once\n".encode())
