"""A few held-out pictures with a question each, for a model with a vision tower."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qwen3f.tasks.visual import VisualTask

COUNT = 3
QUESTIONS = "questions.json"


def draw(folder: Path, task: VisualTask) -> Iterator[tuple[Path, str]]:
    """Yields (file of the picture, question) for the task's first held-out questions. Writes the pictures to `folder`,
    and the questions with their right answers to questions.json."""
    found = list(islice(task.questions("heldout"), COUNT))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, question in enumerate(found):
        path = folder / "pictures" / f"{number}.png"
        question.images[0].save(path)
        rows.append({"picture": f"pictures/{number}.png", "prompt": question.prompt, "gold": question.gold})
    (folder / QUESTIONS).write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        yield folder / row["picture"], row["prompt"]


def said(folder: Path) -> Iterator[str]:
    """Yields a line for each picture: question, the model's answer, right answer."""
    for number, row in enumerate(json.loads((folder / QUESTIONS).read_text())):
        yield f"{row['picture']}: {row['prompt']} {answer(folder, number)!r}, right is {row['gold']!r}"


def place_of(folder: Path, number: int) -> Path:
    """The file of the answer to a question."""
    return folder / f"{number}.jsonl"


def answer(folder: Path, number: int) -> str | None:
    """The model's answer to a question; None if there is no complete answer."""
    try:
        # not splitlines: a text may hold U+2028
        lines = place_of(folder, number).read_bytes().strip(b"\n").split(b"\n")
        return str(json.loads(lines[-1])["answer"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
