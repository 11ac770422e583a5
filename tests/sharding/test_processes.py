"""The step in four processes over gloo equals one device: uncompiled, compiled by the block, as one graph."""

import functools

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from qwen3f import model, tree
from qwen3f.model.block import block_fn
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.state import init_state
from sharding.axes import axes_of, make_mesh
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, restore
from tests.sharding.steps import MOE, SCHEDULE, batches, config, on_one_device, share
from tests.sharding.worlds import run_processes

CASES = {
    "dense": (config(gradient_checkpointing="selective"), "dp2,tp2", {}),
    "kept weights": (config(gradient_checkpointing="selective"), "dp2,tp2", {"reshard": False}),
    "context": (config(gradient_checkpointing="selective", attention_bias=True), "cp2,tp2", {}),
    "replicas": (config(num_hidden_layers=1), "dr2,dp2", {}),
    # one row of padding; weights are given in the master dtype, which here is the compute dtype too
    "pipeline": (config(num_hidden_layers=3), "pp2,dp2", {"gather_dtype": torch.float64}),
    "pipeline, tied, tp": (config(tie_word_embeddings=True), "pp2,tp2", {"pipeline": Pipeline("zero_bubble")}),
    "moe": (config(**MOE), "dp2,ep2", {}),
    "one graph": (config(num_hidden_layers=1), "dp2,tp2", {}),
}
# "context": FSDP over cp, tensor parallel and ring attention in one block
MODES = {"context": ("off", "block"), "one graph": ("step",)}
STEPS = 2
# micro-batches are repeated in the one graph, and so is the time to build it
MICROBATCHES = {name: 1 if name == "one graph" else 2 for name in CASES}


def on_processes(rank):
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    out = {}
    for name, (cfg, mesh, options) in CASES.items():
        shape = parse_mesh(mesh)
        device_mesh = make_mesh(shape, "cpu")
        layout = Layout(axes_of(device_mesh), **options)
        for mode in MODES.get(name, ("off",)):
            block_fn.cache_clear()
            current = init_state(cfg, 0, dtype=torch.float64, layout=layout, mesh=device_mesh)
            execution = {"layout": layout, "execution": model.Execution(compile=mode), "compute_dtype": torch.float64}
            step = make_train_step(cfg, AdamW(), SCHEDULE, donate=True, microbatches=MICROBATCHES[name], **execution)
            for batch in batches(STEPS):
                mine = share(batch, shape, rank, MICROBATCHES[name])
                current, metrics = step(current, mine)
            assert all(isinstance(x, DTensor) for x in tree.leaves(current))
            whole = {path: x.full_tensor() for path, x in current.params.items()}
            whole = restore(cfg, whole, make_slices(cfg, layout.pipeline, shape.pp))
            sums = make_eval_step(cfg, **execution)(current.params, mine) if mode == "off" else None
            out[name, mode] = metrics, whole, sums
    return out, compiled_pipeline()


def compiled_pipeline():
    """Metrics of two steps with bfloat16 weights and float32 sums of their gradients, uncompiled and by the block."""
    cfg, shape = config(num_hidden_layers=2), parse_mesh("pp2,dp2")
    device_mesh = make_mesh(shape, "cpu")
    layout, out = Layout(axes_of(device_mesh)), []
    for mode in ("off", "block"):
        block_fn.cache_clear()
        current = init_state(cfg, 0, layout=layout, mesh=device_mesh)
        execution = {"layout": layout, "execution": model.Execution(compile=mode), "compute_dtype": torch.bfloat16}
        step = make_train_step(cfg, AdamW(), SCHEDULE, microbatches=2, **execution)
        for batch in batches(STEPS):
            current, metrics = step(current, share(batch, shape, dist.get_rank(), 2))
        out.append(metrics)
    return out


def test_four_processes_equal_one_device():
    got, compiled = zip(*run_processes(on_processes, 4))
    for uncompiled, by_block in compiled:  # the same operators in the same order
        torch.testing.assert_close(by_block, uncompiled, rtol=1e-6, atol=0)
    for name, mode in got[0]:
        cfg = CASES[name][0]
        state, metrics = on_one_device(cfg, steps=STEPS, microbatches=MICROBATCHES[name])[-1]
        validation = make_eval_step(cfg)(state.params, batches(STEPS)[-1])
        for rank in range(4):
            found, params, sums = got[rank][name, mode]
            torch.testing.assert_close(found, metrics, rtol=0, atol=1e-10)
            torch.testing.assert_close(params, state.params, rtol=0, atol=1e-10)
            if sums is not None:
                torch.testing.assert_close(sums, validation, rtol=0, atol=1e-10)
