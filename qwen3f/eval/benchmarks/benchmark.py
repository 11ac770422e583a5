"""What a benchmark is: rows of a data set as questions, how they are asked, and how an answer is scored.

Each is one file here, that says schema, prompt, metric and source. Prompts and scores of the text benchmarks are
those of EleutherAI's lm-evaluation-harness 0.4.13, character for character; of the vision benchmarks those of lmms-eval
0.7.3.
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
        prompt: the question as the model reads it; of a question whose choices stand before one and the same ending
            (WinoGrande) one prompt for each choice.
        gold: the right answer: of choices the place, else what the benchmark's score wants.
        example: (prompt, answer) as it stands among the few shots.
        choices: what is chosen from. continuations: what is scored after the prompt, where that is not the choice.
        group: the subject, whose few shots it gets and by which results are listed.
        chat_prompt: the prompt of a user's turn, where that is another.
        image: of a vision benchmark, as the data set has it; `items` makes it a pictures.Picture.
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
        split: of the data set that they are of; "" with `fixed`.
        order: "random": drawn for each question in turn by Python's generator with the harness's seed 1234, for each
            group anew; "first": the first ones.
        fixed: (prompt, answer) of examples that come with the benchmark.
        most: that there may be; None: as many as there are rows.
        spare: examples drawn beyond `count`, so that one which is the question itself can be left out. The harness does
            so, perhaps unmeant, for data sets without a test split (task.py compares no few-shot split with no test
            split), and the draws are others by it.
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
        until: texts before which it ends. max_new_tokens: unless the user says another number.
        chat: (an item, the answer to its chat_prompt) -> the answer to its prompt; `until` does not end that.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: Callable[[Item, str], str] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        name: what the user writes.
        hub_id, configs: on the Hub. folder: where the files of a configuration lie; a local copy may lack it.
        split: that is asked.
        columns: that its rows must have. optional: columns that are read where there are any.
        read: a row -> its Item. Raises RowFault.
        shots: see Shots. description: a group -> what stands before the first example.
        generation: None: choices are scored.
        score: (an item, its answers) -> its metrics; of a benchmark with choices unused. It gets all answers if
            together, else each alone, and their mean counts.
        metric: the one that results are compared by. metrics: all of them.
        official: the score by its authors' definition, where that is another.
        ready: raises UserError where what the score needs is not installed.
        vision: questions have an image.
        task: of qwen3f.tasks, whose held-out questions these are; asked as chats, without files.
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
    """A list of at least `count` strings. Raises RowFault."""
    if not isinstance(value, list | tuple) or len(value) < count or not all(isinstance(x, str) for x in value):
        raise RowFault(
            "invalid_rows", f"{row.name} holds no list of at least {count} strings under {column!r}: write one."
        )
    return tuple(value)
