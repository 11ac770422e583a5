"""The training loop of every stage: it draws data, runs steps, logs metrics, evaluates and saves checkpoints.

A run's side effects happen here; the step itself is pure.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.config import ModelConfig
from qwen3f.data.loader import Loader, LoaderOptions, Share
from qwen3f.errors import UserError
from qwen3f.eval import hook as benchmarks
from qwen3f.interop import source
from qwen3f.processes.world import ALONE, World
from qwen3f.train import workdir as W
from qwen3f.train.balance import heat_map
from qwen3f.train.evaluations import Evaluations
from qwen3f.train.feed import Feed
from qwen3f.train.guards.gc import short_pauses
from qwen3f.train.guards.kept_batch import keep_batch
from qwen3f.train.guards.nonfinite import FiniteCheck
from qwen3f.train.guards.signals import StopRequest
from qwen3f.train.guards.spikes import LossSpike, SpikeGuard
from qwen3f.train.guards.watchdog import watchdog
from qwen3f.train.lock import only_writer
from qwen3f.train.logger import Logger, MetricLogger, SilentLogger
from qwen3f.train.metrics import peak_flops, peak_source
from qwen3f.train.microbatches import check_agreed, described
from qwen3f.train.next_steps import next_steps
from qwen3f.train.objective import Objective
from qwen3f.train.readings import Readings, number
from qwen3f.train.reporting import Reporting
from qwen3f.train.restore import Start, open_checkpoints, roll_back, starting_state
from qwen3f.train.saving import Saver
from qwen3f.train.setup import Setup, make_setup
from qwen3f.train.stage import Run, Stage, StageModule, find_stage
from qwen3f.train.step import StepOptions, TrainStep, make_train_step

MakeStep = Callable[[ModelConfig, Objective, StepOptions], TrainStep]


@dataclasses.dataclass(frozen=True)
class Session:
    """The objects that a run uses from its start to its end.

    run: as the stage got it. stop: set by signals. resolved: the configuration, JSON-like. progress: as in `run`.
    """

    run: Run
    stage: Stage
    checkpoints: Checkpointer
    stop: StopRequest
    resolved: dict[str, Any]
    progress: bool
    make_step: MakeStep

    @property
    def setup(self) -> Setup:
        return self.run.setup

    @property
    def workdir(self) -> Path:
        return self.run.workdir

    @property
    def world(self) -> World:
        return self.run.world


def run(
    config: ConfigDict,
    workdir: Path,
    progress: bool = True,
    world: World = ALONE,
    *,
    stage: StageModule | None = None,
    make_step: MakeStep = make_train_step,
) -> dict[str, float]:
    """Train as `config` says, from the last checkpoint in `workdir` if there is one. Returns the evaluators' values.

    progress: whether to draw a bar. world: the ranks of config.mesh, which all call this together. They share
    `workdir`; only rank 0 writes there, except for checkpoints. stage: replaces the one that config.stage names.
    make_step: (model, objective, options) -> the step.
    SIGTERM or SIGINT, to any rank, ends the run after its current step, with a checkpoint; the same command resumes it.
    Raises UserError, with the workdir unchanged, if the run cannot start; TrainingError if it fails later.
    """
    setup = make_setup(config, world.size).on(world.axes)
    check_agreed(world.gather(setup.microbatches))
    module = stage or find_stage(config.stage)
    module.check(setup)
    benchmarks.check(setup)
    resolved = json.loads(config.to_json_best_effort())
    with (
        only_writer(workdir, world),
        StopRequest() as stop,  # encloses the checkpoints, so that a signal does not cut off the wait for the last one
        open_checkpoints(setup, workdir, world) as checkpoints,
    ):
        W.check_same_run(workdir, resolved)
        if config.init_from and W.read_config(workdir) is None:
            source.check_same_model(config.init_from, setup.model)
        place = Run(setup, workdir, world, progress and world.main, lambda: bool(world.highest(bool(stop.name))))
        made = world.first_on_host(lambda: benchmarks.with_benchmarks(place, module.make(place)), UserError)
        made = made.complete(made)
        session = Session(place, made, checkpoints, stop, resolved, progress, make_step)
        start = starting_state(setup, checkpoints, world)
        left = max(0, config.steps - number(start.state.step))
        made.check_covers(number(start.state.position) + left * config.batch_size)
        spikes = SpikeGuard(setup.spikes, start.meta.get("spikes", {}))
        while True:
            made.load(start.meta.get("stage", {}))
            with _open_logger(session, number(start.state.step)) as logger:
                try:
                    return _train(session, start, spikes, logger)
                except LossSpike as spike:
                    # the steps wrote into start's storage (it is donated), so it has to be restored
                    start, spikes = _behind_spike(session, start, spikes, spike, logger)


def _train(s: Session, start: Start, spikes: SpikeGuard, logger: Logger) -> dict[str, float]:
    """Train from `start` to the last step, or until a signal. Returns the evaluators' last values."""
    config, stage, first = s.setup.config, s.stage, number(start.state.step)
    tokenizer = s.world.first(W.keep_tokenizer(s.workdir, stage.tokenizer) if s.world.main else None)
    options = s.setup.step_options(
        stage.updates,
        microbatch_rows=stage.microbatch_rows,
        cross_documents=stage.cross_documents,
        donate=True,
        before_update=s.checkpoints.join,
    )
    train_step = s.make_step(s.setup.model, stage.objective, options)
    evaluations = Evaluations(stage.evaluators, logger)
    readings = Readings(s.setup, first, s.world.size, stage.objective.reports, stage.figures)
    _announce(s, first, logger)
    reporting = Reporting(s.run, stage, first, logger.write)
    s.checkpoints.prepare(start.state)
    state, step, stopped = start.state, first, False
    with _open_feed(s, start) as feed, _watch(s) as alive, short_pauses() as settle:
        finite = FiniteCheck(config.nonfinite_skips, _keeper(s, options), logger.write, spikes.judge)
        save = Saver(s.checkpoints, config.checkpoint.on_failure, _meta(s, spikes, feed, tokenizer), logger)
        for step in range(first + 1, config.steps + 1):
            batch = _next(feed, state, step - 1, first, finite, save)
            if batch is None:
                step, stopped = step - 1, True
                break
            state, metrics = train_step(state, batch)
            finite(step, metrics, batch, feed.position, feed.consumed)
            last, values = step == config.steps, {}
            due, saving = evaluations.due(step, last), save.due(step, last)
            if step % config.log_every == 0 or last or step == first + 1:
                finite.flush()
                values = readings.read(step, metrics, state, batch)
                for index, text in enumerate(stage.texts()):
                    logger.text(step, f"text/{index}", text)
            if due or saving:
                finite.flush()  # evaluate and save a state only after its update is known to be finite
            if due and not s.run.stopping():  # after a signal there is no time for an evaluation
                values |= evaluations.run(due, step, state.params)
                if "expert_load" in metrics:
                    logger.image(step, "expert_load", heat_map(metrics["expert_load"]))
            if step == first + 1:
                settle()
            if values:
                logger.log(step, values)
            if due or step == first + 1:
                evaluations.say_lacking(config.checkpoint, values)
            if due:
                reporting.evaluated(step, metrics)
            logger.advance(step, values.get("loss"), values.get("tokens_per_sec"))
            if saving:
                save(step, state, values, last)
            alive()
            if due or saving:  # not training time
                readings.restart(step)
        stopped = stopped or (step > first and s.run.stopping())
        if stopped:
            finite.flush()
            if step > first:
                save.keep(step, state)
            save.finish()
            reporting.ended(step)
            asked = [name for name in s.world.gather(s.stop.name) if name]
            logger.write(f"{asked[0]}: stopped after step {step}; the same command resumes from there")
            return evaluations.values
    if step == first:
        logger.write(f"at step {first} of {config.steps}: nothing left to train; raise --config.steps to train further")
        evaluations.run(evaluations.due(first, True), first, state.params)
    stage.finish(state, logger)
    save.finish()
    for line in (*next_steps(s.workdir, s.setup.model, step, stage.next), *reporting.ended(step)):
        logger.write(line)
    return evaluations.values


