"""All ranks of a run answer a share of the prompts, each with its own engine and whole weights; all get all answers."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import numpy as np

from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.request import Completion
from qwen3f.infer.sampling import SamplingParams
from qwen3f.processes.world import World


def check_cache(prompts: Iterable[Sequence[int]], max_new_tokens: int, cache_tokens: int, flag: str) -> None:
    """Raises UserError unless a cache of cache_tokens (0: as many as fit a device) holds each prompt with its answer.

    flag: the flag that sets cache_tokens, for the message.
    """
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if 0 < cache_tokens < longest:
        raise UserError(
            f"{flag}={cache_tokens} has no room for the longest prompt with an answer of {max_new_tokens} tokens, "
            f"{longest} in all; write {longest} or more, or 0 for most of a GPU's free memory (2 GiB on a CPU)"
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
    """Completions of each prompt, one for each of its random streams; the same list on every rank.

    All ranks call this together. A completion depends on weights, prompt and stream, never on the number of ranks.

    Args:
      streams: random streams of each prompt, the same number for all prompts.
      pictures: of each prompt.
    Raises UserError on all ranks for a prompt that one of them cannot answer.
    """
    mine = range(world.rank, len(prompts), world.size)

    def work() -> list[Completion]:
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
        return [dataclasses.replace(one, prompt_index=mine[one.prompt_index]) for one in found]

    own = world.together(work, UserError)
    told = [own] if world.size == 1 else [_read(content) for content in world.gather_bytes(_written(own))]
    groups: list[list[Completion]] = [[] for _ in prompts]
    for one in (one for given in told for one in given):
        groups[one.prompt_index].append(one)
    return groups


def _written(found: Sequence[Completion]) -> bytes:
    """Completions as bytes for other ranks: the length of a JSON text (8 bytes), the JSON text, all ids as int64, all
    log-probabilities as float64. Ids and log-probabilities are not in the JSON: a million numbers would take a second.
    """
    head = json.dumps([[len(x.ids), x.finish_reason, x.prompt_index, x.sample_index] for x in found]).encode()
    ids = np.array([token for one in found for token in one.ids], np.int64)
    log_probs = np.array([number for one in found for number in one.logprobs], np.float64)
    return len(head).to_bytes(8, "little") + head + ids.tobytes() + log_probs.tobytes()


def _read(content: bytes) -> list[Completion]:
    """The inverse of _written."""
    begin = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:begin])
    total = sum(count for count, *_ in head)
    ids = np.frombuffer(content, np.int64, total, begin).tolist()
    log_probs = np.frombuffer(content, np.float64, total, begin + 8 * total).tolist()
    out, place = [], 0
    for count, *rest in head:
        out.append(Completion(ids[place : place + count], log_probs[place : place + count], *rest))
        place += count
    return out
