"""Answers written by the model, cut as the harness cuts them.

B rows · T columns of the prompts
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from qwen3f.errors import UserError
from qwen3f.eval.evaluator import Evaluator
from qwen3f.infer.generate import generate
from qwen3f.params import EMBED
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
    """text: without a stop token. ended: it wrote that, within max_new_tokens. truncated: the prompt was cut."""

    text: str
    ended: bool
    truncated: bool


def write(ev: Evaluator, prompts: Sequence[str], sampling: Sampling, numbers: Sequence[int]) -> list[list[Written]]:
    """`samples` answers to each prompt, in order. numbers: of the prompts, which their random streams depend on.

    A prompt that leaves no room for max_new_tokens is cut on its left, as the harness does. Raises UserError for
    max_new_tokens that leave no room for any prompt.
    """
    room = ev.cfg.max_position_embeddings - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"--config.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"{ev.cfg.max_position_embeddings} positions; write less"
        )
    whole = [ev.tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    rows = [ids[-room:] for ids in whole for _ in range(sampling.samples)]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    out: list[Written | None] = [None] * len(rows)
    for part in _parts(order, [len(row) + sampling.max_new_tokens for row in rows], ev.batch_tokens):
        names = [numbers[i // sampling.samples] * sampling.samples + i % sampling.samples for i in part]
        for i, ids in zip(part, _generate(ev, [rows[i] for i in part], names, sampling)):
            end = next((place for place, token in enumerate(ids) if token in ev.tokenizer.stop_ids), None)
            cut = len(whole[i // sampling.samples]) > room
            out[i] = Written(ev.tokenizer.decode(ids[:end], skip_special=True), end is not None, cut)
    n = sampling.samples
    return [out[i : i + n] for i in range(0, len(out), n)]


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


def _generate(ev: Evaluator, rows: Sequence[list[int]], names: list[int], sampling: Sampling) -> list[list[int]]:
    """The new ids of each row, its stop id with them. (The one place that calls the generator.)"""
    longest = max(map(len, rows))
    padded = [[ev.tokenizer.pad_id] * (longest - len(row)) + row for row in rows]
    out = generate(
        ev.cfg,
        ev.params,
        torch.tensor(padded, device=ev.params[EMBED].device),
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_ids=ev.tokenizer.stop_ids,
        pad_id=ev.tokenizer.pad_id,
        prompt_lengths=[len(row) for row in rows],
        request_ids=names,
        num_ids=min(ev.tokenizer.vocab_size, ev.cfg.vocab_size),
        execution=ev.execution,
    )
    return out[:, longest:].tolist()


def _parts(order: Sequence[int], sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """`order`, longest first, in parts of at most batch_tokens places."""
    part: list[int] = []
    for i in order:
        if part and sizes[part[0]] * (len(part) + 1) > batch_tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
