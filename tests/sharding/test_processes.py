"""The step in processes over gloo equals one device: uncompiled, compiled by the block, as one graph."""

import functools

import pytest
import torch
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

EAGER = {
    "dense": (config(gradient_checkpointing="selective"), "dp2,tp2", {}),
    "kept weights": (config(gradient_checkpointing="selective"), "dp2,tp2", {"reshard": False}),
    # FSDP over cp, tensor parallel and ring attention in one block
    "context": (config(gradient_checkpointing="selective", attention_bias=True), "cp2,tp2", {}),
    "replicas": (config(num_hidden_layers=1), "dr2,dp2", {}),
    # Three layers in two stages: one row of padding. Shards stay in the master dtype, here also the compute dtype.
    "pipeline": (config(num_hidden_layers=3), "pp2,dp2", {"gather_dtype": torch.float64}),
    "pipeline, tied, tp": (config(tie_word_embeddings=True), "pp2,tp2", {"pipeline": Pipeline("zero_bubble")}),
    "moe": (config(**MOE), "dp2,ep2", {}),
}
# Tracing takes the time here, in every process. A push runs one case, in two processes; the nightly run has the others.
COMPILED = {
    "block, cp": (config(gradient_checkpointing="selective", attention_bias=True, num_hidden_layers=1), "cp2", "block"),
    "block, cp and tp": (config(gradient_checkpointing="selective", attention_bias=True), "cp2,tp2", "block"),
    "one graph, dp": (config(num_hidden_layers=1), "dp2", "step"),
    "one graph, dp and tp": (config(num_hidden_layers=1), "dp2,tp2", "step"),
}
STEPS = 2


def on_processes(rank, eager, compiled):
    """Case -> metrics, parameters and validation after STEPS steps."""
    out = {}
    for name in eager:
        cfg, mesh, options = EAGER[name]
        out[name] = trained(rank, cfg, mesh, options, "off")
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for name in compiled:
        cfg, mesh, mode = COMPILED[name]
        out[name] = trained(rank, cfg, mesh, {}, mode)
    return out


def trained(rank, cfg, mesh, options, mode):
    shape, microbatches = parse_mesh(mesh), microbatches_in(mode)
    device_mesh = make_mesh(shape, "cpu")
    layout = Layout(axes_of(device_mesh), **options)
    current = init_state(cfg, 0, dtype=torch.float64, layout=layout, mesh=device_mesh)
    execution = {"layout": layout, "execution": model.Execution(compile=mode), "compute_dtype": torch.float64}
    step = make_train_step(cfg, AdamW(), SCHEDULE, donate=True, microbatches=microbatches, **execution)
    for batch in batches(STEPS):
        mine = share(batch, shape, rank, microbatches)
        current, metrics = step(current, mine)
    assert all(isinstance(x, DTensor) for x in tree.leaves(current))
    whole = {path: x.full_tensor() for path, x in current.params.items()}
    whole = restore(cfg, whole, make_slices(cfg, layout.pipeline, shape.pp))
    sums = make_eval_step(cfg, **execution)(current.params, mine) if mode == "off" else None
    return metrics, whole, sums


def microbatches_in(mode):
    """One where the step is one graph: each micro-batch is repeated in the graph and in the time to build it."""
    return 1 if mode == "step" else 2


def compiled_pipeline(rank, mesh):
    """Metrics of two steps, uncompiled and compiled by the block: bfloat16 weights, gradients summed in float32."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    cfg, shape = config(num_hidden_layers=2), parse_mesh(mesh)
    device_mesh = make_mesh(shape, "cpu")
    layout, out = Layout(axes_of(device_mesh)), []
    for mode in ("off", "block"):
        block_fn.cache_clear()
        current = init_state(cfg, 0, layout=layout, mesh=device_mesh)
        how = model.Execution(compile=mode, attention="sdpa")  # "auto" would attend by document, but only uncompiled
        execution = {"layout": layout, "execution": how, "compute_dtype": torch.bfloat16}
        step = make_train_step(cfg, AdamW(), SCHEDULE, microbatches=2, **execution)
        for batch in batches(STEPS):
            current, metrics = step(current, share(batch, shape, rank, 2))
        out.append(metrics)
    return out


def assert_equal_one_device(cfg, mode, of_ranks):
    microbatches = microbatches_in(mode)
    state, metrics = on_one_device(cfg, steps=STEPS, microbatches=microbatches)[-1]
    validation = make_eval_step(cfg)(state.params, batches(STEPS)[-1])
    for found, params, sums in of_ranks:
        torch.testing.assert_close(found, metrics, rtol=0, atol=1e-10)
        torch.testing.assert_close(params, state.params, rtol=0, atol=1e-10)
        if mode == "off":
            torch.testing.assert_close(sums, validation, rtol=0, atol=1e-10)


def test_four_processes_equal_one_device():
    got = run_processes(on_processes, 4, list(EAGER), [])
    for name, (cfg, *_) in EAGER.items():
        assert_equal_one_device(cfg, "off", [rank[name] for rank in got])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "one graph, dp" else pytest.mark.nightly) for name in COMPILED]
)
def test_compiled_processes_equal_one_device(name):
    cfg, mesh, mode = COMPILED[name]
    got = run_processes(on_processes, parse_mesh(mesh).size, [], [name])
    assert_equal_one_device(cfg, mode, [rank[name] for rank in got])


@pytest.mark.parametrize("mesh", ["pp2", pytest.param("pp2,dp2", marks=pytest.mark.nightly)])
def test_a_compiled_pipeline_equals_an_uncompiled_one(mesh):
    """Both run the same operators in the same order, so metrics differ by rounding alone."""
    for uncompiled, by_block in run_processes(compiled_pipeline, parse_mesh(mesh).size, mesh):
        torch.testing.assert_close(by_block, uncompiled, rtol=1e-6, atol=0)
