"""Tokens to experts and back: sort rows by expert, take rows in that order, and sum them per token with weights.

A choice is one of the K experts of a token; each choice becomes a row. Nothing waits for the device, and no shape
depends on the routing. Rows are sorted by a counting sort: count each expert in each block of choices, sum the counts
over (expert, block), and add each choice's rank among those of the same expert in its block. The sort is stable, so
rows of one expert keep the order of their tokens. All sums have a fixed order, so a rerun gives the same bits.

By default no choice is dropped. In capacity mode, `within_capacity` says which choices an expert has room for; the
others get weight zero.

N tokens · K experts per token · R = N·K rows, sorted by expert · E experts · D hidden
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import check_devices, runs_triton, tl, triton


class Plan(NamedTuple):
    """Where each choice of each token goes.

    order: int32 [R]: row r is choice order[r], which is column order[r] % K of token order[r] // K in [N, K]. place:
    int32 [N, K], the row of each choice. offsets: int32 [E + 1], the first row of each expert, then R.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor

    @property
    def counts(self) -> Tensor:
        """int64 [E], rows of each expert."""
        return self.offsets.diff().to(torch.int64)


def plan(experts_NK: Tensor, num_experts: int) -> Plan:
    """The Plan for experts_NK, int64 [N, K] with values in [0, num_experts).

    Values outside that range give an undefined order, but never an illegal access; a check would wait for the device.
    Raises ValueError for another dtype or shape.
    """
    _check_experts(experts_NK, num_experts)
    return Plan(*torch.ops.qwen3f.moe_plan(experts_NK, num_experts))