def _next(
    feed: Feed, state: Any, done: int, first: int, finite: FiniteCheck, save: Saver
) -> dict[str, torch.Tensor] | None:
    """The next step's batch. If the data ends or cannot be read, save a checkpoint before the error is raised."""
    try:
        return feed.next(state)
    except UserError:
        finite.flush()
        if done > first:
            save.keep(done, state)
        raise


@contextlib.contextmanager
def _open_logger(s: Session, start: int) -> Iterator[Logger]:
    """Rank 0's logger; it also writes config.json. Other ranks get a logger that does nothing."""
    if not s.world.main:
        yield SilentLogger()
        return
    config = s.setup.config
    with MetricLogger(
        s.workdir,
        total_steps=config.steps,
        start_step=start,
        wandb_mode=config.wandb,
        run_config=s.resolved,
        progress=s.progress,
    ) as logger:
        for change in W.write_config(s.workdir, s.resolved, start):
            logger.write(f"config changed: {change}")
        yield logger


def _open_feed(s: Session, start: Start) -> Feed:
    setup, config, position = s.setup, s.setup.config, number(start.state.position)
    # with microbatch_rows, prepare makes the rows, so the order of the loader's rows does not matter
    parts = 1 if s.stage.microbatch_rows else setup.microbatches * s.stage.updates
    loader = Loader(
        s.stage.dataset,
        config.batch_size,
        config.seed,
        position,
        setup.device,
        setup.model.vocab_size,
        LoaderOptions(
            workers=config.data.workers,
            share=Share(*setup.layout.axes.rows, parts),
            state=start.meta.get("data"),
        ),
    )
    return Feed(loader, config.batch_size, position, s.stage, s.stop, s.world)


