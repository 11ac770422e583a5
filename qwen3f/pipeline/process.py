"""A command as a process of its own: signals are passed on, its error line is kept, and it ends with this process."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

_POLL = 0.1  # seconds
_DRAIN = 5.0  # seconds that what the command left behind may hold its stderr open
_MARK = b"error: "
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


class Signals:
    """SIGTERM and SIGINT while a pipeline runs: kept, and passed on to the process that runs now, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._process: subprocess.Popen | None = None
        self._numbers: list[int] = []

    @property
    def name(self) -> str:
        """Of the first that came; "" if none has."""
        return self.names[0] if self.names else ""

    @contextlib.contextmanager
    def caught(self) -> Iterator["Signals"]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(
        self, command: Sequence[str], meanwhile: Callable[[], None] = lambda: None, quiet: bool = False
    ) -> tuple[int, str]:
        """(exit code, the last line "error: …" of its stderr without that word, or ""); a signal that ended it is a
        negative code.

        meanwhile: called some times a second. What the command prints goes where ours goes (quiet: its stdout nowhere),
        but for its error line, which is the caller's to say. If this process is killed, the command gets SIGTERM.
        """
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal reaches us alone, and the command once, from us
            preexec_fn=_end_with_parent,
        ) as process:
            self._process = process
            for number in self._numbers:  # which came before it was started
                process.send_signal(number)
            errors: list[str] = []
            reader = threading.Thread(target=_pass_on, args=(process.stderr, errors), daemon=True)
            reader.start()
            try:
                while process.poll() is None:
                    meanwhile()
                    time.sleep(_POLL)
            finally:
                if process.poll() is None:  # meanwhile() raised
                    process.terminate()
                    process.wait()
                reader.join(_DRAIN)
                self._process = None
        return process.returncode, errors[-1] if errors else ""

    def _handle(self, number: int, frame: object) -> None:
        self.names.append(signal.Signals(number).name)
        self._numbers.append(number)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _pass_on(stream: BinaryIO, errors: list[str]) -> None:
    """stderr line by line (a progress bar's end in a carriage return), so that error lines can be kept back.

    Where ours takes no more, it is read on: else the command would wait.
    """
    rest = b""
    while chunk := os.read(stream.fileno(), 1 << 16):
        lines = (rest + chunk).splitlines(keepends=True)
        rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        for line in lines:
            _say(line, errors)
    if rest:
        _say(rest, errors)


def _say(line: bytes, errors: list[str]) -> None:
    if line.startswith(_MARK):
        errors.append(line.removeprefix(_MARK).decode(errors="replace").strip())
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()
