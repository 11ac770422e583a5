"""The training loop: data in, steps, metrics and checkpoints out. The effects of a run happen here."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from qwen3f.data.corpus import Corpus, gzip_bits_per_byte
from qwen3f.data.loader import Loader
from qwen3f.data.packing import limit_context
from qwen3f.data.stream.dataset import State as DataState
from qwen3f.errors import UserError
from qwen3f.infer.generate import generate
from qwen3f.params import Params
from qwen3f.stages import pretrain
from qwen3f.train import workdir as W
from qwen3f.train.balance import heat_map
from qwen3f.train.checkpoint import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.train.evaluate import evaluate
from qwen3f.train.finite import FiniteCheck
from qwen3f.train.logger import MetricLogger
from qwen3f.train.metrics import Throughput, flops_per_token, peak_flops, peak_source
from qwen3f.train.plan import Plan, make_plan
from qwen3f.train.signals import StopRequest
from qwen3f.train.spikes import LossSpike, SpikeGuard
from qwen3f.train.start import open_checkpoints, open_corpus, roll_back, starting_state
from qwen3f.train.state import TrainState
from qwen3f.train.watchdog import watchdog


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> dict[str, float]:
    """Train as `config` says, from where `workdir` stands; returns the last validation metrics.

    SIGTERM or SIGINT ends it after the step it is in, with a checkpoint; the same command then goes on from there.
    Raises UserError, with nothing in the workdir changed, when the run cannot start; TrainingError when it breaks.
    """
    plan = make_plan(config)
    resolved = json.loads(config.to_json_best_effort())
    W.check_same_run(workdir, resolved)
    with (
        StopRequest() as stop,  # the outermost: it also waits for the last checkpoint
        open_checkpoints(plan, workdir) as checkpoints,
    ):
        corpus = open_corpus(plan, workdir, progress)
        corpus.check_covers(config.steps * config.batch_size, config.seed)
        state, meta = starting_state(plan, checkpoints)
        data = meta.get("data")
        guard = SpikeGuard(plan.spikes, meta.get("spikes", {}))
        while True:
            start = int(state.step)
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
                W.keep_tokenizer(workdir, corpus.tokenizer)
                try:
                    return _train(plan, workdir, corpus, state, data, checkpoints, logger, resolved, stop, guard)
                except LossSpike as spike:
                    # `state` is what the steps wrote into: they have it donated.
                    state, guard, data = _behind_spike(plan, checkpoints, state, guard, spike, logger)


def _train(
    plan: Plan,
    workdir: Path,
    corpus: Corpus,
    state: TrainState,
    data: DataState | None,
    checkpoints: Checkpointer,
    logger: MetricLogger,
    resolved: dict[str, Any],
    stop: StopRequest,
    guard: SpikeGuard,
) -> dict[str, float]:
    config = plan.config
    start, rows = int(state.step), config.batch_size
    step_options = {
        "compute_dtype": plan.compute_dtype,
        "execution": plan.execution,
        "cross_documents": config.data.cross_documents,
    }
    train_step = pretrain.make_train_step(
        plan.model,
        plan.optimizer,
        plan.schedule,
        microbatches=config.microbatches,
        donate=True,
        before_update=checkpoints.join,
        **step_options,
    )
    validate = _validator(plan, corpus, pretrain.make_eval_step(plan.model, **step_options), stop)
    flops, peak = flops_per_token(plan.model, config.seq_len), peak_flops(plan.device)
    _announce(plan, corpus, start, peak, logger)

    def dump(step: int, place: int, count: int) -> Path:
        return W.keep_batch(workdir, step, loader.rebuild(place))

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
            int(state.position),
            plan.device,
            plan.model.vocab_size,
            workers=config.data.workers,
            state=data,
        ) as loader,
        watchdog(config.watchdog) as alive,
    ):
        first = int(state.position)
        for step in range(start + 1, config.steps + 1):
            try:
                batch = next(loader)
            except UserError:  # a stream's end, or data that cannot be read: what was trained so far is not lost
                check.flush()
                checkpoints.wait()
                if step - 1 not in (start, *checkpoints.steps()):
                    save(step - 1, state, True, {})
                raise
            if step <= plan.context_warmup_steps:
                batch = limit_context(batch, config.context_warmup.length)
            state, metrics = train_step(state, batch)
            check(step, metrics, first, rows)
            first += rows
            last = step == config.steps
            values: dict[str, float] = {}
            if step % config.log_every == 0 or last or step == start + 1:
                check.flush()
                scalars = (name for name, value in metrics.items() if value.dim() == 0)
                values = {name: metrics[name].item() for name in scalars if name not in ("tokens", "finite")}
                speed, watch = watch.advance(step * rows * config.seq_len, time.perf_counter())
                values |= {"tokens_per_sec": speed, "mfu": speed * flops / peak, "tokens_seen": int(state.tokens_seen)}
                values |= corpus.train_metrics(batch)
                if plan.device.type == "cuda":
                    values["peak_memory_gib"] = torch.cuda.max_memory_allocated(plan.device) / 2**30
            evaluating = last or (config.eval.every and step % config.eval.every == 0)
            evaluating = evaluating and not stop.name  # a signal leaves no time for it
            saving = checkpoints.should_save(step, last or bool(stop.name))
            if evaluating or saving:
                check.flush()  # a state is judged and saved only once its update is known to be sound
            if evaluating:
                values |= (validation := validate(state.params))
                logger.write(f"step {step}: {_shown(validation)}")
                saving = saving or bool(stop.name)  # it came meanwhile
                if plan.model.sparse_layers:
                    logger.image(step, "expert_load", heat_map(metrics["expert_load"]))
            if values:
                logger.log(step, values)
            logger.advance(step, values.get("loss"), values.get("tokens_per_sec"))
            if saving:
                save(step, state, last or bool(stop.name), values)
            alive()
            if evaluating or saving:  # neither counts as training time
                watch = Throughput(step * rows * config.seq_len, time.perf_counter())
            if saving and stop.name:
                logger.write(f"{stop.name}: stopped after step {step}; the same command goes on from there")
                return validation
    if not validation:
        logger.write(f"at step {start} of {config.steps}: nothing left to train; raise --config.steps to go on")
        validation = validate(state.params)
        logger.write(f"step {start}: {_shown(validation)}")
    if config.eval.compare_gzip:
        logger.write(
            f"gzip -9 on the same held-out text: {gzip_bits_per_byte(corpus.sources.values()):.4f} bits a byte"
        )
    _samples(plan, corpus, state, logger)
    return validation


def _behind_spike(
    plan: Plan, checkpoints: Checkpointer, state: TrainState, guard: SpikeGuard, spike: LossSpike, logger: MetricLogger
) -> tuple[TrainState, SpikeGuard, DataState | None]:
    """What to go on with: the last checkpoint, with its place in the data order moved behind the spike.

    A stream's state, the last, stays the checkpoint's: the loader passes over what lies between.
    """
    try:
        checkpoints.wait()
    except CheckpointWriteError as error:
        _go_on(plan, logger, error)
    before, meta = roll_back(plan, checkpoints, state)
    first = int(before.position)
    guard = guard.rolled_back(spike, meta.get("spikes", {}), first)
    logger.write(
        f"{spike}; back to step {int(before.step)}, and on without examples {first} to {spike.end - 1} of the data "
        f"order (rollback {guard.record['rollbacks']} of {plan.spikes.rollbacks})"
    )
    return before._replace(position=torch.full_like(before.position, spike.end)), guard, meta.get("data")


def _go_on(plan: Plan, logger: MetricLogger, error: CheckpointWriteError) -> None:
    """Say that a save failed; or raise it, by config.checkpoint.on_failure."""
    if plan.config.checkpoint.on_failure == "stop":
        raise error
    logger.write(f"{error}; going on, as config.checkpoint.on_failure says")


class _Stopped(Exception):
    pass


def _validator(
    plan: Plan, corpus: Corpus, eval_step: Callable[..., Any], stop: StopRequest
) -> Callable[[Params], dict[str, float]]:
    """validate(parameters) -> metrics; {} if a signal came before it was through."""

    def step(*args: Any) -> Any:
        if stop.name:
            raise _Stopped
        return eval_step(*args)

    options = {
        "seq_len": plan.config.seq_len,
        "batch_size": plan.config.eval.batch_size,
        "vocab_size": plan.model.vocab_size,
        "max_docs": plan.config.eval.max_docs,
        "device": plan.device,
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


def _announce(plan: Plan, corpus: Corpus, start: int, peak: float, logger: MetricLogger) -> None:
    cfg = plan.model
    dtype = str(plan.compute_dtype).removeprefix("torch.")
    logger.write(
        f"model: {cfg.total_params_estimate():,} parameters, {cfg.num_hidden_layers} layers; {dtype} on {plan.device}, "
        f"compile={plan.execution.compile}; MFU against {peak / 1e12:.4g} TFLOP/s ({peak_source(plan.device)})"
    )
    for line in corpus.describe():
        logger.write(line)
    if start:
        logger.write(f"going on from step {start}")


def _samples(plan: Plan, corpus: Corpus, state: TrainState, logger: MetricLogger) -> None:
    """Continue each prompt and show it; the model runs as it trained, but uncompiled: each length is used once."""
    options = plan.config.sample
    params = {path: leaf.to(plan.compute_dtype) for path, leaf in state.params.items()}
    cfg = dataclasses.replace(plan.model, gradient_checkpointing="none")
    for number, prompt in enumerate(options.prompts if options.tokens else ()):
        ids = corpus.tokenizer.encode(prompt)
        tokens = torch.tensor([ids or [corpus.tokenizer.eos_id]], device=plan.device)
        out = generate(cfg, params, tokens, max_new_tokens=options.tokens, temperature=options.temperature, seed=number)
        text = corpus.tokenizer.decode(out[0].tolist())
        logger.text(int(state.step), f"sample/{number}", text)
        logger.write(f"--- sample {number}\n{text}")
