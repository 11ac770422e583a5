"""Collectives over a named axis, each with its true adjoint, differentiable and usable inside compiled blocks.

Seen as one linear map of all ranks' tensors together, each operator's backward is its transpose:

    gather ↔ reduce_scatter, all_reduce ↔ all_reduce, all_to_all ↔ all_to_all with the splits exchanged,
    shift ↔ the opposite shift

So the rule for a whole program is that of one device: what is differentiated is the sum of all ranks' scalars.

Over an axis of size 1 each is the identity and returns its argument. Every rank of the axis must call the same
collectives in the same order.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from sharding.axes import Axis

Context = torch.autograd.function.FunctionCtx
_ops = torch.ops._c10d_functional
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def gather(x: Tensor, axis: Axis, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The ranks' tensors, in the axis's order, concatenated along `dim`.

    dtype: what to cast to before sending. The gradient is still summed in x's own.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis.size, axis.group, dim % x.dim(), dtype or x.dtype)


def gather_each(
    tensors: Sequence[Tensor], axis: Axis, dims: Sequence[int], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """gather of each tensor along its own dimension, in one launch."""
    if axis.size == 1:
        return list(tensors)
    return [join(x, axis.size, dim) for x, dim in zip(_GatherEach.apply(axis.size, axis.group, dtype, *tensors), dims)]


def start_gather_each(tensors: Sequence[Tensor], axis: Axis, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """As gather_each along dimension 0, over an axis of more than one rank, but not yet here: to be read after `wait`.

    Nor are their gradients, so the tensors must come, directly, from `wait_for_gradients`.
    """
    return _StartGatherEach.apply(axis.size, axis.group, dtype, *tensors)


def join(x: Tensor, size: int, dim: int) -> Tensor:
    """Tensors of `size` ranks along `dim`, from what they are along dimension 0; a copy, unless that is `dim`."""
    return x if dim == 0 else x.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def wait_for_gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors; their gradients, which start_gather_each leaves under way, are waited for together.

    autograd walks back first through what was done last: so call it before everything that the waiting is to overlap.
    """
    return _WaitForGradients.apply(*tensors)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over ranks. ValueError when `dim` does not divide."""
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter: dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    return _ReduceScatter.apply(x, axis.size, axis.group, dim % x.dim())


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, on every rank. Its backward sums the ranks' upstream gradients."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis.group)


def all_to_all(x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int], axis: Axis) -> Tensor:
    """Rows for everyone, exchanged: in_splits[r] rows go to rank r, in order; out_splits[r] come from it.

    Splits are numbers on the host, one a rank. Returns [Σ out_splits, …].
    """
    return x if axis.size == 1 else _AllToAll.apply(x, tuple(in_splits), tuple(out_splits), axis.group)


def shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """Send x to the rank `by` further along the axis, round the ring; returns what came from `by` before."""
    if axis.size == 1 or by % axis.size == 0:
        return x
    rows = x.flatten()
    to, come = (_only(len(rows), axis, axis.index + step) for step in (by, -by))
    return all_to_all(rows, to, come, axis).view(x.shape)


def start_shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """As shift, over an axis of more than one rank, but not yet here: flat, and to be read only after `wait`.

    For operators that have their own gradient; this has none.
    """
    rows = x.contiguous().flatten()
    to, come = (_only(len(rows), axis, axis.index + step) for step in (by, -by))
    return _ops.all_to_all_single(rows, come, to, axis.group)


def gather_now(x: Tensor, size: int, group: str) -> Tensor:
    """As gather along dimension 0, for operators that have their own gradient."""
    return _gather(x, size, group, 0)


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """As reduce_scatter along dimension 0, but not yet here: to be read only after `wait`. It has no gradient."""
    return _ops.reduce_scatter_tensor(x.contiguous(), "sum", size, group)


def sum_now(x: Tensor, axis: Axis) -> Tensor:
    """x, which now holds the sum over ranks; no gradient. On a GPU on the current stream alone: for CUDA graphs."""
    if axis.size > 1:
        dist.all_reduce(x, group=_resolve_process_group(axis.group))
    return x


def stack_now(x: Tensor, axis: Axis) -> Tensor:
    """[ranks, …]: x of each rank; no gradient. Streams as sum_now."""
    if axis.size == 1:
        return x[None]
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=_resolve_process_group(axis.group))
    return out.unflatten(0, (axis.size, -1))


def wait(x: Tensor) -> Tensor:
    """x, once what was started has come; what is queued later waits for it, the host does not."""
    return _ops.wait_tensor(x.detach())


def shard(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of what every rank holds: the inverse of gather, without communication.

    Its gradient is this rank's part alone, as for any slice.
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"shard: dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    size = x.shape[dim] // axis.size
    return x.narrow(dim, axis.index * size, size)


def _only(size: int, axis: Axis, place: int) -> list[int]:
    """Splits that give everything to the rank at `place`, which may be a SymInt: arithmetic alone, no branches."""
    n = axis.size
    return [size * ((n - (place - rank + 2 * n) % n) // n) for rank in range(n)]


def _gather(x: Tensor, size: int, group: str, dim: int) -> Tensor:
    return join(_ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group)), size, dim)


def _start_gathers(tensors: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return _ops.all_gather_into_tensor_coalesced([x.contiguous() for x in tensors], size, group)


def _start_scatters(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype], size: int, group: str
) -> list[Tensor | None]:
    """This rank's shares, each in its dtype, of the sums over ranks along dimension 0; None where nothing is given."""
    given = [grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes) if grad is not None]
    shares = iter(_ops.reduce_scatter_tensor_coalesced(given, "sum", size, group))
    return [None if grad is None else next(shares) for grad in grads]


def _reduce_scatter(x: Tensor, size: int, group: str, dim: int) -> Tensor:
    if dim:
        x = x.unflatten(dim, (size, -1)).movedim(dim, 0).flatten(0, 1)
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def _all_to_all(x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int], group: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(out_splits), list(in_splits), group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, size: int, group: str, dim: int, dtype: torch.dtype) -> Tensor:
        ctx.where, ctx.dtype = (size, group, dim), x.dtype
        return _gather(x.to(dtype), size, group, dim)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(grad.to(ctx.dtype), *ctx.where), None, None, None, None


class _StartGatherEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, size: int, group: str, dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.where, ctx.dtypes = (size, group), [x.dtype for x in tensors]
        ctx.set_materialize_grads(False)  # what is put off (sharding.pipeline.deferred_grads) is scattered later
        return tuple(_start_gathers([x.to(dtype or x.dtype) for x in tensors], *ctx.where))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *_start_scatters(grads, ctx.dtypes, *ctx.where)


class _GatherEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, size: int, group: str, dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(_ops.wait_tensor, _StartGatherEach.forward(ctx, size, group, dtype, *tensors)))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shares = _start_scatters(grads, ctx.dtypes, *ctx.where)
        return None, None, None, *(None if x is None else _ops.wait_tensor(x) for x in shares)


class _WaitForGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else wait(grad) for grad in grads)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, size: int, group: str, dim: int) -> Tensor:
        ctx.where = size, group, dim
        return _reduce_scatter(x, size, group, dim)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, *ctx.where), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduce(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, in_splits: tuple[int, ...], out_splits: tuple[int, ...], group: str) -> Tensor:
        ctx.where = out_splits, in_splits, group
        return _all_to_all(x, in_splits, out_splits, group)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, *ctx.where), None, None, None
