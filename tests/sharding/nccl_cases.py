"""Every mesh of N devices against one device, in processes: NCCL on GPUs, or gloo on CPUs to try the same code.

    python -m tests.sharding.nccl_cases 4 [--cpu] [--only WORDS …]    only cases whose names contain one of the words

Tests with gloo and in one process check the algebra. This file also checks NCCL, its streams and the kernels. A case
takes three AdamW steps and evaluates after each. Every case runs in three precisions:

    float64    plain formulas. Numbers, gradients and parameters to 1e-10: only the order of sums differs
    float32    kernels. Numbers and gradients (by norm) of the first step. Numbers of later steps have a looser limit:
               where a gradient is about zero, AdamW turns its rounding error into a whole step
    bfloat16   with float32 master weights, as in training. Two rounded results need not agree, so both are compared
               with float64. The error of the mesh may be FACTOR times the error of one device
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qwen3f import model
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.state import init_state
from sharding.axes import axes_of, make_mesh
from sharding.fsdp import cut
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, store
from sharding.state import local_shards
from tests.sharding.steps import MOE, ROWS, SCHEDULE, batches, config, share

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
EXACT = 1e-10  # limit in float64
FIRST, LATER = 5e-6, 2e-5  # limits in float32: the first step, gradients by norm; numbers of all steps
FACTOR = 2.0  # bfloat16: limit over one device's error. tp rounds partial sums, and reaches 1.5 in updates
ULP = 2.0**-8  # of bfloat16: the least error assumed; in a single number one device may have less by luck

TIED = {"tie_word_embeddings": True}
THREE, SEVEN = {"num_hidden_layers": 3}, {"num_hidden_layers": 7}  # one row of padding: with two stages, with four
SELECTIVE = {"gradient_checkpointing": "selective"}
ONE_STAGE, INTERLEAVED, ZERO, ZBV = Pipeline(), Pipeline("interleaved", 2), Pipeline("zero_bubble"), Pipeline("zbv", 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Two fields matter in bfloat16 alone. compile: blocks are compiled on GPUs, as in training. master_sums: gradients
    are summed over ranks in float32."""

    mesh: str
    changes: dict = dataclasses.field(default_factory=dict)
    pipeline: Pipeline = ONE_STAGE
    fsdp: bool = True
    compile: bool = False
    master_sums: bool = False

    def __str__(self):
        words = ["moe" if "num_experts" in self.changes else "dense"]
        words += [k for k in self.changes if k not in MOE]
        words += [self.pipeline.schedule] * ("pp" in self.mesh) + ["replicated"] * (not self.fsdp)
        words += ["compiled"] * self.compile + ["master_sums"] * self.master_sums
        return f"{self.mesh}: {' '.join(words)}"

    @property
    def microbatches(self):
        """Four with a pipeline, else two; fewer where a rank has fewer rows."""
        shape = parse_mesh(self.mesh)
        return min(4 if shape.pp > 1 else 2, ROWS // (shape.dr * shape.dp * shape.ep))


def cases_of(world):
    return {2: _two, 4: _four, 8: _eight}[world]()


def _two():
    yield Case("dp2", compile=True)
    yield Case("dp2", TIED, fsdp=False)
    yield Case("dp2", SELECTIVE, master_sums=True)
    yield Case("dp2", MOE)
    yield Case("dr2")
    yield Case("tp2", compile=True)
    yield Case("tp2", MOE)
    yield Case("cp2")
    yield Case("cp2", MOE)
    yield Case("ep2", MOE)
    yield Case("pp2", THREE | TIED, compile=True)
    yield Case("pp2", SEVEN, INTERLEAVED)
    yield Case("pp2", SEVEN | MOE, Pipeline("zero_bubble", 2))
    yield Case("pp2", SEVEN | TIED, ZBV)


def _four():
    yield from _of_twos(("pp", "dr", "dp", "ep", "cp", "tp"), 2, compiled=("dp2,tp2", "cp2,tp2", "pp2,dp2"))
    yield Case("dp4", SELECTIVE, master_sums=True)
    yield Case("tp4", TIED)  # two key/value heads: each on two ranks
    yield Case("cp4")
    yield Case("ep4", MOE)
    yield Case("pp4", SEVEN | TIED)
    yield Case("pp2,dp2", SEVEN, INTERLEAVED, master_sums=True)
    yield Case("pp2,cp2", THREE, ZERO)
    yield Case("pp2,tp2", SEVEN | MOE, ZBV)
    yield Case("dp2,tp2", MOE)
    yield Case("cp2,tp2", MOE)
    yield Case("dp2,cp2", MOE | SELECTIVE)
    yield Case("pp2,dp2", MOE | THREE)


def _eight():
    yield from _of_twos(("pp", "dp", "ep", "cp", "tp"), 3, compiled=("dp2,cp2,tp2",))
    yield Case("dp8")
    yield Case("dr2,dp2,tp2", MOE)


def _of_twos(axes, count, compiled):
    """A case for each set of `count` axes, with two ranks on each axis. With ep the model has experts."""
    for names in itertools.combinations(axes, count):
        mesh = ",".join(f"{name}2" for name in names)
        changes = (MOE if "ep" in names else {}) | (THREE if "pp" in names else {})
        yield Case(mesh, changes, compile=mesh in compiled)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a run gave. numbers: [step, (loss, gradient norm, nats of an evaluation)]. grads: AdamW's first moments
    after the first step. start, end: parameters before and after the run."""

    numbers: torch.Tensor
    grads: dict
    start: dict
    end: dict


def train(cfg, layout, mesh, rank, device, dtype, compute, execution, microbatches):
    """Train three steps; return a Trace of this rank's shards. mesh=None: train on one device."""
    run = {"layout": layout, "execution": execution, "compute_dtype": compute}
    current = init_state(cfg, 0, device=device, dtype=dtype, layout=layout, mesh=mesh)
    start, grads, numbers = current.params, None, []
    step = make_train_step(cfg, AdamW(), SCHEDULE, microbatches=microbatches, **run)
    evaluate = make_eval_step(cfg, **run)
    for batch in batches(3):
        mine = share(batch, layout.axes.shape, rank, microbatches) if mesh else batch
        mine = {key: x.to(device) for key, x in mine.items()}
        current, metrics = step(current, mine)
        grads = grads or current.opt.m
        numbers.append([x.double() for x in (metrics["loss"], metrics["grad_norm"], evaluate(current.params, mine)[0])])
    numbers = torch.stack([torch.stack(row) for row in numbers])
    return Trace(numbers, *(local_shards(x) for x in (grads, start, current.params)))


@functools.cache
def on_one_device(cfg, device, dtype, compute, execution, microbatches):
    return train(cfg, ONE_DEVICE, None, 0, device, dtype, compute, execution, microbatches)


def shards_of(trace, cfg, layout):
    """Cut one device's Trace into the shards of this rank."""
    stages, placed = make_slices(cfg, layout.pipeline, layout.axes.pp.size), layout.place(cfg)
    fields = (cut(store(cfg, x, stages), placed, layout.axes) for x in (trace.grads, trace.start, trace.end))
    return Trace(trace.numbers, *fields)


def relative(found, wanted):
    return (found - wanted).abs() / wanted.abs()


def furthest(found, wanted):
    return max((found[path] - x).abs().max().item() for path, x in wanted.items())


def distance(found, wanted):
    """The norm of the error of all leaves together, divided by the norm of `wanted`."""
    off = torch.cat([(found[path].double() - x).flatten() for path, x in wanted.items()])
    return (off.norm() / torch.cat([x.double().flatten() for x in wanted.values()]).norm()).item()


def update(trace):
    return {path: x.double() - trace.start[path] for path, x in trace.end.items()}


def deviations(case, layout, mesh, rank, device, dtype):
    """{what is compared: (its error, the largest error allowed)} on this rank."""
    cfg, parts = config(**case.changes), case.microbatches
    plain = functools.partial(on_one_device, cfg, device, microbatches=parts)
    exact = plain(dtype=F64, compute=F64, execution=model.REFERENCE)
    execution = model.REFERENCE if dtype == F64 else model.EAGER
    master = F32 if dtype == BF16 else dtype
    own = plain(dtype=master, compute=dtype, execution=execution)
    if dtype == BF16:
        execution = model.Execution("block") if case.compile and device.type == "cuda" else execution
        layout = dataclasses.replace(layout, gather_dtype=BF16 if case.master_sums else None)
    found = train(cfg, layout, mesh, rank, device, master, dtype, execution, parts)
    wanted, exact = shards_of(own, cfg, layout), shards_of(exact, cfg, layout)
    numbers = relative(found.numbers, wanted.numbers)
    if dtype == F64:
        return {
            "numbers": (numbers.max().item(), EXACT),
            "gradients": (furthest(found.grads, wanted.grads), EXACT),
            "parameters": (furthest(found.end, wanted.end), EXACT),
        }
    if dtype == F32:
        leaves = {path: distance({path: found.grads[path]}, {path: x}) for path, x in wanted.grads.items() if x.any()}
        worst = max(leaves, key=leaves.get)
        return {
            "numbers of the first step": (numbers[0].max().item(), FIRST),
            "numbers": (numbers.max().item(), LATER),
            "gradients": (distance(found.grads, wanted.grads), FIRST),
            f"the gradient of {worst}": (leaves[worst], FIRST),
        }
    errors = [relative(x.numbers, exact.numbers) for x in (found, wanted)]
    pairs = {
        # not the numbers after an update: chance in the signs of AdamW's steps would hide the size of the error
        "numbers of the first step": [max(error[0, :2].max().item(), ULP) for error in errors],
        "gradients": [distance(x.grads, exact.grads) for x in (found, wanted)],
        "updates": [distance(update(x), update(exact)) for x in (found, wanted)],
    }
    return {what: (mesh_error, FACTOR * own_error) for what, (mesh_error, own_error) in pairs.items()}


def check(case, mesh, axes, rank, device, dtype):
    """Run a case. Return (words for what was measured, words for what is wrong or "")."""
    try:
        layout = Layout(axes, case.fsdp, pipeline=case.pipeline)
        found = deviations(case, layout, mesh, rank, device, dtype)
    except Exception:
        traceback.print_exc()
        return "", f"rank {rank} failed: {traceback.format_exc(limit=0).strip()}"
    words = ", ".join(f"{what} {off:.1e} of {may:.1e}" for what, (off, may) in found.items())
    wrong = [what for what, (off, may) in found.items() if not off <= may]
    return words, f"rank {rank}: {words}" if wrong else ""


def on_rank(rank, world, device_type, folder, chosen):
    torch.set_num_threads(1)
    device, options = torch.device("cpu"), {}
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        options = {"device_id": device, "timeout": datetime.timedelta(seconds=100)}
    backend = {"cpu": "gloo", "cuda": "nccl"}[device_type]
    store_ = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(backend, store=store_, rank=rank, world_size=world, **options)
    words = dist.new_group(backend="gloo")  # to gather the texts of all ranks
    meshes, unequal = {}, []
    for case in chosen:
        if case.mesh not in meshes:
            mesh = make_mesh(parse_mesh(case.mesh), device_type)
            meshes[case.mesh] = mesh, axes_of(mesh)
        for dtype in (F64, F32, BF16):
            began, told = time.perf_counter(), [None] * world
            dist.all_gather_object(told, check(case, *meshes[case.mesh], rank, device, dtype), group=words)
            wrong = [text for _, text in told if text]
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            unequal += [f"{name}: {wrong[0]}"] if wrong else []
            if rank == 0:
                taken = time.perf_counter() - began
                print(f"{'UNEQUAL' if wrong else 'equal'} {taken:5.1f} s  {name}: {wrong or told[0][0]}", flush=True)
    if rank == 0:
        Path(folder, "unequal").write_text(json.dumps(unequal))
    dist.barrier(words)
    dist.destroy_process_group()


def run(world, device_type, names=()):
    """Run the cases of `world` devices. Return one text for each case and precision that differs from one device."""
    chosen = [case for case in cases_of(world) if not names or any(name in str(case) for name in names)]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (world, device_type, folder, chosen), nprocs=world, start_method="spawn")
        return json.loads(Path(folder, "unequal").read_text())


def main():
    parser = argparse.ArgumentParser(description="Meshes against one device")
    parser.add_argument("world", type=int, choices=(2, 4, 8))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", nargs="+", default=())
    given = parser.parse_args()
    began = time.perf_counter()
    unequal = run(given.world, "cpu" if given.cpu else "cuda", given.only)
    print(f"{time.perf_counter() - began:.0f} s; unequal: {unequal or 'none'}", flush=True)
    return bool(unequal)


if __name__ == "__main__":
    raise SystemExit(main())
