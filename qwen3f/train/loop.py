"""The training loop: data in, steps, metrics and checkpoints out. The effects of a run happen here."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.data.corpus import Corpus, gzip_bits_per_byte
from qwen3f.data.loader import Loader, Share
from qwen3f.data.packing.concat import limit_context
from qwen3f.data.stream.dataset import State as DataState
from qwen3f.errors import UserError
from qwen3f.eval.heldout import evaluate
from qwen3f.infer.generate import generate
from qwen3f.params import Params
from qwen3f.processes.world import ALONE, World
from qwen3f.stages import pretrain
from qwen3f.train import workdir as W
from qwen3f.train.balance import heat_map
from qwen3f.train.guards.gc import short_pauses
from qwen3f.train.guards.nonfinite import FiniteCheck
from qwen3f.train.guards.signals import StopRequest
from qwen3f.train.guards.spikes import LossSpike, SpikeGuard
from qwen3f.train.guards.watchdog import watchdog
from qwen3f.train.logger import Logger, MetricLogger, SilentLogger
from qwen3f.train.metrics import Throughput, flops_per_token, peak_flops, peak_source
from qwen3f.train.microbatches import check_agreed, described, evaluation_parts
from qwen3f.train.restore import open_checkpoints, open_corpus, roll_back, starting_state
from qwen3f.train.setup import Plan, make_plan
from qwen3f.train.state import TrainState
from sharding.state import local_shards


def run(config: ConfigDict, workdir: Path, progress: bool = True, world: World = ALONE) -> dict[str, float]:
    """Train as `config` says, from where `workdir` stands; returns the last validation metrics.

    world: the ranks of config.mesh, all of which call this together; they share `workdir`, in which only rank 0 writes
    but for the checkpoints.
    SIGTERM or SIGINT, to any rank, ends it after the step it is in, with a checkpoint; the same command then goes on
    from there. Raises UserError, with nothing in the workdir changed, when the run cannot start; TrainingError when it
    breaks.
    """
    plan = make_plan(config, world.size).on(world.axes)
    check_agreed(world.gather(plan.microbatches))
    resolved = json.loads(config.to_json_best_effort())
    W.check_same_run(workdir, resolved)
    with (
        StopRequest() as stop,  # the outermost: it also waits for the last checkpoint
        open_checkpoints(plan, workdir, world) as checkpoints,
    ):
        corpus = world.first_on_host(lambda: open_corpus(plan, workdir, progress and world.main), UserError)
        corpus.check_covers(config.steps * config.batch_size, config.seed)
        state, meta = starting_state(plan, checkpoints, world)
        data = meta.get("data")
        guard = SpikeGuard(plan.spikes, meta.get("spikes", {}))
        while True:
            start = _number(state.step)
            with _open_logger(workdir, config, resolved, start, progress, world) as logger:
                try:
                    return _train(plan, workdir, corpus, state, data, checkpoints, logger, resolved, stop, guard, world)
                except LossSpike as spike:
                    # `state` is what the steps wrote into: they have it donated.
                    state, guard, data = _behind_spike(plan, checkpoints, state, guard, spike, logger, world)


@contextlib.contextmanager
def _open_logger(
    workdir: Path, config: ConfigDict, resolved: dict[str, Any], start: int, progress: bool, world: World
) -> Iterator[Logger]:
    """Rank 0's logger, and the run's configuration in the workdir; the other ranks' loggers do nothing."""
    if not world.main:
        yield SilentLogger()
        return
    with MetricLogger(
        workdir,
        total_steps=config.steps,
        start_step=start,
        wandb_mode=config.wandb,
        run_config=resolved,
        progress=progress,
    ) as logger:
        for change in W.write_config(workdir, resolved, start):
            logger.write(f"config changed: {change}")
        yield logger


