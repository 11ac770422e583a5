"""The sampler of a run: what its engine refuses is named by the run's own keys."""

from types import SimpleNamespace

import pytest

from qwen3f import params
from qwen3f.errors import UserError
from qwen3f.model import EAGER
from qwen3f.processes.world import ALONE
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
