"""Commands as processes of their own: signals are passed on, an error line is kept, and they end with this process."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

_POLL = 0.1  # seconds
_DRAIN = 5.0  # seconds that what the command left behind may hold its stderr open
_MARK = b"error: "
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


class Command(NamedTuple):
    """quiet: its stdout goes nowhere, else where ours goes. environment: variables beside ours."""

    words: Sequence[str]
    quiet: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


class Failure(NamedTuple):
    """command: its number among those that ran. code: its exit code; negative, the signal that ended it. error: the
    last line "error: …" of its stderr, without that word; "" if there was none."""

    command: int
    code: int
    error: str


class Signals:
    """SIGTERM and SIGINT while a pipeline runs: kept, and passed on to the processes that run now, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._processes: list[subprocess.Popen] = []
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

    def run(self, *commands: Command, meanwhile: Callable[[], None] = lambda: None) -> Failure | None:
        """Run commands at the same time; the first one that fails ends the others, and is returned.

        meanwhile: called some times a second. What a command writes to stderr goes where ours goes, but for its error
        line, which is the caller's to say. If this process is killed, the commands get SIGTERM.
        """
        errors: list[list[str]] = [[] for _ in commands]
        readers = []
        try:
            for command, lines in zip(commands, errors):
                process = _start(command, _share(len(commands)))
                self._processes.append(process)
                for number in self._numbers:  # which came before it was started
                    process.send_signal(number)
                readers.append(threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True))
                readers[-1].start()
            while not (failed := [n for n, process in enumerate(self._processes) if process.poll()]):
                if all(process.poll() == 0 for process in self._processes):
                    break
                meanwhile()
                time.sleep(_POLL)
        finally:
            for process in self._processes:  # of a command that failed, the others; of meanwhile() that raised, all
                if process.poll() is None:
                    process.terminate()
            for process in self._processes:
                process.wait()
            for reader in readers:
                reader.join(_DRAIN)
            processes, self._processes = self._processes, []
            for process in processes:
                process.stderr.close()
        if not failed:
            return None
        lines = errors[failed[0]]
        return Failure(failed[0], processes[failed[0]].returncode, lines[-1] if lines else "")

    def _handle(self, number: int, frame: object) -> None:
        self.names.append(signal.Signals(number).name)
        self._numbers.append(number)
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _start(command: Command, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command.words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if command.quiet else None,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal reaches us alone, and the command once, from us
        preexec_fn=_end_with_parent,
        env=os.environ | environment | command.environment,
    )


def _share(commands: int) -> dict[str, str]:
    """Each of several commands gets its part of the cores, unless the user has set how many threads there are."""
    if commands == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // commands))}


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
