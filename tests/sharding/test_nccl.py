"""Each axis over NCCL on two GPUs equals one GPU: what gloo shows of the algebra, NCCL shows of streams."""

import datetime
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qwen3f import model
from qwen3f.stages.pretrain import make_eval_step, make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.state import init_state
from sharding.axes import axes_of, make_mesh
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import parse_mesh
from sharding.stages import Pipeline, make_stages, restore
from tests.sharding.steps import MOE, SCHEDULE, batches, config, share

TIED = {"tie_word_embeddings": True}
SEVEN = {"num_hidden_layers": 7}  # one row of padding in four stages
CASES = [
    ("dp2", {}, {}), ("dp2", TIED, {"fsdp": False}), ("dr2", {}, {}), ("tp2", {}, {}), ("cp2", {}, {}),
    ("dp2", {"gradient_checkpointing": "selective"}, {}),
    ("dp2", MOE, {}), ("ep2", MOE, {}), ("tp2", MOE, {}), ("cp2", MOE, {}),
    ("pp2", TIED | {"num_hidden_layers": 3}, {}),
    ("pp2", SEVEN, {"pipeline": Pipeline("interleaved", 2)}),
    ("pp2", SEVEN | MOE, {"pipeline": Pipeline("zero_bubble", 2)}),
    ("pp2", SEVEN | TIED, {"pipeline": Pipeline("zbv", 2)}),
]  # fmt: skip


def steps(cfg, rank, layout, mesh, dtype, microbatches):
    """([loss, grad_norm, evaluation] of three steps, whole parameters after them)."""
    shape = layout.axes.shape
    execution = model.REFERENCE if dtype == torch.float64 else model.EAGER
    run = {"layout": layout, "execution": execution, "compute_dtype": dtype}
    current = init_state(cfg, 0, device="cuda", dtype=dtype, layout=layout, mesh=mesh)
    step, numbers = make_train_step(cfg, AdamW(), SCHEDULE, microbatches=microbatches, **run), []
    evaluate = make_eval_step(cfg, **run)
    for batch in batches(3):
        mine = {key: x.cuda() for key, x in (share(batch, shape, rank, microbatches) if mesh else batch).items()}
        current, metrics = step(current, mine)
        numbers += [metrics["loss"], metrics["grad_norm"], evaluate(current.params, mine)[0]]
    params = {path: x.full_tensor() if mesh else x for path, x in current.params.items()}
    return torch.stack([x.double() for x in numbers]), restore(cfg, params, make_stages(cfg, layout.pipeline, shape.pp))


def on_gpus(rank, folder):
    torch.cuda.set_device(rank)
    options = {"device_id": torch.device("cuda", rank), "timeout": datetime.timedelta(seconds=100)}
    dist.init_process_group("nccl", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2, **options)
    for text, changes, place in CASES:
        cfg, microbatches = config(**changes), 4 if text == "pp2" else 2
        mesh = make_mesh(parse_mesh(text), "cuda")
        layout = Layout(axes_of(mesh), **place)
        for dtype, close in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
            take = functools.partial(steps, cfg, rank, dtype=dtype, microbatches=microbatches)
            (found, params), (wanted, whole) = take(layout=layout, mesh=mesh), take(layout=ONE_DEVICE, mesh=None)
            print(f"{text} {sorted(changes)} {place} {dtype}: {((found - wanted) / wanted).abs().max().item():.1e}")
            torch.testing.assert_close(found, wanted, rtol=close, atol=0)
            if dtype == torch.float64:  # in float32 three AdamW steps enlarge rounding
                torch.testing.assert_close(params, whole, rtol=0, atol=close)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_gpus, (folder,), nprocs=2, start_method="spawn")