def count(experts_NK: Tensor, marks_N: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert was chosen by tokens whose mark (bool [N]) is True."""
    _check_experts(experts_NK, num_experts)
    if marks_N.shape != experts_NK.shape[:1] or marks_N.dtype != torch.bool:
        raise ValueError(f"marks must be bool [{len(experts_NK)}], got {marks_N.dtype} {tuple(marks_N.shape)}")
    check_devices(experts=experts_NK, marks=marks_N)
    return torch.ops.qwen3f.moe_count(experts_NK, marks_N, num_experts)


def within_capacity(weights_NK: Tensor, experts_NK: Tensor, real_N: Tensor, num_experts: int, capacity: int) -> Tensor:
    """bool [N, K]: whether a choice is among its expert's `capacity` choices with the largest weights.

    Of equal weights the earlier token's comes first. Padding (real_N False) comes after all real tokens.
    """
    priority_R = torch.where(real_N[:, None], weights_NK.detach(), -1.0).flatten()
    heavy_first_R = priority_R.sort(descending=True, stable=True).indices
    expert_R = experts_NK.flatten()[heavy_first_R]
    _, place_R1, offsets_E1 = plan(expert_R[:, None], num_experts)
    rank_R = place_R1[:, 0] - offsets_E1[expert_R]
    return torch.zeros_like(rank_R).scatter(0, heavy_first_R, rank_R).view_as(experts_NK) < capacity


def take(x_ND: Tensor, where: Plan) -> Tensor:
    """[R, D]: x's rows sorted by expert, one for each choice. The gradient is a sum in a fixed order."""
    _check_rows("x", x_ND, where.place.shape[0], where)
    return torch.ops.qwen3f.moe_take(x_ND, where.order, where.place)


def combine(y_RD: Tensor, weights_NK: Tensor, where: Plan) -> Tensor:
    """[N, D]: Σ over a token's choices of weight · y[its row], added in float32 (float64 for float64), rounded once.

    On a CPU each product is rounded before the sum, as in the formula. Differentiable in y and weights.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    _check_rows("y", y_RD, where.order.shape[0], where)
    if weights_NK.shape != where.place.shape or weights_NK.dtype != y_RD.dtype:
        raise ValueError(
            f"weights must be {y_RD.dtype} {tuple(where.place.shape)}, got {weights_NK.dtype} {tuple(weights_NK.shape)}"
        )
    check_devices(y=y_RD, weights=weights_NK)
    return torch.ops.qwen3f.moe_combine(y_RD, weights_NK, where.order, where.place)


def reference(y_RD: Tensor, weights_NK: Tensor | None, place_NK: Tensor) -> Tensor:
    """combine in plain torch; works with torch.func. weights None: all are 1."""
    y_NKD = y_RD[place_NK]
    return (y_NKD if weights_NK is None else y_NKD * weights_NK[..., None]).sum(1)


# R and blocks change with every call under expert parallelism. Specialised, Triton would compile anew whenever their
# being a multiple of 16 changes.
@triton.jit(do_not_specialize=("R", "blocks"))
def _count_kernel(
    experts, marks, counts, R, E, blocks, MARKED: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    r = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.minimum(tl.maximum(tl.load(experts + r, mask=r < R, other=0), 0), E - 1).to(tl.int32)
    counted = r < R
    if MARKED:
        counted &= tl.load(marks + r // TOP_K, mask=r < R, other=0) != 0
    expert = tl.where(counted, expert, -1)
    e = tl.arange(0, EXPERTS)
    hits = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + e * blocks + block, hits, mask=e < E)


@triton.jit(do_not_specialize=("R", "blocks"))
def _place_kernel(
    experts, counts, upto, order, place, offsets, R, E, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    r = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.minimum(tl.maximum(tl.load(experts + r, mask=r < R, other=0), 0), E - 1).to(tl.int32)
    expert = tl.where(r < R, expert, -1)
    e = tl.arange(0, EXPERTS)
    at = e * blocks + block
    begin = tl.load(upto + at, mask=e < E, other=0) - tl.load(counts + at, mask=e < E, other=0)
    hit = (expert[:, None] == e[None, :]).to(tl.int32)
    row = tl.sum(hit * (begin[None, :] + tl.cumsum(hit, 0) - 1), 1)
    tl.store(place + r, row, mask=r < R)
    tl.store(order + row, r, mask=r < R)
    if block == 0:
        tl.store(offsets + e, begin, mask=e < E)
        tl.store(offsets + E, R)


@triton.jit
def _combine_kernel(y, weights, place, out, D, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(place + n * TOP_K + k).to(tl.int64)
        part = tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + n * TOP_K + k).to(tl.float32)
        acc += part
    tl.store(out + n * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _combine_backward_kernel(dout, y, weights, place, dy, dweights, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(place + choice).to(tl.int64)
    weight = tl.load(weights + choice).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        grad = tl.load(dout + choice // TOP_K * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += grad * tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dy + row * D + d, (grad * weight).to(dy.dtype.element_ty), mask=d < D)
    tl.store(dweights + choice, tl.sum(acc).to(dweights.dtype.element_ty))


def launch_combine(y_RD: Tensor, weights_NK: Tensor | None, place_NK: Tensor) -> Tensor:
    tokens, top_k = place_NK.shape
    out = y_RD.new_empty(tokens, y_RD.shape[1])
    block = min(triton.next_power_of_2(y_RD.shape[1]), 2048)
    _combine_kernel[(tokens, triton.cdiv(y_RD.shape[1], block))](
        y_RD, weights_NK, place_NK, out, y_RD.shape[1], top_k, weights_NK is not None, block, num_warps=4
    )
    return out


def _block(num_experts: int) -> int:
    """Choices per program, which compares them with all experts at once."""
    return max(16, 16384 // triton.next_power_of_2(num_experts))


def _counts(experts: Tensor, marks: Tensor | None, num_experts: int) -> Tensor:
    """int32 [E, blocks]: how often each expert occurs in each block of choices."""
    block = _block(num_experts)
    blocks = triton.cdiv(experts.numel(), block)
    counts = experts.new_empty(num_experts, blocks, dtype=torch.int32)
    _count_kernel[(blocks,)](
        experts, marks, counts, experts.numel(), num_experts, blocks, marks is not None, experts.shape[1],
        triton.next_power_of_2(num_experts), block, num_warps=8
    )  # fmt: skip
    return counts


@torch.library.custom_op("qwen3f::moe_plan", mutates_args=())
def _plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, place, offsets = _plan_fake(experts, num_experts)
    if not experts.numel():
        return order, place, offsets.zero_()
    experts = experts.contiguous()
    if runs_triton(experts):
        counts = _counts(experts, None, num_experts)
        upto = counts.flatten().cumsum(0, dtype=torch.int32)
        _place_kernel[(counts.shape[1],)](
            experts, counts, upto, order, place, offsets, experts.numel(), num_experts, counts.shape[1],
            triton.next_power_of_2(num_experts), _block(num_experts), num_warps=8
        )  # fmt: skip
        return order, place, offsets
    sorted_R, order_R = experts.flatten().sort(stable=True)
    place.view(-1)[order_R] = torch.arange(len(order_R), device=order.device, dtype=torch.int32)
    offsets.copy_(torch.searchsorted(sorted_R, torch.arange(num_experts + 1, device=order.device)))
    return order.copy_(order_R), place, offsets


@_plan.register_fake
def _plan_fake(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (experts.numel(),), experts.shape, (num_experts + 1,)
    return tuple(experts.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.custom_op("qwen3f::moe_count", mutates_args=())
def _count(experts: Tensor, marks: Tensor, num_experts: int) -> Tensor:
    if runs_triton(experts) and experts.numel():
        return _counts(experts.contiguous(), marks.contiguous(), num_experts).sum(1)
    marks_R = marks[:, None].expand_as(experts).flatten().to(torch.int64)
    return experts.new_zeros(num_experts).scatter_add(0, experts.flatten(), marks_R)


@_count.register_fake
def _count_fake(experts: Tensor, marks: Tensor, num_experts: int) -> Tensor:
    return experts.new_empty(num_experts)


@torch.library.custom_op("qwen3f::moe_take", mutates_args=())
def _take(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    return x.index_select(0, order // place.shape[1])


@_take.register_fake
def _take_fake(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.custom_op("qwen3f::moe_combine", mutates_args=())
def _combine(y: Tensor, weights: Tensor | None, order: Tensor, place: Tensor) -> Tensor:
    if runs_triton(y) and y.numel():
        return launch_combine(y.contiguous(), None if weights is None else weights.contiguous(), place)
    return reference(y, weights, place)


@_combine.register_fake
def _combine_fake(y: Tensor, weights: Tensor | None, order: Tensor, place: Tensor) -> Tensor:
    return y.new_empty(place.shape[0], y.shape[1])


@torch.library.custom_op("qwen3f::moe_combine_backward", mutates_args=())
def _combine_backward_op(
    dout: Tensor, y: Tensor, weights: Tensor, order: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    """(dy, dweights)"""
    if runs_triton(y) and y.numel():
        dout, y, weights = dout.contiguous(), y.contiguous(), weights.contiguous()
        dy, dweights = torch.empty_like(y), torch.empty_like(weights)
        block = min(triton.next_power_of_2(y.shape[1]), 2048)
        _combine_backward_kernel[(place.numel(),)](
            dout, y, weights, place, dy, dweights, y.shape[1], place.shape[1], block, num_warps=4
        )
        return dy, dweights
    dout_R = dout.index_select(0, order // place.shape[1])
    dots_R = (dout_R * y).sum(1)
    return dout_R * weights.flatten()[order][:, None], dots_R[place]


@_combine_backward_op.register_fake
def _combine_backward_fake(
    dout: Tensor, y: Tensor, weights: Tensor, order: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


Context = torch.autograd.function.FunctionCtx


def _save_take(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _take_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.qwen3f.moe_combine(grad, None, *ctx.saved_tensors), None, None


def _save_combine(ctx: Context, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor], output: Tensor) -> None:
    y, weights, order, place = inputs
    ctx.save_for_backward(*((order, place) if weights is None else (order, place, y, weights)))


def _combine_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, place, *products = ctx.saved_tensors
    if not products:
        return torch.ops.qwen3f.moe_take(grad, order, place), None, None, None
    return *torch.ops.qwen3f.moe_combine_backward(grad, *products, order, place), None, None


_take.register_autograd(_take_backward, setup_context=_save_take)
_combine.register_autograd(_combine_backward, setup_context=_save_combine)

PLAN = torch.ops.qwen3f.moe_plan.default


def _check_experts(experts: Tensor, num_experts: int) -> None:
    if experts.dim() != 2 or experts.dtype != torch.int64:
        raise ValueError(f"experts must be int64 [N, K], got {experts.dtype} {tuple(experts.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")


def _check_rows(name: str, x: Tensor, rows: int, where: Plan) -> None:
    if x.dim() != 2 or x.shape[0] != rows or not x.is_floating_point():
        raise ValueError(f"{name} must be floating [{rows}, D], got {x.dtype} {tuple(x.shape)}")
    check_devices(**{name: x, "plan": where.order})
