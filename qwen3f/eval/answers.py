"""A task's questions answered by a model, and judged: exact match by group, and whether answers have their form."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import opening
from qwen3f.data.chat.template import encode_chat
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine, EngineOptions, completion
from qwen3f.infer.sampling import SamplingParams
from qwen3f.params import Params
from qwen3f.processes.world import World
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.task import Question, Task

MODES = ("thinking", "plain")
KEPT_TEXTS = 6  # answers of an evaluation that are kept with their text, for the report


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How questions are answered.

    Attributes:
      max_new_tokens: an answer that has not ended at this length is cut, and counts as neither right nor well formed.
      temperature, seed: of the sampler; temperature 0 is greedy. Question i has the random stream first + i · stride.
      batch_size: questions at a time, at most. execution: how the model runs (attention, compilation).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    first: int = 0
    stride: int = 1
    batch_size: int = 64
    execution: model.Execution = model.EAGER


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: what the model wrote, without <|im_end|>; if the prompt ends with "<think>", the text begins with it.
    ended: whether the model wrote <|im_end|>."""

    text: str
    ended: bool


def parse_modes(text: str) -> tuple[str, ...]:
    """ "thinking,plain" as a tuple. Raises UserError for another word."""
    modes = tuple(part.strip() for part in text.split(",") if part.strip())
    if not modes or set(modes) - set(MODES) or len(set(modes)) < len(modes):
        raise UserError(f"--config.eval.modes={text!r}: write thinking, plain, or thinking,plain")
    return modes


def make_engine(cfg: ModelConfig, params: Params, tokenizer: Tokenizer, options: AnswerOptions) -> Engine:
    """An engine for `answers_of`."""
    return Engine(
        cfg,
        params,
        seed=options.seed,
        execution=options.execution,
        tokenizer=tokenizer,
        options=EngineOptions(rows=options.batch_size),
    )


def answer(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    thinking: bool,
    options: AnswerOptions,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:
    """`answers_of` with an engine made for this call."""
    return answers_of(make_engine(cfg, params, tokenizer, options), prompts, thinking, options, between)


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], thinking: bool) -> list[list[int]]:
    """What answers_of feeds for each prompt."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [encode_chat(tokenizer, t, add_generation_prompt=True, enable_thinking=thinking) for t in turns]


def answers_of(
    engine: Engine,
    prompts: Sequence[str],
    thinking: bool,
    options: AnswerOptions,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:
    """Yields the model's answer to each prompt, in order. A prompt is the text of one user turn.

    engine: of `make_engine`. thinking: as enable_thinking of `encode_chat`; with False a prompt of the kind hybrid ends
    with an empty thinking block. between: called before each pass of the engine; may raise. Raises UserError if the
    tokenizer's chat template cannot do `thinking`.
    """
    tokenizer = engine.tokenizer
    opened = opening(tokenizer)
    sampling = SamplingParams(temperature=options.temperature)
    requests = (
        engine.request(
            prompt, options.max_new_tokens, sampling=sampling, stream=options.first + number * options.stride
        )
        for number, prompt in enumerate(prompt_ids(tokenizer, prompts, thinking))
    )
    rows = engine.submit(requests)
    try:
        for row in rows:
            while not row.finish_reason:
                between()
                engine.step()
            given = completion(row)
            if given.finish_reason.startswith("error"):
                raise UserError(given.finish_reason.removeprefix("error: "))
            ended = given.finish_reason == "stop"
            yield Answer(opened + tokenizer.decode(given.ids[:-1] if ended else given.ids), ended)
    finally:
        engine.cancel(rows)  # if the caller stopped early: frees the engine for other requests


def answer_on_ranks(
    world: World,
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    thinking: bool,
    options: AnswerOptions,
    between: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """As `answer`, with the prompts split over the ranks. Each rank must hold all of params, and gets all answers.

    between is called only if there is one rank: several ranks make different numbers of passes, so they could not
    communicate in it.
    """
    own = dataclasses.replace(
        options, first=options.first + world.rank * options.stride, stride=options.stride * world.size
    )
    alone = between if world.size == 1 else lambda: None
    given = answer(cfg, params, tokenizer, prompts[world.rank :: world.size], thinking, own, alone)
    shares = world.gather([[one.text, one.ended] for one in given])
    return [Answer(*shares[number % world.size][number // world.size]) for number in range(len(prompts))]


@dataclasses.dataclass(frozen=True)
class Marked:
    """An answer judged. mark: 1.0 right, 0.0 wrong, None if the task cannot tell. formed: it has the required form."""

    question: Question
    answer: Answer
    mark: float | None
    formed: bool


def mark(task: Task, questions: Sequence[Question], answers: Sequence[Answer], thinking: bool) -> list[Marked]:
    """Judge each answer. One that did not end counts as wrong and not well formed."""
    return [
        Marked(
            question,
            given,
            task.judge(given.text, question.gold) if given.ended else 0.0,
            given.ended and is_well_formed(given.text, thinking, block_in_prompt=not thinking),
        )
        for question, given in zip(questions, answers, strict=True)
    ]


def shares(marked: Sequence[Marked]) -> dict[str, float]:
    """{"accuracy": exact match, "accuracy/GROUP": for each name in Question.group, "well_formed": share}. Answers that
    the task cannot judge are left out of the accuracy."""
    marks: dict[str, list[float]] = defaultdict(list)
    for one in marked:
        for name in ("accuracy", *(f"accuracy/{part}" for part in one.question.group)) if one.mark is not None else ():
            marks[name].append(one.mark)
    values = {name: sum(found) / len(found) for name, found in sorted(marks.items())}
    return {**values, "well_formed": sum(one.formed for one in marked) / max(1, len(marked))}


def judge(task: Task, questions: Sequence[Question], answers: Sequence[Answer], thinking: bool) -> dict[str, float]:
    """The `shares` of answers that are right and well formed."""
    return shares(mark(task, questions, answers, thinking))


def kept(marked: Sequence[Marked], mode: str, texts: int = KEPT_TEXTS) -> list[dict[str, Any]]:
    """A dict for each answer, for logger.answers: its mark; for the first `texts` also prompt, right answer and text.

    mode: one of MODES.
    """
    lines = []
    for number, one in enumerate(marked):
        line = {"mode": mode, "number": number, "mark": one.mark, "formed": one.formed, "ended": one.answer.ended}
        if number < texts:
            line |= {"prompt": one.question.prompt, "gold": one.question.gold, "text": one.answer.text}
        lines.append(line)
    return lines
