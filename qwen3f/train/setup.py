"""From a configuration to the checked, typed objects that a run consists of. Reads no files."""

import dataclasses
from typing import Any

import torch
from ml_collections import ConfigDict

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.interop.config import check_size
from qwen3f.model.attention import check_heads
from qwen3f.model.execution import refuse_dropout
from qwen3f.params import abstract_params
from qwen3f.plan.hardware import Hardware, parse_hardware, this_card
from qwen3f.train import checks, microbatches, optimizer
from qwen3f.train.checks import at_least
from qwen3f.train.choices import find_device, find_dtype, find_execution, find_layout
from qwen3f.train.guards.spikes import SpikePolicy
from qwen3f.train.hyper import AdamW, make_hyper
from qwen3f.train.schedule import Schedule
from qwen3f.train.step import StepOptions, check_mesh, check_recomputation
from sharding import rules
from sharding.axes import Axes
from sharding.layout import Layout
from sharding.pipeline import schedule as pipeline


@dataclasses.dataclass(frozen=True)
class Setup:
    """The checked settings of a run. config has the plain numbers (steps, batch_size, …), also checked."""

    config: ConfigDict
    model: ModelConfig
    optimizer: AdamW
    spikes: SpikePolicy
    execution: model.Execution
    device: torch.device
    compute_dtype: torch.dtype
    layout: Layout  # its axes have sizes only; once ranks exist, `on` adds groups and indices
    microbatches: int  # config.microbatches, or the number chosen if that is 0

    def on(self, axes: Axes) -> "Setup":
        """The setup of one rank, with the axes that it has joined. UserError if they are of another mesh."""
        if axes.shape != self.layout.axes.shape:
            raise UserError(
                f"config.mesh={self.config.mesh} needs {self.layout.axes.shape.size} devices, but there are "
                f"{axes.shape.size} ranks; start the run by launch.py"
            )
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, axes=axes))

    @property
    def master_dtype(self) -> torch.dtype:
        """The dtype of the state's parameters and moments: float32 (float64 if the compute dtype is float64)."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def step_options(self, updates: int = 1, **others: Any) -> StepOptions:
        """The StepOptions of the run. updates: optimizer updates per step."""
        return StepOptions(
            self.optimizer,
            find_schedule(self.config, updates),
            microbatches=self.microbatches,
            updates=updates,
            compute_dtype=self.compute_dtype,
            execution=self.execution,
            layout=self.layout,
            **others,
        )


def make_setup(config: ConfigDict, devices: int | None = None) -> Setup:
    """The setup for this machine. devices: the number that fills a size of -1 in config.mesh.

    Raises UserError, with key and value, for a configuration that cannot run.
    """
    checks.check(config)
    device = find_device(config.device)
    asked = device.type == "cuda" and not config.microbatches
    return setup_on(config, device, parse_hardware(config.hardware, this_card()) if asked else None, devices)


def setup_on(config: ConfigDict, device: torch.device, hardware: Hardware | None, devices: int | None = None) -> Setup:
    """The setup for a device that this machine may lack. Plans use it, so that they refuse what a run refuses.

    config: after checks.check. hardware: as for microbatches.resolve. devices and errors: as for make_setup.
    """
    check_size(cfg := checks.find_model(config), "config.model")
    compute_dtype = find_dtype(config.dtype, device)
    layout = find_layout(config, devices, compute_dtype)
    execution = find_execution(config, device)
    check_heads(cfg, execution.attention, layout.axes.cp.size)
    refuse_dropout(cfg, execution)
    hyper = make_hyper(**config.optimizer.to_dict())
    optimizer.check_rates(hyper, abstract_params(cfg))
    check_recomputation(cfg, execution)
    _check_graph(config, device, compute_dtype)
    parts = microbatches.resolve(config, cfg, hyper, execution, layout, compute_dtype, hardware)
    _check_mesh(config, cfg, execution, layout, parts)
    find_schedule(config)
    return Setup(
        config=config,
        model=cfg,
        optimizer=hyper,
        spikes=SpikePolicy(**config.spike.to_dict()),
        execution=execution,
        device=device,
        compute_dtype=compute_dtype,
        layout=layout,
        microbatches=parts,
    )


def _check_mesh(
    config: ConfigDict,
    cfg: ModelConfig,
    execution: model.Execution,
    layout: Layout,
    parts: int,
) -> None:
    """UserError for a mesh that the run's ranks could not use; called before any rank exists."""
    shape = layout.axes.shape
    layout.place(cfg)
    rules.check_batch(shape, config.batch_size, config.seq_len, parts)
    if shape.pp > 1:
        pipeline.check(cfg, layout.pipeline, execution.compile, shape.pp, parts)
    check_mesh(cfg, execution, layout)
    microbatches.check_evaluation(config, parts, layout.axes)
    if shape.size > 1 and config.checkpoint.backend == "dcp":
        raise UserError("config.checkpoint.backend=dcp saves one device's state; write orbax for a mesh")


def _check_graph(config: ConfigDict, device: torch.device, compute_dtype: torch.dtype) -> None:
    """UserError for a graph that torch 2.11 compiles wrongly. Efficient attention keeps a random state on the CPU; the
    compiler treats it as a tensor on the device, and the step fails with "CUDA driver error: invalid argument"."""
    own = config.attention in ("flash", "reference")
    if config.compile == "step" and device.type == "cuda" and compute_dtype == torch.float32 and not own:
        raise UserError(
            f"config.compile=step with config.dtype=float32 on CUDA and config.attention={config.attention}: torch "
            "can't compile its efficient attention into that graph; write --config.attention=flash or "
            "--config.compile=block"
        )


def find_schedule(config: ConfigDict, updates: int = 1) -> Schedule:
    """The schedule of config.schedule, which counts updates. updates: updates per step. Raises UserError."""
    s = config.schedule
    return Schedule(
        kind=s.kind,
        peak=s.peak_lr,
        total_steps=config.steps * updates,
        warmup_steps=share_of_steps(config, "schedule.warmup", updates),
        min_lr=s.peak_lr * s.min_ratio,
        decay_steps=share_of_steps(config, "schedule.decay", updates) if s.kind == "wsd" else 0,
        decay_shape=s.decay_shape,
    )


def share_of_steps(config: ConfigDict, key: str, updates: int = 1) -> int:
    """As checks.steps_of; UserError for a negative value."""
    at_least(config, key, 0)
    return checks.steps_of(config, key, updates)
