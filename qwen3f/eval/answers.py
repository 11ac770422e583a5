"""A task's questions answered by a model, and judged: exact match by group, and whether answers have their form.

B questions at a time · T the longest prompt
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import THINK, encode_chat
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.generate import generate
from qwen3f.params import Params
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.task import Question, Task

MODES = ("thinking", "plain")


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How questions are answered.

    Attributes:
      max_new_tokens: an answer ends there, if not before; it then counts as neither right nor well formed.
      temperature, seed: of the sampler; 0 is greedy. Question i has the random stream first + i.
      batch_size: questions at a time. device: the parameters'. execution: of the model.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    first: int = 0
    batch_size: int = 64
    device: torch.device | str = "cpu"
    execution: model.Execution = model.EAGER


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: what the model wrote, without <|im_end|>, from its "<think>" on also where the prompt holds that. ended: it
    wrote <|im_end|>."""

    text: str
    ended: bool


def parse_modes(text: str) -> tuple[str, ...]:
    """ "thinking,plain" as a tuple. Raises UserError for another word."""
    modes = tuple(part.strip() for part in text.split(",") if part.strip())
    if not modes or set(modes) - set(MODES):
        raise UserError(f"--config.eval.modes={text!r}: write thinking, plain, or thinking,plain")
    return modes


def answer(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    thinking: bool,
    options: AnswerOptions,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:
    """What the model answers to each prompt, a user's turn; in order.

    thinking: as enable_thinking, which puts an empty block into the prompt where it is False. between: called before
    each batch; may raise. Raises UserError for a mode that the tokenizer's chat template has not.
    """
    opened = THINK if kind_of(tokenizer).always else ""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [encode_chat(tokenizer, t, add_generation_prompt=True, enable_thinking=thinking) for t in turns]
    for first in range(0, len(ids), options.batch_size):
        between()
        part = ids[first : first + options.batch_size]
        longest = max(map(len, part))
        rows = [[tokenizer.pad_id] * (longest - len(row)) + row for row in part]
        out = generate(
            cfg,
            params,
            torch.tensor(rows, device=options.device),
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            temperature=options.temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            prompt_lengths=[len(row) for row in part],
            request_ids=[options.first + first + row for row in range(len(part))],
            num_ids=tokenizer.vocab_size,
            execution=options.execution,
        )
        for row in out[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in tokenizer.stop_ids), None)
            yield Answer(opened + tokenizer.decode(row[:end]), end is not None)


def judge(task: Task, questions: Sequence[Question], answers: Sequence[Answer], thinking: bool) -> dict[str, float]:
    """{"accuracy": exact match, "accuracy/GROUP": of each part of Question.group, "well_formed": share}.

    An answer that did not end counts as wrong and not well formed; what the task cannot judge is left out.
    """
    marks: dict[str, list[float]] = defaultdict(list)
    formed = []
    for question, given in zip(questions, answers, strict=True):
        formed.append(given.ended and is_well_formed(given.text, thinking, block_in_prompt=not thinking))
        mark = task.judge(given.text, question.gold) if given.ended else 0.0
        for name in ("accuracy", *(f"accuracy/{part}" for part in question.group)) if mark is not None else ():
            marks[name].append(mark)
    values = {name: sum(found) / len(found) for name, found in sorted(marks.items())}
    return {**values, "well_formed": sum(formed) / max(1, len(formed))}
