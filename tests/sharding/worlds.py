"""Many ranks for a test: in this process (LocalTensorMode), or as gloo processes."""

import contextlib
import faulthandler
import multiprocessing
import signal
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import _local_tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.utils import _python_dispatch

from sharding import ring
from sharding.axes import axes_of, make_mesh
from sharding.mesh import parse_mesh

SECONDS = 300  # the longest that the ranks of a test may take; the slowest takes 30


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
    """Yield (DeviceMesh, Axes) of a mesh as text. Inside, tensors hold a value for each rank, and collectives copy."""
    shape = parse_mesh(mesh)
    dist.init_process_group("fake", rank=0, world_size=shape.size)
    try:
        with LocalTensorMode(shape.size), contextlib.ExitStack() as stack:
            for module, name, short in SHORTCUTS:
                stack.enter_context(mock.patch.object(module, name, short))
            device_mesh = make_mesh(shape, "cpu")
            yield device_mesh, axes_of(device_mesh)
    finally:
        dist.destroy_process_group()


def _leave(*_):
    """Do nothing: the ranks' views share storage already. Their wrappers need to only for functionalization."""


_SIMPLE = {bool, int, float, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_TENSORS = {torch.Tensor, torch.nn.Parameter, LocalTensor}


def _is_simple(x):
    if isinstance(x, list | tuple):
        return all(type(y) in _SIMPLE for y in x)
    return type(x) in _SIMPLE or type(x) in _TENSORS


def _on_each_rank(func, ranks, args, kwargs, *, alias=True, whole=_local_tensor._for_each_rank_run_func):
    """A faster `whole`, for all but a few operators: those with lists of tensors, sizes that differ by rank, random
    numbers or missing results go to `whole` itself."""
    special = func in (torch.ops.aten.split.Tensor, torch.ops.aten.hash_tensor.default) or (
        not isinstance(func, torch._ops.OpOverload)
        or torch.Tag.nondeterministic_seeded in func.tags
        or _local_tensor._is_inplace_op(func)
    )
    if special or not all(map(_is_simple, (*args, *kwargs.values()))):
        return whole(func, ranks, args, kwargs, alias=alias)
    out = {}
    for rank in sorted(ranks):
        own = [x._local_tensors[rank] if isinstance(x, LocalTensor) else x for x in args]
        named = {k: x._local_tensors[rank] if isinstance(x, LocalTensor) else x for k, x in kwargs.items()}
        out[rank] = func(*own, **named)
    result = _local_tensor._combine_rank_results(out, None)
    return _python_dispatch.return_and_correct_aliasing(func, args, kwargs, result) if alias else result


def _meta_of(tensors, whole=_local_tensor._compute_local_tensor_meta):
    """A faster `whole` for ranks whose values have the same sizes; others go to `whole`."""
    first, *others = tensors.values()
    kind = (first.shape, first.stride(), first.dtype, first.layout)
    keys = _local_tensor._get_extra_dispatch_keys(first)
    for x in others:
        same = (x.shape, x.stride(), x.dtype, x.layout) == kind and _local_tensor._get_extra_dispatch_keys(x) == keys
        if not same:
            return whole(tensors)
    return list(first.shape), list(first.stride()), first.device, first.dtype, first.layout, keys


# Functions that take half of the time of LocalTensorMode in torch 2.11 to 2.13, and what replaces them
SHORTCUTS = [
    (_python_dispatch, "_correct_storage_aliasing", _leave),
    (_local_tensor, "_for_each_rank_run_func", _on_each_rank),
    (_local_tensor, "_compute_local_tensor_meta", _meta_of),
]


def each(values):
    """A tensor with values[rank] on each rank."""
    return LocalTensor({rank: value.clone() for rank, value in enumerate(values)})


def ranks_of(x):
    """The ranks' values of a tensor, in order."""
    return [x._local_tensors[rank] for rank in sorted(x._local_tensors)]


def run_processes(fn, world, *args):
    """fn(rank, *args) in `world` gloo processes; what each returned, in order. A failure fails the test.

    Processes are forked from a server that has imported what they need and runs nothing else, so that a start costs
    no imports and copies none of the threads of this process. Ranks that wait for each other for ever end after
    SECONDS, and the failure shows where each of them stood.
    """
    multiprocessing.set_forkserver_preload([__name__, "tests.sharding.preload"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            mp.start_processes(_process, (fn, world, folder, args), nprocs=world, start_method="forkserver")
        except mp.ProcessExitedException as error:
            for file in sorted(folder.glob("*.stacks")):
                error.add_note(f"rank {file.stem}: {file.read_text()}")
            raise
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank, fn, world, folder, args):
    with (folder / f"{rank}.stacks").open("w") as stacks:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=stacks)
        faulthandler.register(signal.SIGTERM, file=stacks, chain=True)  # the other ranks end so
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        try:
            torch.save(fn(rank, *args), folder / f"{rank}.pt")
            dist.barrier()
        except Exception:
            traceback.print_exc()
            raise
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
