"""The task `visual`: generated pictures and what one must see to answer, by topic."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3f.data.sources.documents import HOLDOUT, Split
from qwen3f.data.sources.images import KINDS, NUM_PICTURES, pictures
from qwen3f.tasks.answer_text import after_thinking
from qwen3f.tasks.task import Question

# The first that matches. Colours and labels differ from question to question.
_TOPICS = [
    (r"How many shapes are there", "count all"),
    (r"How many \w+ shapes", "count colour"),
    (r"How many (circle|square|triangle|diamond|ring)s", "count shape"),
    (r"Which colour has the", "colour"),
    (r"Which shape", "shape"),
    (r"Which bar is the (tallest|shortest)", "tallest bar"),
    (r"What is the value of bar", "read a bar"),
    (r"At which point|How many times does the line|Does the line", "line"),
    (r"How many slices|All shares", "pie"),
    (r"Which colour is the text", "colour of text"),
    (r"What does|How many lines", "text"),
]


def topic(question: str) -> str:
    """What a generated picture's question is about. ValueError for a question of another kind."""
    for pattern, name in _TOPICS:
        if re.match(pattern, question):
            return name
    raise ValueError(f"no topic for {question!r}")


@dataclass(frozen=True)
class VisualTask:
    """Generated pictures. The held-out split is the one of training on them: a hash of all that is drawn decides.

    Attributes:
        kinds, seed, num_pictures: which pictures; min_side, max_side: their sides in pixels.
    """

    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    num_pictures: int = NUM_PICTURES
    min_side: int = 64
    max_side: int = 128
    name: str = "visual"

    def questions(self, split: Split) -> Iterator[Question]:
        """As in `Task`; the picture is Question.images[0]. The kinds of picture take turns."""
        sides = (self.min_side, self.max_side)
        for item in pictures(split, self.seed, self.num_pictures, HOLDOUT, self.kinds, *sides):
            yield Question(item.question, item.answer, (topic(item.question),), (item.image,))

    def judge(self, answer_text: str, gold: str) -> float:
        """1.0 if the text after the thinking is `gold`, apart from blanks, a full stop and case; else 0.0."""
        answer = after_thinking(answer_text)
        return float(answer is not None and _plain(answer) == _plain(gold))


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()
