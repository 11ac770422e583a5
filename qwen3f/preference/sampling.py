"""Answers of the model that is trained, on all ranks of a run: each writes its share with the whole weights."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor

from qwen3f import rng
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.infer.generate import generate
from qwen3f.params import Params
from qwen3f.preference.online_rows import Written
from qwen3f.train.stage import Run
from sharding.pipeline.cut import make_slices, restore

Sampler = Callable[[Params, Sequence[Sequence[int]], int, int, float], list[list[Written]]]


def whole_params(run: Run, params: Params) -> Params:
    """All of the parameters, in the dtype of the forward pass, on every rank; on one device they are cast alone."""
    setup = run.setup
    out = {}
    for path, leaf in params.items():
        cast = leaf.to(setup.compute_dtype)
        out[path] = cast.full_tensor() if isinstance(cast, DTensor) else cast
    if run.world.size == 1:
        return out
    return restore(setup.model, out, make_slices(setup.model, setup.layout.pipeline, setup.layout.axes.pp.size))


def make_sampler(run: Run, tokenizer: Tokenizer, max_new_tokens: int) -> Sampler:
    """sample(whole parameters, prompts, answers to each, seed, temperature) -> the answers, by prompt; on all ranks.

    Answer j to prompt i has a random stream of its own, of (seed, i, j), whatever rank writes it.
    """
    cfg = dataclasses.replace(run.setup.model, gradient_checkpointing="none")
    world, setup = run.world, run.setup

    def of_rank(
        params: Params, jobs: Sequence[tuple[int, Sequence[int]]], seed: int, temperature: float
    ) -> list[list[int]]:
        found = []
        for first in range(0, len(jobs), setup.config.online.rollout_batch):
            part = jobs[first : first + setup.config.online.rollout_batch]
            longest = max(len(ids) for _, ids in part)
            rows = [[tokenizer.pad_id] * (longest - len(ids)) + list(ids) for _, ids in part]
            out = generate(
                cfg,
                params,
                torch.tensor(rows, device=setup.device),
                max_new_tokens=max_new_tokens,
                seed=seed,
                temperature=temperature,
                stop_ids=tokenizer.stop_ids,
                pad_id=tokenizer.pad_id,
                prompt_lengths=[len(ids) for _, ids in part],
                request_ids=[number for number, _ in part],
                num_ids=tokenizer.vocab_size,
                execution=setup.execution,
            )
            found += [_cut(row, tokenizer.stop_ids) for row in out[:, longest:].tolist()]
        return found

    def sample(
        params: Params, prompts: Sequence[Sequence[int]], count: int, seed: int, temperature: float
    ) -> list[list[Written]]:
        jobs = [(number, prompts[number // count]) for number in range(len(prompts) * count)]
        own = of_rank(params, jobs[world.rank :: world.size], seed, temperature)
        told = world.gather(own)
        written = [told[number % world.size][number // world.size] for number, _ in jobs]
        answers = [_written(ids, tokenizer) for ids in written]
        return [answers[i * count : (i + 1) * count] for i in range(len(prompts))]

    return sample


def step_seed(seed: int, step: int, round_: int) -> int:
    """The sampler's, of a round of a step: so a run that goes on writes what it would have written."""
    return int(rng.key(seed, "online", step, round_)) & (2**62 - 1)


def _cut(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]


def _written(ids: list[int], tokenizer: Tokenizer) -> Written:
    ended = ids[-1] in tokenizer.stop_ids
    return Written(tuple(ids), tokenizer.decode(ids[:-1] if ended else ids), ended)
