"""Many ranks for a test: in this process (LocalTensorMode), or as gloo processes."""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.utils import _python_dispatch

from sharding import ring
from sharding.axes import axes_of, make_mesh
from sharding.mesh import parse_mesh


def _for_all_ranks(operator, fn):
    """Run fn, which communicates, once for all ranks together: LocalTensorMode would call the operator rank by rank."""

    def rule(mode, func, types, args=(), kwargs=None):
        with LocalTensorMode(mode.ranks):
            return fn(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(operator, LocalTensorMode, rule)


_for_all_ranks("qwen3f::ring_attention", ring.forward)
_for_all_ranks("qwen3f::ring_attention_backward", ring.backward)


@contextlib.contextmanager
def local_world(mesh):
    """(DeviceMesh, Axes) of a mesh in words; inside, tensors hold one value a rank, and collectives are copies."""
    shape = parse_mesh(mesh)
    dist.init_process_group("fake", rank=0, world_size=shape.size)
    try:
        with LocalTensorMode(shape.size), mock.patch.object(_python_dispatch, "_correct_storage_aliasing", _leave):
            device_mesh = make_mesh(shape, "cpu")
            yield device_mesh, axes_of(device_mesh)
    finally:
        dist.destroy_process_group()


def _leave(*_):
    """Views of the ranks' values share storage. Their wrappers need it for functionalization alone, and to make them
    would take half of the time."""


def each(values):
    """A tensor with values[rank] on each rank."""
    return LocalTensor({rank: value.clone() for rank, value in enumerate(values)})


def ranks_of(x):
    """The ranks' values of a tensor, in order."""
    return [x._local_tensors[rank] for rank in sorted(x._local_tensors)]


def run_processes(fn, world, *args):
    """fn(rank, *args) in `world` gloo processes; what each returned, in order. A failure fails the test.

    Processes are forked from a server that has imported what they need and runs nothing else, so that a start costs
    no imports and copies none of the threads of this process.
    """
    multiprocessing.set_forkserver_preload([__name__, "tests.sharding.preload"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (fn, world, folder, args), nprocs=world, start_method="forkserver")
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _process(rank, fn, world, folder, args):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.save(fn(rank, *args), os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    dist.destroy_process_group()
