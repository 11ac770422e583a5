"""The tasks by name."""

from collections.abc import Callable
from itertools import islice

from qwen3f.data.sources.reasoning import FAMILIES, ReasoningSource
from qwen3f.errors import UserError
from qwen3f.tasks.code import CodeTask
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.task import Task
from qwen3f.tasks.visual import VisualTask
from qwen3f.tasks.word_problems import WordProblems

_TASKS: dict[str, Callable[[], Task]] = {"code": CodeTask, "visual": VisualTask}
_DATA_SETS = ("gsm8k", "math")  # a name may have a directory after it: gsm8k@DIR


def open_task(name: str, flag: str, problems: ReasoningSource | None = None) -> Task:
    """The task of a name. Raises UserError for an unknown one.

    name: a data set's may have its local copy, gsm8k@DIR. flag: the flag that names it, for the message. problems:
    generated problems of all families, of which a task takes its own family's; None: the default ones.
    """
    if name in FAMILIES:
        own = (problems or ReasoningSource(kinds=FAMILIES[name])).family(name)
        return ReasoningTask(own.kinds, own.difficulties, own.seed, own.num_problems, name)
    short, at, root = name.partition("@")
    if short in _DATA_SETS and bool(at) == bool(root):
        return WordProblems(short, root)
    if name not in _TASKS:
        known = (*FAMILIES, *_TASKS, *_DATA_SETS, *(f"{data_set}@DIR" for data_set in _DATA_SETS))
        raise UserError(f"{flag}={name}: there is no such task; write one of {', '.join(known)}.")
    return _TASKS[name]()


def open_text_task(name: str, flag: str, problems: ReasoningSource | None = None) -> Task:
    """As `open_task`, for a stage that shows text only. Raises UserError also for a task whose questions have
    pictures."""
    task = open_task(name, flag, problems)
    if name in _TASKS and any(question.images for question in islice(task.questions("train"), 1)):
        raise UserError(
            f"{flag}={name} asks about pictures, and here a model is shown none; write another task, e.g. reasoning"
        )
    return task
