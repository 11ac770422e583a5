"""The collectives that a plan predicts are those that a training step makes: their number and bytes, counted; and a
rank's state has the size that the plan says.

One rank of a mesh runs a whole step over torch's fake process group, whose collectives return at once, and a dispatch
mode counts them. The mode makes an all-to-all return its input, so that routing is even between ranks. Ranks of a
pipeline tell each other shapes, so they are gloo processes.
"""

import collections

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3f import presets
from qwen3f.model import EAGER
from qwen3f.params import init_params
from qwen3f.plan.case import Case
from qwen3f.plan.hardware import TABLE
from qwen3f.plan.make import make
from qwen3f.train import losses
from qwen3f.train.hyper import AdamW, Muon, parse_rates
from qwen3f.train.objective import NEXT_TOKEN, MicroBatch, Objective
from qwen3f.train.pipelined import make_pipelined_gradients
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state
from qwen3f.train.step import StepOptions, make_train_step
from sharding import ring
from sharding.axes import axes_of, make_mesh
from sharding.fsdp import cut
from sharding.layout import Layout, find_gather_dtype
from sharding.mesh import AXES, parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, store
from sharding.state import as_dtensors
from tests.batches import random_batch
from tests.sharding.worlds import run_processes
from tests.vision.hf_vl import vl_config

OPS = {
    "all_gather_into_tensor": "gather",
    "all_gather_into_tensor_coalesced": "gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}
ROWS, LENGTH = 8, 64
SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "head_dim": 16, "vocab_size": 256}


class Counted(TorchDispatchMode):
    """Counts functional collectives in `seen`: (operation, axes) -> [calls, bytes]. names: a process group's axes."""

    def __init__(self, names):
        super().__init__()
        self.names, self.seen = names, collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qwen3f" and "ring_attention" in func._opname:  # count what is inside
            with self:
                return (ring.backward if "backward" in func._opname else ring.forward)(*args)
        out = func(*args, **(kwargs or {}))
        name = func._opname.rstrip("_")
        if func.namespace == "_c10d_functional" and name in OPS:
            line = self.seen[OPS[name], self.names[args[-1]]]
            line[0] += 1
            sent = out if OPS[name] == "gather" else args[0]
            line[1] += sum(x.nbytes for x in (sent if isinstance(sent, list) else [sent]))
            return args[0].clone() if name == "all_to_all_single" else out
        return out


def axes_and_names(device_mesh):
    """This rank's Axes, and a process group's name -> its axes."""
    axes = axes_of(device_mesh)
    names = {axes[name].group: (name,) for name in AXES if axes[name].size > 1}
    return axes, names | {axis.group: tuple(axis.name.split("_")) for axis in axes.joint}


def make_step(cfg, hyper, microbatches, layout):
    objective = Objective("scores", token=lambda scores, batch: (scores, {})) if cfg.scalar_head else NEXT_TOKEN
    schedule = Schedule("constant", 1e-3, 100)
    options = StepOptions(hyper, schedule, microbatches=microbatches, compute_dtype=torch.bfloat16, layout=layout)
    return make_train_step(cfg, objective, options)


def make_batch(cfg, rows):
    batch = random_batch(rows, LENGTH, cfg.vocab_size)
    if cfg.vision_enabled:  # in each row a picture that is one token
        side = cfg.vision_merger_spatial_factor
        batch["pixel_values"] = torch.rand(rows, side**2, cfg.vision_patch_values)
        batch["grids"] = torch.tensor([1, side, side], dtype=torch.int32).expand(rows, 1, 3)
        batch["visual_index"] = (torch.arange(LENGTH) == 3).to(torch.int32).expand(rows, -1).contiguous()
        batch["positions"] = batch["positions"].unsqueeze(1).expand(-1, 3, -1).contiguous()
    return batch


