"""Questions of a task as prompts for a model."""

from collections.abc import Sequence
from itertools import islice

from ml_collections import ConfigDict

from qwen3f.data.chat.corpus import ChatDataConfig, generated_problems
from qwen3f.data.chat.template import encode_chat
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.tasks.registry import open_text_task
from qwen3f.tasks.task import Question, Task


def task_of(name: str, flag: str, data: ConfigDict) -> Task:
    """The task of this name. config.data sets kinds, difficulties and number of generated problems. Raises UserError.

    flag: the flag that names the task, for errors.
    """
    fields = {key: data[key] for key in ("kinds", "difficulties", "problems", "problem_seed")}
    return open_text_task(name, flag, generated_problems(ChatDataConfig(**fields), [name]))


def prompt_ids(tokenizer: Tokenizer, question: Question, thinking: bool) -> tuple[int, ...]:
    """Token ids of the question as a user's turn, up to where the model begins to write."""
    turns = [{"role": "user", "content": question.prompt}]
    return tuple(encode_chat(tokenizer, turns, add_generation_prompt=True, enable_thinking=thinking))


def fitting(
    tokenizer: Tokenizer, questions: Sequence[Question], thinking: bool, room: int
) -> tuple[tuple[Question, ...], int]:
    """(the questions whose prompts have at most `room` tokens, the number of the others)."""
    short = tuple(question for question in questions if len(prompt_ids(tokenizer, question, thinking)) <= room)
    return short, len(questions) - len(short)


def held_out(
    tokenizer: Tokenizer, task: Task, count: int, thinking: bool, room: int
) -> tuple[tuple[Question, ...], list[str]]:
    """(those of the first `count` held-out questions whose prompts fit, lines to print about the others).

    Raises UserError if count is not 0 and no question fits.
    """
    questions, long = fitting(tokenizer, tuple(islice(task.questions("heldout"), count)), thinking, room)
    if count and not questions:
        why = f"none of {long} prompts leaves room for an answer; lower max_new_tokens" if long else "it has none"
        raise UserError(f"--config.eval.questions={count} of {task.name}: {why}, or write --config.eval.questions=0")
    return questions, [f"held-out questions: {long:,} are too long and left out"] if long else []
