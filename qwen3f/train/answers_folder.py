"""What evaluations asked and were answered, in workdir/answers/step-N.jsonl: of the first and the last evaluations."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.files import write_atomically

FOLDER = "answers"
_LAST = 3  # evaluations that are kept beside the first


class AnswersFolder:
    """Writes one file an evaluation. What is there of steps after start_step, of a run that went back, is removed.

    say: called with a line, once, when nothing can be written; a run goes on without.
    """

    def __init__(self, workdir: Path, start_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._failed = workdir / FOLDER, say, False
        self._remove([path for path in self._files() if path.name > self._name(start_step)])

    def write(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """A JSON object a line."""
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        try:
            # of a text that is no Unicode, such as half of a pair of surrogates, a mark stays
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
