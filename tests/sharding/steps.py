"""A few training steps of a tiny model, on one device and on a mesh, for comparison."""

import contextlib
import functools

import torch

from qwen3f import presets, tree
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train import state
from qwen3f.train.hyper import ADAMW
from qwen3f.train.schedule import Schedule
from sharding.fsdp import cut
from sharding.layout import Layout
from sharding.state import as_dtensors, local_shards
from tests.batches import random_batch
from tests.sharding.worlds import each, local_world, ranks_of

# Sizes differ, so that a confused dimension fails. 2 key/value heads are fewer than the 4 ranks of tp4.
DENSE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
}
ROWS, LENGTH = 8, 16
SCHEDULE = Schedule("constant", 1e-2, 10)


def config(**changes):
    return presets.get("debug").replace(**(DENSE | changes))


def batches(steps, rows=ROWS):
    """Packed rows. The numbers of predicted tokens and of padding differ from row to row."""
    out = []
    for seed in range(steps):
        batch = random_batch(rows, LENGTH, DENSE["vocab_size"], seed)
        padding = torch.arange(LENGTH) >= LENGTH - torch.arange(rows)[:, None] % 5
        batch["segments"] = batch["segments"].masked_fill(padding, 0)
        batch["targets"] = batch["targets"].masked_fill(padding, -100)
        out.append(batch)
    return out


@functools.cache
def _whole(cfg, dtype, microbatches, steps, hyper):
    current = state.init_state(cfg, 0, hyper, dtype=dtype)
    step = make_train_step(cfg, hyper, SCHEDULE, microbatches=microbatches)
    history = [(current, {})]
    for batch in batches(steps):
        history.append(step(history[-1][0], batch))
    return history


def on_one_device(cfg, *, dtype=torch.float64, microbatches=1, steps=3, hyper=ADAMW):
    """[(state, metrics)], before the first step and after each."""
    return _whole(cfg, dtype, microbatches, steps, hyper)


def share(batch, shape, rank, microbatches):
    """The rows of a rank. dr, dp and ep, which are adjacent axes of the mesh, cut the rows of every micro-batch."""
    parts = shape.dr * shape.dp * shape.ep
    place = rank // (shape.cp * shape.tp) % parts
    return {k: torch.cat([p.chunk(parts)[place] for p in x.chunk(microbatches)]) for k, x in batch.items()}


def cut_state(whole, placed, axes):
    """Cut a state of whole tensors into this rank's shards."""
    opt = type(whole.opt)(*(cut(params, placed, axes) for params in whole.opt))
    return whole._replace(params=cut(whole.params, placed, axes), opt=opt)


@contextlib.contextmanager
def local_run(
    cfg, mesh, *, fsdp=True, microbatches=1, steps=3, dtype=torch.float64, gather_dtype=None, hyper=ADAMW, **options
):
    """Yield (training step, first state, batches) on a mesh whose ranks all run in this process (local_world)."""
    start = state.init_state(cfg, 0, hyper, dtype=dtype)
    inputs = batches(steps)  # made outside of local_world: inside, random numbers differ from rank to rank
    with local_world(mesh) as (device_mesh, axes):
        layout, shape = Layout(axes, fsdp, gather_dtype=gather_dtype), axes.shape
        on_all = tree.map(lambda x: each([x] * shape.size), start)
        current = as_dtensors(cut_state(on_all, layout.place(cfg), axes), cfg, layout, device_mesh)
        step = make_train_step(cfg, hyper, SCHEDULE, microbatches=microbatches, layout=layout, **options)
        shares = [[share(batch, shape, rank, microbatches) for rank in range(shape.size)] for batch in inputs]
        yield step, current, [{k: each([s[k] for s in on_ranks]) for k in on_ranks[0]} for on_ranks in shares]


def on_local_world(cfg, mesh, **options):
    """[(state, metrics)] after each step on a mesh; a leaf is the list of all ranks' values. Options: local_run's."""
    history = []
    with local_run(cfg, mesh, **options) as (step, current, inputs):
        for batch in inputs:
            current, metrics = step(current, batch)
            history.append(values_of(current, metrics))
    return history


def values_of(state, metrics):
    """A step's (state, metrics) with each leaf as a list: its value on every rank."""
    return tree.map(_values, local_shards(state)), tree.map(_values, metrics)


def _values(x):
    return ranks_of(x) if hasattr(x, "_local_tensors") else [x]


def expected_on(whole, cfg, mesh, fsdp=True):
    """Cut a state of whole tensors for a mesh. As in on_local_world, each leaf is the list of all ranks' shards."""
    with local_world(mesh) as (_, axes):
        on_all = tree.map(lambda x: each([x] * axes.shape.size), whole)
        return tree.map(_values, cut_state(on_all, Layout(axes, fsdp).place(cfg), axes))
