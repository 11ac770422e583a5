"""Answers by all ranks of a run, each with an engine of its own on the whole weights: every rank gets all of them."""

from collections.abc import Sequence
from typing import Any

from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.request import Completion
from qwen3f.infer.sampling import SamplingParams
from qwen3f.processes.world import World


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