def counted(cfg, mesh, layout_options, microbatches, hyper):
    shape = parse_mesh(mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shape.size)
    try:
        device_mesh = make_mesh(shape, "cpu")
        axes, names = axes_and_names(device_mesh)
        options = {"reduce": "compute"} | layout_options
        layout = Layout(axes, gather_dtype=find_gather_dtype(options.pop("reduce"), torch.bfloat16), **options)
        state, placed = init_state(cfg, 0, hyper), layout.place(cfg)
        params, *moments = (cut(tree, placed, axes) for tree in (state.params, *state.opt))
        state = as_dtensors(state._replace(params=params, opt=type(state.opt)(*moments)), cfg, layout, device_mesh)
        step, batch = make_step(cfg, hyper, microbatches, layout), make_batch(cfg, ROWS // axes.rows[1])
        with Counted(names) as mode:
            step(state, batch)
        held = [sum(x.to_local().nbytes for x in tree.values()) for tree in (state.params, *state.opt)]
    finally:
        dist.destroy_process_group()
    return {key: tuple(line) for key, line in mode.seen.items()}, (held[0], sum(held[1:]))


def planned(cfg, mesh, layout_options, microbatches, hyper):
    options = {"microbatches": microbatches, "hyper": hyper, **layout_options}
    at = Case(cfg, parse_mesh(mesh), ROWS, LENGTH, TABLE["h100"], **options)
    plan, lines = make(at), collections.defaultdict(lambda: [0, 0])
    for collective in plan.collectives:
        op = "all_to_all" if collective.op == "shift" else collective.op  # sharding.collectives makes a shift by it
        line = lines[op, collective.axes]
        line[0] += collective.calls
        line[1] += collective.bytes
    memory = plan.memory[0]
    return {key: tuple(line) for key, line in lines.items()}, (memory.parameters, memory.optimizer)


@pytest.mark.parametrize(
    "preset, mesh, policy, microbatches, layout",
    [
        ("debug", "dp2", "none", 1, {}),
        ("debug", "tp2", "none", 1, {}),
        ("debug", "cp2", "none", 1, {}),
        ("debug", "cp4", "full", 1, {}),
        ("debug", "dp4", "none", 2, {"fsdp": False}),
        ("debug", "dp2,tp2", "full", 1, {}),
        ("debug", "dp2,tp2", "selective", 2, {}),
        ("debug", "dp2,cp2,tp4", "selective", 2, {"reshard": False}),
        ("debug_moe", "dp2,tp2", "full", 2, {}),
        ("debug_moe", "ep2", "none", 1, {}),
        ("debug_moe", "ep4", "full", 1, {}),
        ("debug_moe", "dp2,ep2,cp2,tp2", "selective", 2, {}),
        ("debug_moe", "dp2,ep2,tp2", "none", 1, {"fsdp": False}),
        ("debug", "dr2", "none", 1, {}),
        ("debug", "dr2,dp2,cp2,tp2", "selective", 2, {}),
        ("debug_moe", "dr2,ep2", "none", 2, {}),
        ("debug_moe", "dr2,dp2,ep2,cp2", "full", 1, {"reduce": "float32"}),
        ("debug", "dr2,dp2,tp2", "none", 1, {"fsdp": False}),
        ("debug", "dp2,tp2", "selective", 2, {"reduce": "float32"}),
    ],
)
def test_a_step_makes_the_collectives_that_were_planned(preset, mesh, policy, microbatches, layout):
    """Calls and bytes are exactly equal, and so are the bytes of parameters and moments that the rank holds."""
    cfg = presets.get(preset).replace(**SMALL, gradient_checkpointing=policy)
    assert counted(cfg, mesh, layout, microbatches, AdamW()) == planned(cfg, mesh, layout, microbatches, AdamW())


@pytest.mark.parametrize(
    "preset, mesh, fsdp",
    [
        ("debug", "dp2", True),  # three layers over two ranks
        ("debug", "dr2,dp2,cp2,tp2", True),
        ("debug", "dp2,tp4", False),
        ("debug_moe", "dp2,ep2,cp2,tp2", True),
    ],
)
def test_muon_moves_what_was_planned(preset, mesh, fsdp):
    cfg, hyper = presets.get(preset).replace(**SMALL), Muon(rates=parse_rates(r".*\.q_proj\..*=0"))
    assert counted(cfg, mesh, {"fsdp": fsdp}, 1, hyper) == planned(cfg, mesh, {"fsdp": fsdp}, 1, hyper)


UNLIKE = {
    "mixed": (presets.get("debug_moe").replace(**SMALL | {"num_hidden_layers": 5}, mlp_only_layers=(0, 3)), "dp2,ep2"),
    "scores": (presets.get("debug").replace(**SMALL, scalar_head=True), "dp2,tp2"),
    "pictures": (vl_config(), "dp2"),
}


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("name", UNLIKE)
def test_what_only_some_layers_have_is_counted_there(name, policy):
    """Dense layers beside sparse ones, a head of one row, and a tower with layers of its own."""
    cfg, mesh = UNLIKE[name]
    cfg = cfg.replace(gradient_checkpointing=policy)
    assert counted(cfg, mesh, {}, 2, AdamW()) == planned(cfg, mesh, {}, 2, AdamW())


@pytest.mark.parametrize("mesh, fsdp", [("dp2", True), ("dr2,dp2,tp2", True), ("dp4", False)])
@pytest.mark.parametrize("rates", [r".*\.[qo]_proj\..*=0,.*norm.*=0", r"model\.layers\..*=0"])
def test_what_is_frozen_is_not_summed(mesh, fsdp, rates):
    """A frozen leaf that FSDP gathers together with a trained one is scattered with it; other frozen leaves are not."""
    cfg, hyper = presets.get("debug").replace(**SMALL), AdamW(rates=parse_rates(rates))
    assert counted(cfg, mesh, {"fsdp": fsdp}, 2, hyper) == planned(cfg, mesh, {"fsdp": fsdp}, 2, hyper)


PIPELINES = {
    "1f1b": ("debug", "pp2,tp2", "none", Pipeline(), "compute"),
    "replicas": ("debug_moe", "pp2,dr2", "none", Pipeline(), "compute"),
    "interleaved": ("debug", "pp2,dp2", "full", Pipeline("interleaved", 2), "float32"),
    "zero_bubble": ("debug_moe", "pp2,dp2", "none", Pipeline("zero_bubble", 2), "compute"),
    "zero_bubble, wide": ("debug_moe", "pp2,dp2", "none", Pipeline("zero_bubble", 2), "float32"),
}
PARTS = 2  # micro-batches


def of_pipeline(name):
    preset, mesh, policy, pipeline, reduce = PIPELINES[name]
    cfg = presets.get(preset).replace(**SMALL | {"num_hidden_layers": 4}, gradient_checkpointing=policy)
    return cfg, parse_mesh(mesh), pipeline, reduce


def counted_pipelines(rank):
    """Case -> the collectives that this rank of four counts in one call of its gradients."""
    out = {}
    for name in PIPELINES:
        cfg, shape, pipeline, reduce = of_pipeline(name)
        axes, names = axes_and_names(make_mesh(shape, "cpu"))
        layout = Layout(axes, pipeline=pipeline, gather_dtype=find_gather_dtype(reduce, torch.bfloat16))
        placed = layout.place(cfg)
        params = cut(store(cfg, init_params(cfg, 0), make_slices(cfg, pipeline, shape.pp)), placed, axes)
        masters = {path for path, p in placed.items() if p.fsdp and reduce == "float32"}
        params = {path: x if path in masters else x.to(torch.bfloat16) for path, x in params.items()}
        rows = ROWS // (axes.rows[1] * PARTS)
        batches = [random_batch(rows, LENGTH, cfg.vocab_size, seed) for seed in range(PARTS)]
        totals = losses.Totals(torch.tensor(1.0, dtype=torch.float64), torch.tensor(ROWS * LENGTH))
        gradients = make_pipelined_gradients(cfg, NEXT_TOKEN, EAGER, layout)
        with Counted(names) as mode:
            gradients(params, {}, params, [MicroBatch(b, b) for b in batches], totals, None)
        out[name] = {key: tuple(line) for key, line in mode.seen.items()}
    return out


@pytest.fixture(scope="module")
def pipelines_counted():
    return run_processes(counted_pipelines, 4)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_gradients_make_the_collectives_that_were_planned(name, rank, pipelines_counted):
    """For the first and the last rank. Messages between stages are left out: sharding.pipeline.cut counts them."""
    cfg, shape, pipeline, reduce = of_pipeline(name)
    at = Case(cfg, shape, ROWS, LENGTH, TABLE["h100"], microbatches=PARTS, pipeline=pipeline, reduce=reduce)
    own = ("layer", "last" if rank else "first")
    lines = collections.defaultdict(lambda: [0, 0])
    for collective in make(at).collectives:
        if collective.when.startswith(own) or collective.what == "load of experts":
            line = lines[collective.op, collective.axes]
            line[0] += collective.calls
            line[1] += collective.bytes
    assert pipelines_counted[rank][name] == {key: tuple(line) for key, line in lines.items()}
