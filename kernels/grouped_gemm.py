"""Grouped linear layers: rows sorted by expert, each expert's slice through its own weight.

The work is that of the rows alone, whatever the number of experts: no capacity, no padding, no row dropped. One product
an expert with rows, in a loop on the host, so the counts should come as a CPU tensor: then nothing here waits for
the device. (torch.nn.functional.grouped_mm in torch 2.11 to 2.13 refuses float64 and rows that are not a multiple
of 16 bytes.)

N rows · E experts · D input width · F output width
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def reference(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y[n] = weight[expert of row n] x[n], each row with its own copy of the weight; composes with torch.func.grad."""
    experts = torch.arange(weight_EFD.shape[0], device=x_ND.device)
    expert_N = experts.repeat_interleave(counts_E.to(x_ND.device), output_size=x_ND.shape[0])
    return torch.einsum("nd,nfd->nf", x_ND, weight_EFD[expert_N])


def grouped_linear(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """[N, F] in x's dtype: the first counts[0] rows of x times weight[0]ᵀ, the next counts[1] times weight[1]ᵀ, …

    Args:
      x_ND, weight_EFD: one floating dtype and device; gradients of any order in both.
      counts_E: int64, rows of each expert, sum N; on the CPU, or the call waits for the device.
    Raises ValueError for shapes, dtypes, devices or counts that do not fit together.
    """
    _check(x_ND, weight_EFD, counts_E)
    return torch.ops.qwen3f.grouped_linear(x_ND, weight_EFD, counts_E)


@torch.library.custom_op("qwen3f::grouped_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in _slices(counts, x.shape[0]):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
    return out


@torch.library.custom_op("qwen3f::grouped_outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """[E, A, B] from a [N, A] and b [N, B]: aᵀb over each expert's rows; zeros where there are none."""
    out = a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
    for expert, rows in _slices(counts, a.shape[0]):
        torch.mm(a[rows].t(), b[rows], out=out[expert])
    return out


@_linear.register_fake
def _linear_fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _outer_fake(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    dx = torch.ops.qwen3f.grouped_linear(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dw = torch.ops.qwen3f.grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _outer_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, counts = ctx.saved_tensors
    da = torch.ops.qwen3f.grouped_linear(b, grad, counts) if ctx.needs_input_grad[0] else None
    db = torch.ops.qwen3f.grouped_linear(a, grad.transpose(1, 2), counts) if ctx.needs_input_grad[1] else None
    return da, db, None


_linear.register_autograd(_linear_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)

GROUPED_LINEAR = torch.ops.qwen3f.grouped_linear.default


def _slices(counts: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    sizes = counts.tolist()
    if min(sizes) < 0 or sum(sizes) != rows:
        raise ValueError(f"counts must be rows of each expert and sum to {rows}, got {sizes}")
    start = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(start, start + size)
        start += size


def _check(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [N, D] and weight [E, F, D], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int64:
        raise ValueError(f"counts must be int64 [{weight.shape[0]}], got {counts.dtype} {tuple(counts.shape)}")
