"""Questions and answers of evaluations, in workdir/answers/step-N.jsonl: of the first and the last few evaluations."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.files import write_atomically

FOLDER = "answers"
_LAST = 3  # keep the first evaluation and this many of the last


class AnswersFolder:
    """Writes one file per evaluation. Files of steps after start_step, from before the run went back, are removed.

    say: called with a line, once, if a file cannot be written; no error is raised.
    """

    def __init__(self, workdir: Path, start_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._failed = workdir / FOLDER, say, False
        self._remove([path for path in self._files() if path.name > self._name(start_step)])

    def write(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Write one JSON object per line."""
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        try:
            # errors="replace": a lone surrogate, which UTF-8 cannot encode, becomes "?"
            write_atomically(self._folder / self._name(step), text.encode(errors="replace"))
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"{self._folder} cannot be written ({error.strerror or error}); the run goes on without")
            return
        self._remove(self._files()[1:-_LAST])

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.jsonl"))

    def _name(self, step: int) -> str:
        return f"step-{step:08d}.jsonl"

    def _remove(self, files: Sequence[Path]) -> None:
        for path in files:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return
