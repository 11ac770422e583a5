"""Collectives over a named axis, differentiable and usable inside compiled blocks.

A collective is a linear map from all ranks' inputs to all ranks' outputs. Its backward pass is the transpose (adjoint)
of that map:

    gather ↔ reduce_scatter, all_reduce ↔ all_reduce, all_to_all ↔ all_to_all with the splits exchanged,
    shift ↔ the opposite shift

So backward() computes the gradients of the sum of all ranks' scalars: each rank contributes its part of the loss.

Over an axis of size 1 every collective returns its argument. All ranks of the axis must call the same collectives in
the same order.
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

    dtype: the dtype to cast x to before sending, and of the result; the gradient is still summed in x's dtype.
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
    """Start gather_each along dimension 0, on an axis of more than one rank. Call `wait` on each result before reading.

    The backward pass likewise only starts the reduce-scatters of the gradients, so `tensors` must be direct results of
    `wait_for_gradients`, which waits for them.
    """
    return _StartGatherEach.apply(axis.size, axis.group, dtype, *tensors)


def join(x: Tensor, size: int, dim: int) -> Tensor:
    """Turn a concatenation of `size` ranks' tensors along dimension 0 into one along `dim`. Copies unless dim is 0."""
    return x if dim == 0 else x.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def wait_for_gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors unchanged; the backward pass waits for all their gradients that start_gather_each started.

    autograd runs in reverse order, so call this before the computation that the reduce-scatters should overlap with.
    """
    return _WaitForGradients.apply(*tensors)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part, along `dim`, of the sum over ranks. ValueError when the size of `dim` does not divide."""
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter: dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    return _ReduceScatter.apply(x, axis.size, axis.group, dim % x.dim())


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, on every rank. Its backward pass sums the gradients of all ranks."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis.group)


def all_to_all(x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int], axis: Axis) -> Tensor:
    """Send in_splits[r] rows of x to each rank r, in order, and receive out_splits[r] rows from it.

    Splits are numbers on the host, one per rank. Returns the received rows, [Σ out_splits, …].
    """
    return x if axis.size == 1 else _AllToAll.apply(x, tuple(in_splits), tuple(out_splits), axis.group)


def recut(x: Tensor, axis: Axis, old: int, new: int) -> Tensor:
    """A tensor that the axis cuts along dimension `old` becomes whole there and is cut along `new` instead.

    Each rank sends and receives (n−1)/n of its part. ValueError when the size of `new` does not divide.
    """
    if axis.size == 1:
        return x
    if x.shape[new] % axis.size:
        raise ValueError(f"recut: dim {new} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    parts, ones = x.unflatten(new, (axis.size, -1)).movedim(new, 0), [1] * axis.size
    return all_to_all(parts, ones, ones, axis).movedim(0, old).flatten(old, old + 1)


def shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """Send x to the rank `by` places later on the axis (a ring); return the tensor of the rank `by` places earlier."""
    if axis.size == 1 or by % axis.size == 0:
        return x
    rows = x.flatten()
    to, come = (_only(len(rows), axis, axis.index + step) for step in (by, -by))
    return all_to_all(rows, to, come, axis).view(x.shape)


def start_shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """Start a shift, on an axis of more than one rank. The result is flat; call `wait` before reading it.

    It has no gradient: it is for operators that define their own backward pass.
    """
    rows = x.contiguous().flatten()
    to, come = (_only(len(rows), axis, axis.index + step) for step in (by, -by))
    return _ops.all_to_all_single(rows, come, to, axis.group)


def gather_now(x: Tensor, size: int, group: str) -> Tensor:
    """gather along dimension 0 without a gradient, for operators that define their own backward pass."""
    return _gather(x, size, group, 0)


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """Start reduce_scatter along dimension 0. Call `wait` on the result before reading it. It has no gradient."""
    return _ops.reduce_scatter_tensor(x.contiguous(), "sum", size, group)


def sum_now(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over ranks in place and return it; no gradient. Uses the current CUDA stream only, for CUDA graphs."""
    if axis.size > 1:
        dist.all_reduce(x, group=_resolve_process_group(axis.group))
    return x


def stack_now(x: Tensor, axis: Axis) -> Tensor:
    """[ranks, …]: x of each rank; no gradient. Uses the current CUDA stream only, for CUDA graphs."""
    if axis.size == 1:
        return x[None]
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=_resolve_process_group(axis.group))
    return out.unflatten(0, (axis.size, -1))


def wait(x: Tensor) -> Tensor:
    """x, the result of a started collective, ready to be read. Later GPU work waits for it; the host does not."""
    return _ops.wait_tensor(x.detach())


def shard(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice of a tensor that every rank holds: the inverse of gather, without communication.

    Its gradient is that of a slice: nonzero in this rank's part only.
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"shard: dim {dim} of {tuple(x.shape)} does not divide by {axis.name}={axis.size}")
    size = x.shape[dim] // axis.size
    return x.narrow(dim, axis.index * size, size)


def _only(size: int, axis: Axis, place: int) -> list[int]:
    """Splits that send all `size` rows to the rank at `place`. It may be a SymInt, so there are no branches."""
    n = axis.size
    return [size * ((n - (place - rank + 2 * n) % n) // n) for rank in range(n)]


def _gather(x: Tensor, size: int, group: str, dim: int) -> Tensor:
    return join(_ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group)), size, dim)


def _start_gathers(tensors: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return _ops.all_gather_into_tensor_coalesced([x.contiguous() for x in tensors], size, group)


def _start_scatters(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype], size: int, group: str
) -> list[Tensor | None]:
    """Start reduce-scatters along dimension 0, each in its own dtype; None where the gradient is None."""
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
        ctx.set_materialize_grads(False)  # None: a deferred gradient (pipeline.deferred_grads), scattered later
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
