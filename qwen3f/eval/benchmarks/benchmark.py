"""What a benchmark is: rows of a data set as questions, how they are asked, and how an answer is scored.

Each is one file here, whose docstring says schema, prompt, metric and source. Prompts and scores of the text benchmarks
are those of EleutherAI's lm-evaluation-harness 0.4.13, character for character; of the vision benchmarks those of
lmms-eval 0.7.3.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3f.data.sources.adapters.rows import Row, RowFault
from qwen3f.tasks.task import Task

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        name: "file:row" it came from.
        prompt: the question as the model reads it; one prompt for each choice if all choices have the same ending
            (WinoGrande).
        gold: the right answer: the index of the right choice, or what `Benchmark.score` compares with.
        example: (prompt, answer) for use as a few-shot example.
        choices: what is chosen from. continuations: what is scored after the prompt, if that is not the choice itself.
        group: the subject. Its few-shot examples are of the same group, and results are listed by group.
        chat_prompt: the prompt of a user's turn, if it differs from `prompt`.
        image: in a vision benchmark, the image as the data set has it; `items` makes it a pictures.Picture.
    """

    name: str
    prompt: str | tuple[str, ...]
    gold: Any
    example: tuple[str, str] = ("", "")
    choices: tuple[str, ...] = ()
    continuations: tuple[str, ...] = ()
    group: str = ""
    chat_prompt: str = ""
    image: Any = None


@dataclasses.dataclass(frozen=True)
class Shots:
    """Where examples come from.

    Attributes:
        count: examples before a question, unless the user says another number.
        split: the split of the data set that they come from; "" with `fixed`.
        order: "random": drawn for each question in turn by Python's generator with the harness's seed 1234, for each
            group anew; "first": the first ones.
        fixed: (prompt, answer) of examples that come with the benchmark.
        most: the largest count allowed; None: as many as there are rows.
        spare: examples drawn beyond `count`, so that one that equals the question can be left out. The harness does
            this for data sets without a test split, perhaps by accident (task.py compares "no few-shot split" with "no
            test split"); it changes which examples are drawn.
    """

    count: int = 0
    split: str = "train"
    order: str = "random"
    fixed: tuple[tuple[str, str], ...] = ()
    most: int | None = None
    spare: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """How an answer is written.

    Attributes:
        until: the answer ends before the first of these texts. max_new_tokens: used if the user gives no number.
        chat: (an item, the answer to its chat_prompt) -> the same answer in the form that `score` wants. `until` is not
            used for it.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: Callable[[Item, str], str] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's questions come from, how they are asked and how answers are scored.

    Attributes:
        name: what the user writes.
        hub_id, configs: data set and configurations on the Hub. folder: folder of a configuration's files there; a
            local copy need not have it.
        split: the split whose questions are asked.
        columns: those that every row must have. optional: columns that are read if they are there.
        read: a row -> its Item. Raises RowFault.
        shots: see Shots. description: a group -> the text before the first example.
        generation: how answers are written; None: choices are scored instead.
        score: (an item, its answers) -> its metrics; None if choices are scored. If `together`, it gets all answers of
            an item; else one answer at a time, and the mean counts.
        metric: the one that results are compared by. metrics: all of them.
        official: like score, by the authors' own definition; None if that is the same.
        ready: raises UserError if what `score` needs is not installed.
        vision: questions have an image.
        task: a task of qwen3f.tasks, whose held-out questions are asked, as chats and without files.
    """

    name: str
    hub_id: str
    columns: tuple[str, ...]
    read: Callable[[Row], Item]
    metrics: tuple[str, ...]
    configs: tuple[str, ...] = ("",)
    folder: str = ""
    split: str = "test"
    optional: tuple[str, ...] = ()
    shots: Shots = Shots()
    description: Callable[[str], str] = lambda group: ""
    generation: Generation | None = None
    score: Callable[[Item, Sequence[str]], Metrics] | None = None
    official: Callable[[Item, Sequence[str]], Metrics] | None = None
    ready: Callable[[], None] = lambda: None
    together: bool = False
    vision: bool = False
    task: Task | None = None

    @property
    def metric(self) -> str:
        return self.metrics[0]


def integer(row: Row, column: str, count: int) -> int:
    """The answer key of a row with `count` choices, written as a number or its digits. Raises RowFault."""
    value = row.values[column]
    try:
        key = int(value)
    except (TypeError, ValueError, OverflowError):
        key = -1
    whole = isinstance(value, str) or key == value  # int() cuts 1.9 to 1
    if isinstance(value, bool) or not whole or not 0 <= key < count:
        raise RowFault(
            "invalid_rows",
            f"{row.name} has {value!r} under {column!r}: write the answer's place, 0 to {count - 1}.",
        )
    return key


def texts(row: Row, column: str, value: Any, count: int = 2) -> tuple[str, ...]:
    """`value` as a tuple of at least `count` strings. Raises RowFault for anything else."""
    if not isinstance(value, list | tuple) or len(value) < count or not all(isinstance(x, str) for x in value):
        raise RowFault(
            "invalid_rows", f"{row.name} holds no list of at least {count} strings under {column!r}: write one."
        )
    return tuple(value)
