"""The questions of several tasks in fixed shares: their token ids, and their order as a Loader's dataset of numbers."""

import dataclasses
from collections.abc import Sequence
from itertools import islice

import numpy as np

from qwen3f.data.chat.template import encode_chat
from qwen3f.data.mixture import Mixture, make_mixture
from qwen3f.data.sources.documents import Split
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.prompts import encode_shown
from qwen3f.rl.sight import Sight
from qwen3f.tasks.task import Question, Task


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question of a task. name: the task's name, as open_task takes it. ids: the token ids of the prompt."""

    name: str
    task: Task
    question: Question
    ids: tuple[int, ...]


class Numbers:
    """A part of a mixture whose examples are placeholders with a number of a question: first, first + 1, …"""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._count:
            raise IndexError(f"question {index} of {self._count}")
        nothing = np.zeros(1, np.int64)
        return {
            "tokens": nothing,
            "targets": nothing - 100,
            "loss_weights": np.zeros(1, np.float32),
            "question": np.array(self._first + index),
        }


@dataclasses.dataclass(frozen=True)
class Questions:
    """The training questions of a run.

    Attributes:
      asked: all questions.
      order: a dataset whose examples have "question", an index into `asked`. Each task has its share; all of its
        questions come once before one comes again.
      too_long: number of questions that were left out, since their prompts leave no room for a completion.
    """

    asked: tuple[Asked, ...]
    order: Mixture
    too_long: int


def encode(tokenizer: Tokenizer, question: Question, thinking: bool, sight: Sight | None = None) -> tuple[int, ...]:
    """Token ids of the question as a user's turn, and of the beginning of an answer. sight: needed if it has images."""
    turn = [{"role": "user", "content": question.prompt}]
    if question.images:
        return tuple(encode_shown(tokenizer, turn, sight.segments(question.images), thinking=thinking))
    return tuple(encode_chat(tokenizer, turn, add_generation_prompt=True, enable_thinking=thinking))


def ask(
    tasks: Sequence[tuple[str, Task, float]],
    tokenizer: Tokenizer,
    thinking: bool,
    longest: int,
    most: int,
    sight: Sight | None = None,
) -> Questions:
    """The training questions of (name, task, weight).

    longest: token ids of a prompt, at most. most: use this many questions of each task, the first ones; 0: all. sight:
    as for encode. Raises UserError for a task without a question that fits.
    """
    asked: list[Asked] = []
    parts, too_long = [], 0
    for name, task, _ in tasks:
        first, before = len(asked), too_long
        for question in islice(task.questions("train"), most or None):
            ids = encode(tokenizer, question, thinking, sight)
            if len(ids) > longest:
                too_long += 1
            else:
                asked.append(Asked(name, task, question, ids))
        if len(asked) == first:
            reason = f"; all {too_long - before} prompts are longer than {longest} tokens" if too_long > before else ""
            raise UserError(
                f"--config.tasks={name} has no question to train on{reason}; name another task, or raise "
                "--config.seq_len"
            )
        parts.append(Numbers(first, len(asked) - first))
    return Questions(
        tuple(asked), make_mixture(parts, [weight for *_, weight in tasks], flag="--config.tasks"), too_long
    )


def first_questions(task: Task, split: Split, count: int) -> tuple[Question, ...]:
    """The first `count` questions of a split. Raises UserError for a task without one."""
    found = tuple(islice(task.questions(split), count))
    if not found:
        raise UserError(f"--config.tasks={task.name} has no {split} question; write --config.eval.questions=0")
    return found
