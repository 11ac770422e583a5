"""What a run starts with: its tokenizer, and its state (resumed, from init_from's weights, or new)."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3f import params as P
from qwen3f import tree
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.checkpoint.shards import param_shards, shards
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.params import Params
from qwen3f.processes.world import ALONE, World
from qwen3f.train import workdir as W
from qwen3f.train.setup import Setup
from qwen3f.train.state import TrainState, from_params, init_state
from sharding.state import as_dtensors, init_shards, local_shards


def open_checkpoints(setup: Setup, workdir: Path, world: World = ALONE) -> Checkpointer:
    """A Checkpointer for the run, as config.checkpoint says. Raises UserError for invalid values."""
    options = setup.config.checkpoint
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
        shard_of=shards(setup.model, setup.layout) if world.size > 1 else None,
    )


class Start(NamedTuple):
    """state: the state to continue from. meta: saved with it; {} if it is not from a checkpoint."""

    state: TrainState
    meta: dict[str, Any]


def find_tokenizer(setup: Setup, workdir: Path) -> str:
    """The path of the run's tokenizer: config.data.tokenizer, else the one in the workdir, else init_from's; "" if the
    stage must train one."""
    if setup.config.data.tokenizer:
        return setup.config.data.tokenizer
    if (workdir / W.TOKENIZER).exists():
        return str(workdir / W.TOKENIZER)
    return str(source.tokenizer_path(setup.config.init_from)) if setup.config.init_from else ""


def check_tokenizer(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """UserError unless the tokenizer's vocabulary fits the model's."""
    here, there = tokenizer.vocab_size, cfg.vocab_size
    # Qwen3's embedding has more rows than its tokenizer has ids; a trained tokenizer has exactly the model's vocabulary
    if here > there or (here < there and not tokenizer.pads_vocab):
        raise UserError(
            f"the tokenizer {tokenizer.path} has {here} tokens and the model {there}; write "
            f"--config.model.vocab_size={here} or another --config.data.tokenizer"
        )


def starting_state(setup: Setup, checkpoints: Checkpointer, world: World = ALONE) -> Start:
    """The state to continue from: the checkpoint of config.resume, else the last one, else init_from's weights, else a
    new state.

    config.resume goes back only once. If the last checkpoint is of a later step and was saved by a run with the same
    config.resume, the run has already gone back, and resumes from the last checkpoint.

    A damaged last checkpoint is reported, and the one before it is used. Checkpoints later than the used one are moved
    aside, never deleted. Raises DamagedCheckpoint if that of config.resume, or every one, is damaged.
    """
    # rank 0's list, because on a network file system other ranks may see the last checkpoint late
    candidates = world.first(_candidates(checkpoints, setup.config.resume) if world.main else None)
    if candidates:
        state, meta = _restored(checkpoints, _shapes(setup), candidates, setup.config.checkpoint.cast)
        state = tree.map(lambda leaf: leaf.to(setup.device), state)
        return Start(state if world.mesh is None else as_dtensors(state, setup.model, setup.layout, world.mesh), meta)
    return Start(_first_state(setup, world), {})


def _candidates(checkpoints: Checkpointer, resume: int | None) -> list[int]:
    """The steps of the checkpoints to try, in this order; none for a new run."""
    steps = checkpoints.steps()
    if resume is None:
        return steps[::-1]
    last = next(filter(None, (_config(checkpoints, step) for step in steps[::-1] if step > resume)), {})
    if last.get("resume") != resume:
        return [resume]
    print(
        f"config.resume={resume}: the run has already gone back to this step and has later checkpoints, so it resumes "
        f"from the last one; to go back again, move the later checkpoints out of {checkpoints.directory}",
        flush=True,
    )
    return [step for step in steps[::-1] if step >= resume]


def _config(checkpoints: Checkpointer, step: int) -> dict[str, Any]:
    """The configuration that a checkpoint was saved with; {} for a damaged one, which is reported when it is tried."""
    try:
        return checkpoints.read_meta(step).get("config", {})
    except DamagedCheckpoint:
        return {}


def roll_back(setup: Setup, checkpoints: Checkpointer, state: TrainState, world: World = ALONE) -> Start:
    """The last undamaged checkpoint, or, if there is none yet, the run's first state; copied into `state`'s storage.

    As in `starting_state`, damaged checkpoints are reported and moved aside.
    """
    checkpoints.wait()
    live = local_shards(state)
    if steps := world.first(checkpoints.steps()):
        like = tree.map(lambda leaf: leaf.to("meta"), live)  # the device may have no room for a second state
        before, meta = _restored(checkpoints, like, steps[::-1], setup.config.checkpoint.cast)
    else:
        before, meta = Start(local_shards(_first_state(setup, world)), {})
    tree.map(lambda leaf, saved: leaf.copy_(saved), live, before)
    return Start(state, meta)


def _first_state(setup: Setup, world: World) -> TrainState:
    seed, place = setup.config.seed, _place(setup, world)
    if not setup.config.init_from:
        return init_state(setup.model, seed, setup.optimizer, dtype=setup.master_dtype, **place)
    del place["device"]  # the parameters'
    return from_params(setup.model, initial_weights(setup, world), seed, setup.optimizer, **place)


def _shapes(setup: Setup) -> TrainState:
    """This rank's state on the meta device, without values: the device may have no room for a second state."""
    shapes = {path: shard.local for path, shard in param_shards(setup.model, setup.layout).items()}
    params = {path: torch.empty(shape, dtype=setup.master_dtype, device="meta") for path, shape in shapes.items()}
    return from_params(setup.model, params, 0, setup.optimizer)


def _place(setup: Setup, world: World) -> dict[str, Any]:
    return {"device": setup.device, "layout": setup.layout, "mesh": world.mesh}


def _restored(checkpoints: Checkpointer, like: TrainState, candidates: list[int], cast: bool) -> Start:
    """The first of the candidates' checkpoints that is not damaged; later ones are moved aside."""
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


def initial_weights(setup: Setup, world: World) -> Params:
    """init_from's weights, in the master dtype, this rank's shards. Parameters that init_from lacks are initialised.

    Prints which of the model's settings the run changes (source.CHANGEABLE), and which parameters are initialised.
    """
    place = setup.config.init_from
    backend = setup.config.checkpoint.backend
    params = source.read_params(place, setup.model, setup.device, setup.master_dtype, backend, setup.layout, world)
    if fresh := [path for path in P.abstract_params(setup.model) if path not in params]:
        print(f"config.init_from={place} has no {', '.join(fresh)}; it starts fresh", flush=True)
        made = init_shards(
            setup.model, setup.config.seed, setup.layout, fresh, device=setup.device, dtype=setup.master_dtype
        )
        params = {path: {**params, **made}[path] for path in P.abstract_params(setup.model)}
    for change in source.changes(place, setup.model):
        print(f"config.init_from={place}: {change}", flush=True)
    return params
