"""The sampler of a run: errors of its engine name the run's own configuration keys; ranks exchange completions."""

from math import inf
from types import SimpleNamespace

import pytest

from qwen3f import params
from qwen3f.errors import UserError
from qwen3f.infer.on_ranks import _read, _written
from qwen3f.infer.request import Completion
from qwen3f.model import EAGER
from qwen3f.processes.world import ALONE, World
from qwen3f.rl.rollout import RolloutOptions, Sampler
from tests.sharding.steps import config


def test_a_cache_that_is_too_small_is_named_by_its_key():
    cfg = config()
    tokenizer = SimpleNamespace(vocab_size=cfg.vocab_size, stop_ids=())
    options = RolloutOptions(samples=2, max_new_tokens=70, temperature=1.0, rows=8, seed=0, cache_tokens=64)
    sampler = Sampler(cfg, tokenizer, EAGER, ALONE, options)
    sampler.update(params.init_params(cfg, 0))
    with pytest.raises(UserError, match="fit the cache of 64; raise config.rollout.cache_tokens or shorten it"):
        sampler([[3, 4, 5]], [0])


def test_ranks_tell_each_other_completions_as_they_are():
    found = [
        Completion([1, 2**40], [-0.1, -inf], "stop", 7, 1),
        Completion([], [], "error: é", 0, 0),
        Completion([5], [-1e-300], "length", 2**33, 0),
    ]
    assert _read(_written(found)) == found
    assert _read(_written([])) == []


def test_one_rank_writes_down_no_completion_for_others(monkeypatch):
    cfg, said = config(), []
    tokenizer = SimpleNamespace(vocab_size=cfg.vocab_size, stop_ids=())
    options = RolloutOptions(samples=2, max_new_tokens=3, temperature=1.0, rows=8, seed=0)
    sampler = Sampler(cfg, tokenizer, EAGER, ALONE, options)
    sampler.update(params.init_params(cfg, 0))
    monkeypatch.setattr(World, "gather_bytes", lambda self, content: said.append(content) or [content])
    found = sampler([[3, 4, 5], [6, 7]], [0, 1])
    assert [[len(one.ids) for one in group] for group in found] == [[3, 3], [3, 3]]
    assert not said