def _train(
    plan: Plan,
    workdir: Path,
    corpus: Corpus,
    state: TrainState,
    data: DataState | None,
    checkpoints: Checkpointer,
    logger: Logger,
    resolved: dict[str, Any],
    stop: StopRequest,
    guard: SpikeGuard,
    world: World,
) -> dict[str, float]:
    config, layout = plan.config, plan.layout
    start, position, rows = _number(state.step), _number(state.position), config.batch_size
    if world.main:
        W.keep_tokenizer(workdir, corpus.tokenizer)
    step_options = {
        "compute_dtype": plan.compute_dtype,
        "execution": plan.execution,
        "cross_documents": config.data.cross_documents,
        "layout": layout,
    }
    train_step = pretrain.make_train_step(
        plan.model,
        plan.optimizer,
        plan.schedule,
        microbatches=plan.microbatches,
        donate=True,
        before_update=checkpoints.join,
        **step_options,
    )

    def stopping() -> bool:
        """Whether any rank has been asked to stop."""
        return bool(world.highest(bool(stop.name)))

    parts = evaluation_parts(config.eval.batch_size, plan.microbatches, layout.axes)
    eval_step = pretrain.make_eval_step(plan.model, microbatches=parts, **step_options)
    validate = _validator(plan, corpus, eval_step, stopping)
    flops, peak = flops_per_token(plan.model, config.seq_len), peak_flops(plan.device) * world.size
    _announce(plan, corpus, start, peak, logger)

    def dump(step: int, place: int, count: int) -> Path:
        return W.keep_batch(workdir, step, loader.rebuild(place)) if world.main else workdir

    def save(step: int, state: TrainState, last: bool, values: dict[str, float]) -> None:
        try:
            checkpoints.wait()
        except CheckpointWriteError as error:  # with the save before this one
            _go_on(plan, logger, error)
            if isinstance(error, StuckWrite) and not last:
                return
        try:
            meta = {"config": resolved, "spikes": guard.record, "data": loader.state}
            checkpoints.save(step, state, meta, values, overlap=True)
        except CheckpointWriteError as error:
            if last:
                raise
            _go_on(plan, logger, error)

    check, validation = FiniteCheck(config.nonfinite_skips, dump, logger.write, guard.judge), {}
    checkpoints.prepare(state)
    watch = Throughput(start * rows * config.seq_len, time.perf_counter())
    with (
        Loader(
            corpus.train,
            rows,
            config.seed,
            position,
            plan.device,
            plan.model.vocab_size,
            workers=config.data.workers,
            share=Share(*layout.axes.rows, plan.microbatches),
            state=data,
        ) as loader,
        watchdog(config.watchdog, f"rank {world.rank} of {world.size}" if world.size > 1 else "the run") as alive,
        short_pauses() as settle,
    ):
        first = position
        for step in range(start + 1, config.steps + 1):
            try:
                batch = world.together(lambda: next(loader), UserError)
            except UserError:  # a stream's end, or data that cannot be read: what was trained so far is not lost
                check.flush()
                checkpoints.wait()
                if step - 1 > max(start, world.first(checkpoints.latest()) or 0):
                    save(step - 1, state, True, {})
                raise
            if step <= plan.context_warmup_steps:
                batch = limit_context(batch, config.context_warmup.length)
            state, metrics = train_step(state, batch)
            check(step, metrics, first, rows)
            first += rows
            last, stopped = step == config.steps, stopping()
            values: dict[str, float] = {}
            if step % config.log_every == 0 or last or step == start + 1:
                check.flush()
                scalars = (name for name, value in metrics.items() if value.dim() == 0)
                values = {name: metrics[name].item() for name in scalars if name not in ("tokens", "finite")}
                speed, watch = watch.advance(step * rows * config.seq_len, time.perf_counter())
                values |= {
                    "tokens_per_sec": speed,
                    "mfu": speed * flops / peak,
                    "tokens_seen": _number(state.tokens_seen),
                }
                values |= corpus.train_metrics(batch)
                if plan.device.type == "cuda":
                    values["peak_memory_gib"] = torch.cuda.max_memory_allocated(plan.device) / 2**30
            evaluating = last or (config.eval.every and step % config.eval.every == 0)
            evaluating = evaluating and not stopped  # a signal leaves no time for it
            saving = checkpoints.should_save(step, last or stopped)
            if evaluating or saving:
                check.flush()  # a state is judged and saved only once its update is known to be sound
            if evaluating:
                values |= (validation := validate(state.params))
                logger.write(f"step {step}: {_shown(validation)}")
                stopped = stopping()
                saving = saving or stopped  # it came meanwhile
                if plan.model.sparse_layers:
                    logger.image(step, "expert_load", heat_map(metrics["expert_load"]))
            if step == start + 1:
                settle()
            if values:
                logger.log(step, values)
            logger.advance(step, values.get("loss"), values.get("tokens_per_sec"))
            if saving:
                save(step, state, last or stopped, values)
            alive()
            if evaluating or saving:  # neither counts as training time
                watch = Throughput(step * rows * config.seq_len, time.perf_counter())
            if saving and (stopped or stopping()):
                names = [name for name in world.gather(stop.name) if name]
                logger.write(f"{names[0]}: stopped after step {step}; the same command goes on from there")
                return validation
    if not validation:
        logger.write(f"at step {start} of {config.steps}: nothing left to train; raise --config.steps to go on")
        validation = validate(state.params)
        logger.write(f"step {start}: {_shown(validation)}")
    if config.eval.compare_gzip and world.main:
        logger.write(
            f"gzip -9 on the same held-out text: {gzip_bits_per_byte(corpus.sources.values()):.4f} bits a byte"
        )
    if world.size == 1:
        _samples(plan, corpus, state, logger)
    elif config.sample.tokens:
        logger.write("no samples from a mesh; python launch.py --config experiments/generate.py reads its checkpoints")
    return validation


