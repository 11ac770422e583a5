"""What a run begins with: its corpus, and its state (resumed, taken from another run, or fresh)."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3f import tree
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.checkpoint.shards import shards
from qwen3f.data.corpus import Corpus, prepare
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.params import Params
from qwen3f.processes.world import ALONE, World
from qwen3f.train import workdir as W
from qwen3f.train.setup import Plan
from qwen3f.train.state import TrainState, from_params, init_state
from sharding.state import local_shards


def open_checkpoints(plan: Plan, workdir: Path, world: World = ALONE) -> Checkpointer:
    """The run's checkpoints, by config.checkpoint. Raises UserError for values that they can't have."""
    options = plan.config.checkpoint
    keep = Retention(
        options.keep, options.keep_every, options.keep_best, metric=options.best_metric, mode=options.best_mode
    )
    return Checkpointer(
        workdir / W.CHECKPOINTS,
        options.every,
        keep,
        options.asynchronous,
        options.backend,
        options.timeout,
        world=world,
        shard_of=shards(plan.model, plan.layout) if world.size > 1 else None,
    )


class Start(NamedTuple):
    """state: to train on from. meta: saved with it, {} if it is of no checkpoint."""

    state: TrainState
    meta: dict[str, Any]


def open_corpus(plan: Plan, workdir: Path, progress: bool) -> Corpus:
    """The corpus, with the tokenizer as configured, else the run's own, else init_from's, else one trained on it.

    Raises UserError, before reading the corpus, when a new run's init_from holds another model.
    """
    data = plan.data
    if plan.config.init_from and W.read_config(workdir) is None:
        source.check_same_model(plan.config.init_from, plan.model)
    if not data.tokenizer:
        if (workdir / W.TOKENIZER).exists():
            data = dataclasses.replace(data, tokenizer=str(workdir / W.TOKENIZER))
        elif plan.config.init_from:
            data = dataclasses.replace(data, tokenizer=str(source.tokenizer_path(plan.config.init_from)))
    corpus = prepare(data, plan.config.seq_len, progress)
    here, there = corpus.tokenizer.vocab_size, plan.model.vocab_size
    # Qwen3's embedding has rows beyond its tokenizer's last id; a trained tokenizer fills the model's vocabulary.
    if here > there or (here < there and not corpus.tokenizer.pads_vocab):
        raise UserError(
            f"the tokenizer {corpus.tokenizer.path} has {here} tokens and the model {there}; write "
            f"--config.model.vocab_size={here} or another --config.data.tokenizer"
        )
    return corpus


def starting_state(plan: Plan, checkpoints: Checkpointer, world: World = ALONE) -> Start:
    """The state to go on from: config.resume's or the last checkpoint, else init_from's weights, else fresh.

    A damaged last checkpoint is named, and the one before it used. Checkpoints later than the one used are moved aside,
    never deleted. Raises DamagedCheckpoint if config.resume's, or every one, is damaged.
    """
    steps = world.first(checkpoints.steps())  # on a network's file system others may see the last one late
    if plan.config.resume is not None or steps:
        like = init_state(plan.model, 0, plan.optimizer, device=plan.device, layout=plan.layout, mesh=world.mesh)
        candidates = steps[::-1] if plan.config.resume is None else [plan.config.resume]
        return _restored(checkpoints, like, candidates, plan.config.checkpoint.cast)
    return Start(_first_state(plan, world), {})


def roll_back(plan: Plan, checkpoints: Checkpointer, state: TrainState, world: World = ALONE) -> Start:
    """The last whole checkpoint, or, if there is none yet, what the run began with; in the storage of `state`.

    As in `starting_state`, checkpoints that are damaged are named and moved aside.
    """
    checkpoints.wait()
    live = local_shards(state)
    if steps := world.first(checkpoints.steps()):
        like = tree.map(lambda leaf: leaf.to("meta"), live)  # a second state might not fit on the device
        before, meta = _restored(checkpoints, like, steps[::-1], plan.config.checkpoint.cast)
    else:
        before, meta = Start(local_shards(_first_state(plan, world)), {})
    tree.map(lambda leaf, saved: leaf.copy_(saved), live, before)
    return Start(state, meta)


def _first_state(plan: Plan, world: World) -> TrainState:
    place = {"layout": plan.layout, "mesh": world.mesh}
    if not plan.config.init_from:
        return init_state(plan.model, plan.config.seed, plan.optimizer, device=plan.device, **place)
    return from_params(plan.model, _weights(plan, world), plan.config.seed, plan.optimizer, **place)


def _restored(checkpoints: Checkpointer, like: TrainState, candidates: list[int], cast: bool) -> Start:
    """The first of the candidates' checkpoints that is whole; later ones are moved aside."""
    for number, step in enumerate(candidates, 1):
        try:
            start = Start(*checkpoints.restore(like, step, cast))
            if aside := checkpoints.set_aside(step):
                print(f"checkpoints after step {step} were moved to {aside}", flush=True)
            return start
        except DamagedCheckpoint as error:
            if number == len(candidates):
                raise
            print(f"{error}; trying step {candidates[number]}", flush=True)
    raise AssertionError("unreachable: there is a candidate, which is returned or raises")


def _weights(plan: Plan, world: World) -> Params:
    """init_from's, as float32 master weights, this rank's shards. Says which rotary settings the run changes."""
    place = plan.config.init_from
    backend = plan.config.checkpoint.backend
    params = source.read_params(place, plan.model, plan.device, torch.float32, backend, plan.layout, world)
    for change in source.rotary_changes(place, plan.model):
        print(f"config.init_from={place}: {change}", flush=True)
    return params
