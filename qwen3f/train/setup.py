"""From a configuration to the checked, typed objects that any run is made of. Nothing is read but the config."""

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
    """A run, decided. config holds the plain numbers (steps, batch_size, …), already checked."""

    config: ConfigDict
    model: ModelConfig
    optimizer: AdamW
    spikes: SpikePolicy
    execution: model.Execution
    device: torch.device
    compute_dtype: torch.dtype
    layout: Layout  # whose axes have sizes alone, until there are ranks: `on`
    microbatches: int  # config.microbatches, or for 0 the number chosen

    def on(self, axes: Axes) -> "Setup":
        """The setup as a rank has it that stands at a place of the mesh. UserError when that is another mesh."""
        if axes.shape != self.layout.axes.shape:
            raise UserError(
                f"config.mesh={self.config.mesh} asks for {self.layout.axes.shape.size} devices and there are "
                f"{axes.shape.size} ranks; start the run by launch.py"
            )
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, axes=axes))

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the state's parameters and moments: float32, where that is no less than the compute dtype."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def step_options(self, updates: int = 1, **others: Any) -> StepOptions:
        """How the run's step is made. updates: of the optimizer in one."""
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
    """Raises UserError, naming key and value, for anything that cannot run. devices: for a mesh that fills them."""
    checks.check(config)
    device = find_device(config.device)
    asked = device.type == "cuda" and not config.microbatches
    return setup_on(config, device, parse_hardware(config.hardware, this_card()) if asked else None, devices)


def setup_on(config: ConfigDict, device: torch.device, hardware: Hardware | None, devices: int | None = None) -> Setup:
    """The setup as of a device that need not be here; what a run refuses, a plan does too.

    config: as checks.check has passed it. hardware: as microbatches.resolve takes it. devices, and what is raised: as
    make_setup has them.
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
    _check_mesh(config, cfg, hyper, execution, layout, parts)
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
    hyper: AdamW,
    execution: model.Execution,
    layout: Layout,
    parts: int,
) -> None:
    """What no rank could run, as long as there is none."""
    shape = layout.axes.shape
    layout.place(cfg)
    rules.check_batch(shape, config.batch_size, config.seq_len, parts)
    if shape.pp > 1:
        pipeline.check(cfg, layout.pipeline, execution.compile, shape.pp, parts)
    check_mesh(cfg, hyper, execution, layout)
    microbatches.check_evaluation(config, parts, layout.axes)
    if shape.size > 1 and config.checkpoint.backend == "dcp":
        raise UserError("config.checkpoint.backend=dcp saves one device's state; write orbax for a mesh")


def _check_graph(config: ConfigDict, device: torch.device, compute_dtype: torch.dtype) -> None:
    """torch 2.11's compiler takes a random state that efficient attention keeps on the CPU for one on the device, and
    writes other results of the graph there: "CUDA driver error: invalid argument"."""
    own = config.attention in ("flash", "reference")
    if config.compile == "step" and device.type == "cuda" and compute_dtype == torch.float32 and not own:
        raise UserError(
            f"config.compile=step with config.dtype=float32 on CUDA and config.attention={config.attention}: torch's "
            "efficient attention can't be part of that graph; write --config.attention=flash or --config.compile=block"
        )


def find_schedule(config: ConfigDict, updates: int = 1) -> Schedule:
    """The schedule of config.schedule; it counts updates, of which a step has so many. Raises UserError."""
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
    """checks.steps_of. Raises UserError for less than 0."""
    at_least(config, key, 0)
    return checks.steps_of(config, key, updates)
