"""A log file for disks that may be full, or mounts that may be away for a while: records wait until they fit."""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_MOST = 2**26  # bytes that may wait; further records are dropped and counted


class PatientFile:
    """Appends whole records to a file; a context manager. None of its methods raises OSError.

    Records that cannot be written wait in memory, in order; each `flush` tries again. A partly written record is cut
    off again. say: called with a line when writing starts to fail, when it works again, and at the end if records were
    lost.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file: int | None = None
        self._whole: int | None = None  # bytes of the file that are records; None before it was opened
        self._waiting: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._failing = False

    def write(self, record: bytes) -> None:
        """Queue a record; the next `flush` writes it."""
        if self._bytes + len(record) > _MOST:
            self._lost += 1
            return
        self._waiting.append(record)
        self._bytes += len(record)

    def flush(self) -> None:
        """Write the waiting records, as many as possible."""
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._append(self._waiting[0])
                self._bytes -= len(self._waiting.popleft())
        except OSError as error:
            self._give_up(error)
        else:
            if self._failing:
                self._failing = False
                self._say(f"{self._path} is written again{self._missing()}")

    def close(self) -> None:
        self.flush()
        if self._waiting:
            self._lost += len(self._waiting)
            self._waiting.clear()
            self._say(f"{self._path} could not be written to the end{self._missing()}")
        self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        self._whole = size if self._whole is None else min(size, self._whole)
        if size > self._whole:  # a failed write left a part of a record
            os.ftruncate(self._file, self._whole)

    def _append(self, record: bytes) -> None:
        view = memoryview(record)
        while view:  # on a disk that fills up, os.write may write only a part
            view = view[os.write(self._file, view) :]
        self._whole += len(record)

    def _give_up(self, error: OSError) -> None:
        if self._file is not None and self._whole is not None:
            with contextlib.suppress(OSError):  # if it fails, `_open` does it later
                os.ftruncate(self._file, self._whole)
        self._shut()
        if not self._failing:
            self._failing = True
            self._say(
                f"{self._path} cannot be written ({error.strerror or error}); its records wait in memory until it can"
            )

    def _shut(self) -> None:
        """Close the file; the next `flush` opens it again, in case a lost mount is back."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _missing(self) -> str:
        lost, self._lost = self._lost, 0
        return f"; {lost:,} of its records are lost" if lost else ""
