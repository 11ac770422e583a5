"""Measures the training step of launch.py on a given batch."""

from typing import NamedTuple

import torch

from qwen3f import model
from qwen3f.bench.report import clock, compute_dtype, peak_gib, reset_peak
from qwen3f.config import ModelConfig
from qwen3f.train.choices import find_compile_mode
from qwen3f.train.objective import Batch, Objective
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state
from qwen3f.train.step import StepOptions, make_train_step


class StepTime(NamedTuple):
    """seconds: time of a step. peak: memory in GiB, None without a GPU."""

    seconds: float
    peak: float | None


def step_time(
    cfg: ModelConfig,
    objective: Objective,
    batch: Batch,
    *,
    master: torch.dtype = torch.float32,
    cross_documents: bool = False,
    repeats: int = 10,
) -> StepTime:
    """Measures a step on the batch's device: random weights in the dtype `master`, passes in the compute dtype,
    compiled blocks on a GPU, and the donated fused update."""
    device, hyper = batch["tokens"].device, AdamW()
    options = StepOptions(
        hyper,
        Schedule("constant", 1e-5, 100),
        compute_dtype=compute_dtype(device),
        execution=model.Execution(find_compile_mode("auto", device)),
        cross_documents=cross_documents,
        donate=True,
    )
    step = make_train_step(cfg, objective, options)
    reset_peak(device)
    state = init_state(cfg, 0, hyper, device=device, dtype=master)

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)

    seconds = clock(run, device, repeats if device.type == "cuda" else 2, warm=3)
    return StepTime(seconds, peak_gib(device))
