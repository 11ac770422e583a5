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
from torch import Tensor

from sharding.axes import Axis

Context = torch.autograd.function.FunctionCtx
_ops = torch.ops._c10d_functional


def gather(x: Tensor, axis: Axis, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The ranks' tensors, in the axis's order, concatenated along `dim`.

    dtype: what to cast to before sending. The gradient is still summed in x's own.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis.size, axis.group, dim % x.dim(), dtype or x.dtype)


def start_gather(x: Tensor, axis: Axis, dtype: torch.dtype | None = None) -> Tensor:
    """As gather along dimension 0, over an axis of more than one rank, but not yet here: to be read only after `wait`.

    Nor is its gradient, so x must come, directly, from `wait_for_gradients`.
    """
    return _StartGather.apply(x, axis.size, axis.group, dtype or x.dtype)


def wait_for_gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors; their gradients, which start_gather leaves under way, are waited for together.

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
    parts = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group))
    return parts if dim == 0 else parts.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


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


class _StartGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, size: int, group: str, dtype: torch.dtype) -> Tensor:
        ctx.where, ctx.dtype = (size, group), x.dtype
        return _ops.all_gather_into_tensor(x.to(dtype).contiguous(), size, group)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.reduce_scatter_tensor(grad.to(ctx.dtype).contiguous(), "sum", *ctx.where), None, None, None


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
