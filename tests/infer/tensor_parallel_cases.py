"""Two GPUs over NCCL answer as one: python -m tests.infer.tensor_parallel_cases [cuda|cpu].

With cpu the same cases run without GPUs, which shows only that the parts fit together.

float32, with CUDA graphs. Every rank has two engines: one on its own GPU, and one over both GPUs. Their answers are
compared. Sums over ranks and over splits have a different order, which may change a close choice. So at least 22 of 24
answers must be the same token by token, with log-probabilities within 1e-3. The answers of the two ranks must always be
the same.
"""

import gc
import os
import sys

import torch

from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.sampling import GREEDY
from qwen3f.infer.tensor_parallel import generation_layout
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.processes import ranks
from sharding.mesh import MeshShape
from sharding.state import cut_params
from tests.infer.test_engine import FILTERED, SAMPLED, random_prompts
from tests.infer.test_fused import CASES, build

WAYS = [GREEDY, SAMPLED, FILTERED] * 8
NAMES = ("dense", "tied, bias", "moe, every second layer")
# (options, max_tokens). The second case has so few pages that rows are preempted.
ROOMS = ((EngineOptions(), 8192), (EngineOptions(rows=7, chunk=64, page_size=16), 256))


def check(world, device):
    tp = world.axes.tp
    for name in NAMES:
        cfg, whole = build(vocab_size=96, **CASES[name])
        whole = {path: leaf.to(device) for path, leaf in whole.items()}
        other = {path: leaf.flip(0) if leaf.dim() == 2 else leaf for path, leaf in whole.items()}
        layout = generation_layout(cfg, tp)
        prompts = random_prompts(24, cfg)
        for options, room in ROOMS:
            shared = EngineOptions(options.rows, options.chunk, options.page_size, tp)
            alone = Engine(cfg, whole, seed=2, num_ids=91, max_tokens=room, options=options)
            both = Engine(cfg, cut_params(cfg, whole, layout), seed=2, num_ids=91, max_tokens=room, options=shared)
            for weights in (whole, other, whole):
                alone.update(weights)
                both.update(cut_params(cfg, weights, layout))
                for budget in (None, ThinkingBudget(3, end_id=90, closing_ids=(70, 90, 71))):
                    asked = {"max_new_tokens": [6 + i % 16 for i in range(24)], "budget": budget}
                    compare(world, alone.generate(prompts, WAYS, **asked), both.generate(prompts, WAYS, **asked))
        print(f"{name}: as one device", flush=True)
    # no max_tokens: as much as there is room for
    engine = Engine(cfg, cut_params(cfg, whole, layout), options=EngineOptions(tp=tp))
    engine.generate(prompts, WAYS, max_new_tokens=4)
    assert len(set(world.gather(engine._device.max_tokens))) == 1


def compare(world, expected, found):
    ids = [one.ids for one in found]
    assert world.first(ids) == ids, f"rank {world.rank} says something else than rank 0"
    same = [(a, b) for a, b in zip(found, expected) if a.ids == b.ids]
    assert len(same) >= 22, f"only {len(same)} of 24 answers are the same"
    for a, b in same:
        assert torch.tensor(a.logprobs).sub(torch.tensor(b.logprobs)).abs().max() <= 1e-3


def main(device):
    command = ["-m", "tests.infer.tensor_parallel_cases", device]
    decision = ranks.decide(os.environ, 2, ranks.local_devices(device), device, command)
    if decision.mode == "start":
        return ranks.start(decision, command)
    with ranks.joined(decision, MeshShape(tp=2), timeout=120) as world:
        check(world, device)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["cuda"])))
