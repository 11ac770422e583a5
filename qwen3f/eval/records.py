"""Records of an evaluation, written to disk as they come, so that a killed evaluation resumes with the next question.

There is one file for each benchmark. Its first line holds the settings, each other line the record of a question.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.eval.measure import Record
from qwen3f.files import write_atomically

FOLDER = "records"
_KEYS = {"number", "name", "metrics", "truncated"}  # of every record


def is_metrics(value: Any) -> bool:
    """Whether a record's metrics are as they are written: name -> finite number, at least one."""
    numbers = value.values() if isinstance(value, dict) else ()
    return bool(numbers) and all(type(x) in (int, float, bool) and math.isfinite(x) for x in numbers)


class Records:
    """The file of one benchmark below an evaluation's directory.

    done: question number -> its record in the file. Raises UserError for a file with other settings, and for a file
        that this program did not write.
    """

    def __init__(self, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._path = directory / FOLDER / f"{name}.jsonl"
        head = json.dumps(dict(settings), ensure_ascii=False)
        if not self._path.exists():
            write_atomically(self._path, f"{head}\n".encode())
        lines = self._path.read_bytes().split(b"\n")
        self._size = sum(len(line) + 1 for line in lines[:-1])  # an incomplete last line does not count
        try:
            there, *records = [json.loads(line) for line in lines[:-1]]
            self.done: dict[int, Record] = {record["number"]: record for record in records}
            whole = all(
                record.keys() >= _KEYS and is_metrics(record["metrics"]) and type(record["truncated"]) in (bool, int)
                for record in records
            )
            if not (isinstance(there, dict) and whole):
                raise ValueError("no settings, or a line that is no record")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path} is not what this program writes: remove it, or choose another --workdir"
            ) from error
        for key, value in json.loads(head).items():
            if there.get(key) != value:
                raise UserError(
                    f"{self._path} holds answers by other settings: {key} was {there.get(key)!r} and is now {value!r}; "
                    "choose another --workdir, or set it back"
                )

    def add(self, records: Sequence[Record]) -> None:
        """Append records, on disk when this returns. Raises UserError where that fails."""
        try:
            with self._path.open("r+b") as file:
                file.truncate(self._size)
                file.seek(self._size)
                for record in records:
                    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}): fix that and write the same command "
                "again; it resumes"
            ) from error
        self.done |= {record["number"]: record for record in records}