def _watch(s: Session) -> contextlib.AbstractContextManager[Callable[[], None]]:
    who = f"rank {s.world.rank} of {s.world.size}" if s.world.size > 1 else "the run"
    return watchdog(s.setup.config.watchdog, who)


def _keeper(s: Session, options: StepOptions) -> Callable[[int, Any], str]:
    parts = options.microbatches * options.updates
    return lambda step, batch: keep_batch(s.workdir, step, batch, s.world, s.setup.layout.axes, parts)


def _meta(s: Session, spikes: SpikeGuard, feed: Feed, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """() -> the meta that is saved beside a state. tokenizer: sizes and checksums of its files."""

    def meta() -> dict[str, Any]:
        known = {"config": s.resolved, W.TOKENIZER: tokenizer, "spikes": spikes.record, "data": feed.state}
        return {**known, "stage": s.stage.save()}

    return meta


def _behind_spike(
    s: Session, start: Start, guard: SpikeGuard, spike: LossSpike, logger: Logger
) -> tuple[Start, SpikeGuard]:
    """After a spike: the last checkpoint, with its position in the data order moved behind the spike, and its guard.

    The state of a streaming data set stays the checkpoint's: the loader skips the examples in between.
    """
    Saver(s.checkpoints, s.setup.config.checkpoint.on_failure, dict, logger).wait()
    before, meta = roll_back(s.setup, s.checkpoints, start.state, s.world)
    first = number(before.position)
    guard = guard.rolled_back(spike, meta.get("spikes", {}), first)
    logger.write(
        f"{spike}; back to step {int(before.step)}, skipping examples {first} to {spike.end - 1} of the data order "
        f"(rollback {guard.record['rollbacks']} of {s.setup.spikes.rollbacks})"
    )
    return Start(before._replace(position=torch.full_like(before.position, spike.end)), meta), guard


def _announce(s: Session, start: int, logger: Logger) -> None:
    setup, cfg, shape = s.setup, s.setup.model, s.setup.layout.axes.shape
    dtype, peak = str(setup.compute_dtype).removeprefix("torch."), peak_flops(setup.device) * s.world.size
    logger.write(
        f"model: {cfg.total_params_estimate():,} parameters, {cfg.num_hidden_layers} layers, rotary base "
        f"{cfg.rope_theta:,.12g} over {cfg.max_position_embeddings:,} positions; {dtype} on {setup.device}, "
        f"compile={setup.execution.compile}; MFU against {peak / 1e12:.4g} TFLOP/s ({peak_source(setup.device)})"
    )
    if shape.size > 1:
        logger.write(f"mesh: {shape}, {shape.size} ranks")
    if not setup.config.microbatches:
        logger.write(described(setup.microbatches, setup.config.batch_size, setup.layout.axes))
    for line in s.stage.lines:
        logger.write(line)
    for index, text in enumerate(s.stage.samples):
        logger.text(start, f"train/{index}", text)
        logger.write(f"--- train {index}\n{text}")
    if start:
        logger.write(f"resuming from step {start}")
