"""The tasks by name."""

from collections.abc import Callable

from qwen3f.errors import UserError
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.task import Task
from qwen3f.tasks.visual import VisualTask

_TASKS: dict[str, Callable[[], Task]] = {"reasoning": ReasoningTask, "visual": VisualTask}


def open_task(name: str, flag: str) -> Task:
    """The task of a name, with its default settings. Raises UserError for an unknown one.

    flag: what names it on the command line, for the message.
    """
    if name not in _TASKS:
        raise UserError(f"{flag}={name}: there is no such task; write one of {', '.join(_TASKS)}.")
    return _TASKS[name]()
