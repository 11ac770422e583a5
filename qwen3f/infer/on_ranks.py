"""Answers by all ranks of a run, each with an engine of its own on the whole weights: every rank gets all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.request import Completion
from qwen3f.infer.sampling import SamplingParams
from qwen3f.processes.world import World


def check_cache(prompts: Iterable[Sequence[int]], max_new_tokens: int, cache_tokens: int, flag: str) -> None:
    """Raises UserError unless a cache of cache_tokens (0: as many as fit a device) holds each prompt with its answer.

    flag: the key of cache_tokens.
    """
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if 0 < cache_tokens < longest:
        raise UserError(
            f"{flag}={cache_tokens} has no room for the longest prompt with an answer of {max_new_tokens} tokens, "
            f"{longest} in all; write that or more, or 0 for what a device has free"
        )


def generate_on_ranks(
    world: World,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[Sequence[int]],
    sampling: SamplingParams,
    max_new_tokens: int,
    pictures: Sequence[Pictures | None] | None = None,
) -> list[list[Completion]]:
    """By prompt, a completion for each of its random streams, of which all prompts have as many. pictures: of each
    prompt.

    A completion depends on weights, prompt and stream, never on the number of ranks. All ranks call this together.
    Raises UserError on all of them for a prompt that one cannot answer.
    """
    mine = range(world.rank, len(prompts), world.size)

    def work() -> list[list[Any]]:
        if not mine:
            return []
        found = engine.generate(
            [prompts[i] for i in mine],
            sampling,
            max_new_tokens=max_new_tokens,
            n=len(streams[0]),
            streams=[stream for i in mine for stream in streams[i]],
            pictures=None if pictures is None else [pictures[i] for i in mine],
        )
        return [[one.ids, one.logprobs, one.finish_reason, mine[one.prompt_index], one.sample_index] for one in found]

    groups: list[list[Completion]] = [[] for _ in prompts]
    for told in world.gather(world.together(work, UserError)):
        for values in told:
            groups[values[3]].append(Completion(*values))
    return groups
