"""Reads metrics.jsonl into series, in any state: while it is written, cut off, a million lines long, or with NaN."""

import dataclasses
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen3f.finite import as_finite
from qwen3f.report.names import plain

MOST_LINES = 5000  # lines to parse, spread evenly over the file, and as many again of lines with evaluations
_BLOCK = 2**24  # bytes
_LAST_STEP = 2**53  # floats cannot tell larger steps apart
_EVALUATED = (b'"val_', b'"answers_', b'"bench_')  # names of evaluations begin with these


@dataclasses.dataclass(frozen=True)
class Series:
    """A metric's finite values, by step. missing: number of lines in which it was not finite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    missing: int = 0


@dataclasses.dataclass(frozen=True)
class Metrics:
    """series: by name, in order of first occurrence. lines: number of lines of the file. parsed: number of lines that
    were parsed. broken: number of parsed lines that are not a JSON object with a step."""

    series: dict[str, Series]
    lines: int = 0
    parsed: int = 0
    broken: int = 0

    @property
    def last_step(self) -> int:
        return max((series.steps[-1] for series in self.series.values() if series.steps), default=0)

    def at(self, name: str) -> Series:
        return self.series.get(name, Series((), ()))


NO_METRICS = Metrics({})


def read_metrics(path: Path, most: int = MOST_LINES) -> Metrics:
    """Everything that can be read. A last line without a line end is left out: it is being written. Raises OSError."""
    if not path.exists() or not path.stat().st_size:
        return NO_METRICS
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        ends = _line_ends(content)
        chosen = _chosen(content, ends, most)
        lines = [content[(ends[i - 1] + 1 if i else 0) : ends[i]] for i in chosen]
    return _series(lines, len(ends))


def _line_ends(content: mmap.mmap) -> np.ndarray:
    parts = []
    for start in range(0, len(content), _BLOCK):
        block = np.frombuffer(content[start : start + _BLOCK], np.uint8)
        parts.append(np.flatnonzero(block == ord("\n")) + start)
    return np.concatenate(parts)


def _chosen(content: mmap.mmap, ends: np.ndarray, most: int) -> list[int]:
    """Numbers of the lines to parse: all, or `most` spread evenly from first to last, and `most` of evaluations."""
    if len(ends) <= most:
        return list(range(len(ends)))
    evaluated = np.array(sorted(set(_lines_with(content, ends))), dtype=np.int64)
    return sorted({*_evenly(np.arange(len(ends)), most), *_evenly(evaluated, most)})


def _evenly(numbers: np.ndarray, most: int) -> list[int]:
    if len(numbers) <= most:
        return numbers.tolist()
    return numbers[np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)].tolist()


def _lines_with(content: mmap.mmap, ends: np.ndarray) -> Iterator[int]:
    """Yields the numbers of lines with evaluations, some twice. Searches block by block: the find of a mmap is slow."""
    longest = max(map(len, _EVALUATED))
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK + longest]
        for needle in _EVALUATED:
            place = block.find(needle)
            while place >= 0:
                number = int(np.searchsorted(ends, start + place))
                if number == len(ends):
                    break
                yield number
                place = block.find(needle, int(ends[number]) - start)


def _series(lines: list[bytes], count: int) -> Metrics:
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    missing: dict[str, int] = {}
    broken = 0
    for line in lines:
        found = _object(line)
        if found is None:
            broken += 1
            continue
        step = found.pop("step")
        for name, value in found.items():
            if isinstance(value, str | bool | list | dict):
                continue
            own_steps, own_values = steps.setdefault(name, []), values.setdefault(name, [])
            while own_steps and own_steps[-1] >= step:  # the run went back to an earlier step and logged again
                own_steps.pop(), own_values.pop()
            if (number := as_finite(value)) is None:
                missing[name] = missing.get(name, 0) + 1
            else:
                own_steps.append(step)
                own_values.append(number)
    series = {name: Series(tuple(steps[name]), tuple(values[name]), missing.get(name, 0)) for name in steps}
    return Metrics(series, count, len(lines), broken)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and type(found.get("step")) is int and 0 <= found["step"] <= _LAST_STEP:
            return {plain(name): value for name, value in found.items()}
    except (ValueError, RecursionError):
        pass
    return None
