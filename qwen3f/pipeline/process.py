"""Runs commands in their own processes: passes signals on, keeps their error line, ends them with this process."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from qwen3f.processes.parent import end_with

_POLL = 0.1  # seconds
_DRAIN = 5.0  # seconds to wait for stderr after a command's end: processes that it left behind may hold it open
_MARK = b"error: "


class Command(NamedTuple):
    """A command. quiet: discard its stdout; else it goes where ours goes. environment: variables to add to ours."""

    words: Sequence[str]
    quiet: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


class Failure(NamedTuple):
    """A command that failed. command: its index among the commands that ran together. code: its exit code; if negative,
    minus the signal that ended it. error: the text of the last line "error: …" of its stderr; "" if there was none."""

    command: int
    code: int
    error: str


class Signals:
    """Catches SIGTERM and SIGINT while a pipeline runs, and passes each of them on once to the running processes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._processes: list[subprocess.Popen] = []
        self._numbers: list[int] = []

    @property
    def name(self) -> str:
        """The name of the first signal that arrived; "" if none has."""
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
        """Run commands at the same time. When one fails, the others are ended and the failure is returned.

        meanwhile: called about ten times per second. The stderr of commands goes to ours, except lines "error: …",
        which the caller can print. If this process is killed, the commands get SIGTERM.
        """
        errors: list[list[str]] = [[] for _ in commands]
        readers = []
        try:
            for command, lines in zip(commands, errors):
                process = _start(command, _share(len(commands)))
                self._processes.append(process)
                for number in self._numbers:  # signals that arrived before it was started
                    process.send_signal(number)
                readers.append(threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True))
                readers[-1].start()
            while not (failed := [n for n, process in enumerate(self._processes) if process.poll()]):
                if all(process.poll() == 0 for process in self._processes):
                    break
                meanwhile()
                time.sleep(_POLL)
        finally:
            for process in self._processes:  # the others after a failure, or all if meanwhile() raised
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
        start_new_session=True,  # so that Ctrl-C in a terminal reaches only us, and we pass it on once
        preexec_fn=functools.partial(end_with, os.getpid()),
        env=os.environ | environment | command.environment,
    )


def _share(commands: int) -> dict[str, str]:
    """OMP_NUM_THREADS that gives each of several commands its share of the cores, unless the user has set it."""
    if commands == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // commands))}


def _pass_on(stream: BinaryIO, errors: list[str]) -> None:
    """Copy a command's stderr to ours line by line (lines of a progress bar end in a carriage return), except error
    lines, which go to `errors`.

    If writing to our stderr fails, continue to read: else the command would block.
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
