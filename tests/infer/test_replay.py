"""The engine's path on a GPU, on a CPU: fused passes are launched before the last one is read.

Graphs are replaced by the functions that they would capture, and pinned memory by plain memory.
"""

from unittest import mock

import pytest
import torch

from qwen3f.infer import graphs
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.pictures import vision_ids
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.thinking import ThinkingBudget
from tests.infer.test_engine import FILTERED, SAMPLED, random_prompts
from tests.infer.test_fused import build
from tests.vision import test_engine as vl


class Replayed:
    """A function in place of a CUDA graph: a replay writes its results where the first ones were."""

    def __init__(self, work, result):
        self._work, self._result = work, result

    def replay(self):
        for old, new in zip(self._result, self._work(), strict=True):
            old.copy_(new)


def captured(self, count, width):
    numbers, table, constants, work = self._program(count, width)
    kept = self.last.clone()
    result = work()
    self.last.copy_(kept)
    return graphs._Graph(Replayed(work, result), constants, numbers, table, result, graphs.PageTable(count, width))


def unpinned(make):
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


@pytest.fixture
def like_a_gpu():
    """A function that makes a CPU's engine work as on a GPU."""

    def change(engine):
        engine._device._fused = engine._device.overlaps = True
        engine._device._own_pages = False
        return engine

    with (
        mock.patch.object(torch, "zeros", unpinned(torch.zeros)),
        mock.patch.object(torch, "empty", unpinned(torch.empty)),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch.cuda, "Event", mock.MagicMock),
        mock.patch.object(graphs.DecodeGraphs, "_capture", captured),
    ):
        yield change


COLD = SamplingParams(temperature=1e-5)
PENALISED = SamplingParams(temperature=0.8, presence_penalty=1.0)


@pytest.mark.parametrize("ways", [[GREEDY], [SAMPLED], [GREEDY, SAMPLED, FILTERED, COLD, PENALISED]])
@pytest.mark.parametrize("room", [4096, 208])
def test_answers_are_those_of_the_plain_passes(ways, room, like_a_gpu):
    """In float64. Nine rows in four places, with pages of 16 tokens; in 13 pages, rows are preempted."""
    cfg, p = build(torch.float64)
    prompts = random_prompts(9, cfg)
    asked = {"sampling": [ways[i % len(ways)] for i in range(9)], "max_new_tokens": [5 + 4 * i for i in range(9)]}
    options = {"max_tokens": room, "options": EngineOptions(rows=4, page_size=16)}
    plain = Engine(cfg, p, **options).generate(prompts, **asked)
    replayed = like_a_gpu(Engine(cfg, p, **options)).generate(prompts, **asked)
    for a, b in zip(replayed, plain, strict=True):
        assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)


def test_thinking_ends_at_the_same_token_and_new_weights_are_used(like_a_gpu):
    """The closing is forced, which a graph cannot; weights change between two calls."""
    cfg, p = build(torch.float64)
    prompts = random_prompts(6, cfg)
    asked = {"sampling": SAMPLED, "max_new_tokens": 20, "budget": ThinkingBudget(7, 5, (9, 8, 5)), "stop_ids": (3,)}
    plain, replayed = (Engine(cfg, p, options=EngineOptions(rows=4, page_size=16)) for _ in range(2))
    like_a_gpu(replayed)
    for factor in (1.0, 1.5, 0.5):
        for engine in (plain, replayed):
            engine.update({path: factor * leaf for path, leaf in p.items()})
        found = [[answer.ids for answer in engine.generate(prompts, **asked)] for engine in (plain, replayed)]
        assert found[0] == found[1]


def test_answers_about_pictures_and_no_vision_id_is_drawn(like_a_gpu):
    """Behind a picture rotary positions are smaller than places in the row. In 15 pages rows are preempted."""
    cfg, p, _ = vl.make()
    rows, _, pictures = vl.prompts(cfg, ["tit", "t", "it", "iit", "vt", "titt"])
    options = {"options": EngineOptions(rows=3, chunk=5, page_size=4), "max_tokens": 60, "seed": 5}
    for way in (GREEDY, SAMPLED, SamplingParams(temperature=1000.0), FILTERED, PENALISED):
        plain, replayed = Engine(cfg, p, **options), like_a_gpu(Engine(cfg, p, **options))
        found = []
        for engine in (plain, replayed):
            asked = [engine.request(r.tokens, 20, sampling=way, pictures=seen) for r, seen in zip(rows, pictures)]
            done = engine.submit(asked)
            engine.run(done)
            found.append([(one.tokens, one.finish_reason) for one in done])
        assert found[0] == found[1]
        answers = {token for (tokens, _), r in zip(found[1], rows) for token in tokens[len(r.tokens) :]}
        assert len(answers) > 8
        assert not answers & set(vision_ids(cfg))
