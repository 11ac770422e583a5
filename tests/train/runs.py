"""What tests of runs share: the state, the metrics, and whether two states are the same."""

import json

import torch

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.config import ModelConfig
from qwen3f.train import optimizer
from qwen3f.train.hyper import make_hyper
from qwen3f.train.state import init_state


def final_state(config, workdir, step):
    with Checkpointer(workdir / "checkpoints", 0, 0) as checkpoints:
        dtype = torch.float64 if config.dtype == "float64" else torch.float32
        hyper = make_hyper(**config.optimizer.to_dict())  # which says what is frozen and has no moments
        return checkpoints.restore(init_state(pretrain_model(config), 0, hyper, dtype=dtype), step)[0]


def pretrain_model(config):
    return ModelConfig.from_dict(config.model.to_dict())


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(a, b):
    leaves = torch.utils._pytree.tree_leaves(a)
    assert leaves
    for x, y in zip(leaves, torch.utils._pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)


def run_updates(hyper, decay, start, grads, lrs):
    """(parameters, state) after an update with each of `grads`, clipped as a step clips them."""
    p, state, rules = start, optimizer.init(hyper, decay, start), optimizer.leaf_rules(hyper, decay)
    for step, (g, lr) in enumerate(zip(grads, lrs)):
        scale = optimizer.clip_factor(optimizer.global_norm(g), hyper.clip_norm)
        p, state = optimizer.update(
            hyper, rules, p, g, state,
            optimizer.Scalars(torch.tensor(step), torch.tensor(lr, dtype=torch.float64), scale, torch.tensor(True)),
        )  # fmt: skip
    return p, state
