"""A plan of one device against the step that it plans, on the GPU. Run with -n 0 -m gpu -s for the figures."""

import os
import time

import pytest
import torch

from qwen3f import model, presets
from qwen3f.plan.case import Case
from qwen3f.plan.hardware import TABLE
from qwen3f.plan.make import make
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.bench import random_batch
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state
from sharding.mesh import MeshShape

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "preset, layers, policy, microbatches",
    [
        ("qwen3-1.7b", 12, "selective", 1),
        ("qwen3-30b-a3b", 2, "none", 1),
        pytest.param("qwen3-1.7b", 12, "none", 1, marks=pytest.mark.nightly),
        pytest.param("qwen3-1.7b", 12, "full", 1, marks=pytest.mark.nightly),
        pytest.param("qwen3-1.7b", 12, "none", 2, marks=pytest.mark.nightly),
        pytest.param("qwen3-30b-a3b", 2, "selective", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_step_takes_what_was_planned(preset, layers, policy, microbatches):
    """Peak memory within 10%. Time within 15%, on the cards that the table knows, and only if pytest runs without
    workers: beside other tests on the same GPU a time says nothing."""
    cfg = presets.get(preset).replace(num_hidden_layers=layers, gradient_checkpointing=policy)
    rows, length = 4, 4096
    name = torch.cuda.get_device_name()
    hardware = TABLE["h200" if "H200" in name else "h100"]
    plan = make(Case(cfg, MeshShape(), rows, length, hardware, microbatches=microbatches))
    torch.cuda.empty_cache()
    state = init_state(cfg, 0, device="cuda")
    batch = random_batch(rows, length, cfg.vocab_size, 0)
    step = make_train_step(
        cfg,
        AdamW(),
        Schedule("constant", 3e-4, 100),
        microbatches=microbatches,
        compute_dtype=torch.bfloat16,
        execution=model.Execution(compile="block"),
        donate=True,
        cross_documents=True,
    )
    for _ in range(3):
        state, _ = step(state, batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(5):
        state, _ = step(state, batch)
    torch.cuda.synchronize()
    seconds, peak = (time.perf_counter() - begin) / 5, torch.cuda.max_memory_allocated()
    planned = plan.memory[0]
    print(
        f"\n{name}, {preset} {layers} layers {policy} m{microbatches}: {seconds * 1e3:.0f} ms, planned "
        f"{plan.time.step * 1e3:.0f}; peak {peak / 2**30:.2f} GiB, planned {planned.peak / 2**30:.2f} at {planned.at}"
    )
    assert planned.peak == pytest.approx(peak, rel=0.10)
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and ("H100" in name or "H200" in name):
        assert plan.time.step == pytest.approx(seconds, rel=0.15)
