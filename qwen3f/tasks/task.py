"""What a task is: questions with right answers in two splits, and a judge."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from qwen3f.data.sources.documents import Split


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        prompt: what the user asks; complete in itself.
        gold: the right final answer, for the task's judge.
        group: what results are listed by, e.g. ("arithmetic", "difficulty 2").
        images: pillow images, which stand before the prompt in the user's turn.
    """

    prompt: str
    gold: str
    group: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()


class Task(Protocol):
    """One object for data, rewards and evaluation."""

    @property
    def name(self) -> str:
        """What the user writes."""
        ...

    def questions(self, split: Split) -> Iterator[Question]:
        """The questions of a split, the same ones in the same order each time. No question is in both splits."""
        ...

    def judge(self, answer_text: str, gold: str) -> float | None:
        """1.0 if the answer is right, 0.0 if it is wrong, None if that cannot be told.

        Args:
            answer_text: what the model wrote, its thinking included; see `answer_text.after_thinking`.
            gold: the right answer of the question.
        """
        ...