def _number(scalar: Tensor) -> int:
    """Of a plain tensor, or of a DTensor, which every rank holds whole."""
    return local_shards(scalar).item()


def _behind_spike(
    plan: Plan,
    checkpoints: Checkpointer,
    state: TrainState,
    guard: SpikeGuard,
    spike: LossSpike,
    logger: Logger,
    world: World,
) -> tuple[TrainState, SpikeGuard, DataState | None]:
    """What to go on with: the last checkpoint, with its place in the data order moved behind the spike.

    A stream's state, the last, stays the checkpoint's: the loader passes over what lies between.
    """
    try:
        checkpoints.wait()
    except CheckpointWriteError as error:
        _go_on(plan, logger, error)
    before, meta = roll_back(plan, checkpoints, state, world)
    first = _number(before.position)
    guard = guard.rolled_back(spike, meta.get("spikes", {}), first)
    logger.write(
        f"{spike}; back to step {int(before.step)}, and on without examples {first} to {spike.end - 1} of the data "
        f"order (rollback {guard.record['rollbacks']} of {plan.spikes.rollbacks})"
    )
    return before._replace(position=torch.full_like(before.position, spike.end)), guard, meta.get("data")


def _go_on(plan: Plan, logger: Logger, error: CheckpointWriteError) -> None:
    """Say that a save failed; or raise it, by config.checkpoint.on_failure."""
    if plan.config.checkpoint.on_failure == "stop":
        raise error
    logger.write(f"{error}; going on, as config.checkpoint.on_failure says")


class _Stopped(Exception):
    pass


def _validator(
    plan: Plan, corpus: Corpus, eval_step: Callable[..., Any], stopping: Callable[[], bool]
) -> Callable[[Params], dict[str, float]]:
    """validate(parameters) -> metrics; {} if a signal came before it was through."""

    def step(*args: Any) -> Any:
        if stopping():
            raise _Stopped
        return eval_step(*args)

    options = {
        "seq_len": plan.config.seq_len,
        "batch_size": plan.config.eval.batch_size,
        "vocab_size": plan.model.vocab_size,
        "max_docs": plan.config.eval.max_docs,
        "device": plan.device,
        "share": Share(*plan.layout.axes.rows),
    }

    def validate(params: Params) -> dict[str, float]:
        try:
            return evaluate(step, params, corpus.heldout, **options)
        except _Stopped:
            return {}

    return validate


def _shown(validation: dict[str, float]) -> str:
    if not validation:
        return "the evaluation was broken off"
    return f"held-out loss {validation['val_loss']:.4f}, {validation['val_bpb']:.4f} bits a byte"


def _announce(plan: Plan, corpus: Corpus, start: int, peak: float, logger: Logger) -> None:
    cfg, shape = plan.model, plan.layout.axes.shape
    dtype = str(plan.compute_dtype).removeprefix("torch.")
    logger.write(
        f"model: {cfg.total_params_estimate():,} parameters, {cfg.num_hidden_layers} layers; {dtype} on {plan.device}, "
        f"compile={plan.execution.compile}; MFU against {peak / 1e12:.4g} TFLOP/s ({peak_source(plan.device)})"
    )
    if shape.size > 1:
        logger.write(f"mesh: {shape}, {shape.size} ranks")
    if not plan.config.microbatches:
        logger.write(described(plan.microbatches, plan.config.batch_size, plan.layout.axes))
    for line in corpus.describe():
        logger.write(line)
    if start:
        logger.write(f"going on from step {start}")


def _samples(plan: Plan, corpus: Corpus, state: TrainState, logger: Logger) -> None:
    """Continue each prompt and show it; the model runs as it trained, but uncompiled: each length is used once."""
    options = plan.config.sample
    params = {path: leaf.to(plan.compute_dtype) for path, leaf in state.params.items()}
    cfg = dataclasses.replace(plan.model, gradient_checkpointing="none")
    for number, prompt in enumerate(options.prompts if options.tokens else ()):
        ids = corpus.tokenizer.encode(prompt)
        tokens = torch.tensor([ids or [corpus.tokenizer.eos_id]], device=plan.device)
        out = generate(cfg, params, tokens, max_new_tokens=options.tokens, temperature=options.temperature, seed=number)
        text = corpus.tokenizer.decode(out[0].tolist())
        logger.text(_number(state.step), f"sample/{number}", text)
        logger.write(f"--- sample {number}\n{text}")
