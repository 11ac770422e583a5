"""Bounds on what a file of rows may grow to while it is read; see `qwen3f.limits`."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qwen3f import limits


class TooLarge(Exception):
    """A file asks for more than it may; the text says what, and which limit."""


class Growth:
    """Counts the bytes read from a file, and raises TooLarge if they are too many times the file's size."""

    def __init__(self, path: Path) -> None:
        self._bytes = path.stat().st_size
        self._most = max(limits.EXPANSION_BYTES, limits.EXPANSION.value() * self._bytes)
        self._total = 0

    def add(self, count: int) -> None:
        """Add `count` bytes in memory to those read so far."""
        self._total += count
        self.check(self._total)

    def check(self, total: int) -> None:
        """Raises TooLarge if `total` bytes in memory, of the file or of a part that is read at once, are too many."""
        if total > self._most:
            raise TooLarge(
                f"{self._bytes:,} bytes on disk grow to {total:,} or more, {limits.EXPANSION.exceeded('times')}"
            )


def lines(file: BinaryIO, growth: Growth) -> Iterator[bytes]:
    """The lines of a file, each with its end. Raises TooLarge before a line is read whole."""
    most = limits.ROW_BYTES.value()
    while line := file.readline(most + 1):
        if len(line) > most:
            raise TooLarge(f"a line is {limits.ROW_BYTES.exceeded('bytes')}")
        growth.add(len(line))
        yield line
