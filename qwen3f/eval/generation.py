"""Answers written by the model, cut as the harness cuts them."""

import dataclasses
from collections.abc import Sequence

from qwen3f.errors import UserError
from qwen3f.eval.evaluator import Evaluator
from qwen3f.infer.engine import Engine
from qwen3f.infer.sampling import SamplingParams
from qwen3f.tasks.answer_text import after_thinking


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. samples: to each prompt. temperature 0: greedy. seed: of the draws."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Written:
    """text: without a stop token. ended: by that or by a text of `until`. truncated: the prompt was cut."""

    text: str
    ended: bool
    truncated: bool


def write(
    ev: Evaluator, prompts: Sequence[str], sampling: Sampling, numbers: Sequence[int], until: Sequence[str] = ()
) -> list[list[Written]]:
    """`samples` answers to each prompt, in order. numbers: of the prompts, which their random streams depend on.

    until: texts that end an answer, which keeps them. A prompt that leaves no room for max_new_tokens is cut on its
    left, as the harness does. Raises UserError for max_new_tokens that leave no room for any prompt, and for logits
    that are not finite.
    """
    room, tokenizer = ev.cfg.max_position_embeddings - sampling.max_new_tokens, ev.tokenizer
    if room < 1:
        raise UserError(
            f"--config.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"{ev.cfg.max_position_embeddings} positions; write less"
        )
    whole = [tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    # its cache takes most of a card's memory, so it lives no longer than this call
    engine = Engine(ev.cfg, ev.params, seed=sampling.seed, execution=ev.execution, tokenizer=tokenizer)
    found = engine.generate(
        [ids[-room:] for ids in whole],
        SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p),
        max_new_tokens=sampling.max_new_tokens,
        n=sampling.samples,
        streams=[number * sampling.samples + i for number in numbers for i in range(sampling.samples)],
        stop_texts=tuple(until),
    )
    out: list[list[Written]] = [[] for _ in prompts]
    for one in found:
        if one.finish_reason.startswith("error"):
            raise UserError(one.finish_reason.removeprefix("error: ") + ", or use dtype=float32")
        ids = one.ids[:-1] if one.ids and one.ids[-1] in tokenizer.stop_ids else one.ids
        text, ended = tokenizer.decode(ids, skip_special=True), one.finish_reason == "stop"
        out[one.prompt_index].append(Written(text, ended, len(whole[one.prompt_index]) > room))
    return out


def cut(text: str, until: Sequence[str], thinking: bool) -> str | None:
    """An answer: behind its thinking, before the first of `until`. None if thinking did not end.

    thinking: whether the prompt asked for it; without it, the tags are text.
    """
    if thinking:
        behind = after_thinking(text)
        if behind is None:
            return None
        text = behind.lstrip()
    for end in until:
        text = text.partition(end)[0]
    return text
