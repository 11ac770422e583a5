"""Groups for tests, without a model: a sampler that returns given texts, and a judge that runs in this process."""

from types import SimpleNamespace

import torch

from qwen3f.processes.world import ALONE
from qwen3f.rl import prepare as R
from qwen3f.rl.judge import Judged
from qwen3f.rl.questions import Asked
from qwen3f.rl.rollout import Rollout
from qwen3f.tasks.task import Question
from sharding.axes import ONE


class Letters:
    """A tokenizer whose ids are the code points of characters."""

    pad_id = 0

    def decode(self, ids):
        return "".join(map(chr, ids))


class Said:
    """A sampler that returns given texts. texts: prompt -> its completions."""

    def __init__(self, texts, longest=50):
        self.texts, self.options, self.asked = texts, SimpleNamespace(max_new_tokens=longest, temperature=1.0), []

    def __call__(self, prompts, places, pictures=None):
        self.asked += list(zip(map(tuple, prompts), places))
        return [[rollout(text) for text in self.texts[Letters().decode(ids)]] for ids in prompts]


def rollout(text, ended=True):
    ids = [*map(ord, text), 1] if ended else [*map(ord, text)]
    return Rollout(tuple(ids), tuple(-0.5 for _ in ids), ended)


class Here:
    """A judge whose rewards are functions of a sample. None means that a function cannot judge, and becomes NaN."""

    def __init__(self, **rewards):
        self.names, self.rewards, self.weights, self.seen = tuple(rewards), rewards, (1.0,) * len(rewards), []

    def __call__(self, samples):
        self.seen += samples
        found = {name: [reward(s) for s in samples] for name, reward in self.rewards.items()}
        values = {name: [float("nan") if v is None else v for v in row] for name, row in found.items()}
        failures = {f"{name}: cannot be judged": row.count(None) for name, row in found.items() if None in row}
        return Judged(values, failures)


def asked(*prompts):
    return [Asked("t", None, Question(text, gold="x"), tuple(map(ord, text))) for text in prompts]


def batch(*numbers, first=0):
    return {"index": torch.arange(first, first + len(numbers)), "question": torch.tensor(numbers)}


def tools(sampler, judge, world=ALONE, axes=ONE):
    return R.Tools(sampler, judge, Letters(), world, axes)


def options(**changes):
    fields = {
        "baseline": "mean", "scale": "none", "combine": "sum_then_normalize", "draws": 1, "mask_truncated": False,
        "correction": "none", "low": 0.0, "high": 2.0, "top_entropy": 1.0, "trust_sampler": False, "seq_len": 64,
        "rows": 1, "updates": 1, "least_parts": 1, "thinking": True,
    }  # fmt: skip
    return R.Options(**(fields | changes))


def length(sample):
    return float(len(sample.text))
