"""Ring attention: causal attention over a sequence that is cut over the cp axis (Liu et al. 2023, arXiv:2310.01889).

Keys and values are passed round the ring of ranks. At every step a rank attends to the keys that it has received and
merges the result with its earlier results by each row's log-sum-exp. The next keys are sent while a rank computes. The
backward pass passes keys and values round again, and their gradients behind them. It needs the merged output and
log-sum-exp beside the rank's own q, k and v, so nothing else is saved. Keys in the future of a rank's queries cost no
time, and every rank runs the same operators on the same shapes.

How a model uses it: sequence_split.split_sequence cuts the batch. Rotary tables are made from the batch's positions.
sequence_split.ring_ranges(batch["starts"], axes.cp), once per batch, gives the keys that are visible at each step.
Every layer calls ring_attention(q, k, v, axes.cp, ranges). The loss is a sum over the rank's own tokens. Selective
recomputation saves the outputs of RING_ATTENTION; otherwise the recomputation would send everything again.

B batch · H query heads · K key/value heads · T positions of this rank · d head_dim
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.flash_attention import flash_attention, merge
from sharding.axes import Axis
from sharding.collectives import start_shift, wait
from sharding.sequence_split import RingRanges


def ring_attention(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, axis: Axis, ranges: RingRanges, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, d], log-sum-exp [B, H, T]) of this rank's queries over the keys and values of all ranks.

    Both can be differentiated once, in q, k and v; backward() differentiates the sum of all ranks' scalars. Arguments
    are those of kernels.flash_attention, which is called when cp is 1. Partial results are merged, and gradients summed
    over ranks, in float32 (float64 for float64) and rounded once.

    ranges: from sequence_split.ring_ranges. Raises ValueError for arguments that do not fit together.
    """
    if k_BKTd.shape[2] != q_BHTd.shape[2]:
        raise ValueError(f"a rank holds as many keys as queries, got {k_BKTd.shape[2]} and {q_BHTd.shape[2]}")
    expected = (axis.size, q_BHTd.shape[0], q_BHTd.shape[2])
    for name, x in ranges._asdict().items():
        if x.shape != expected:
            raise ValueError(f"ranges.{name} must be [cp, B, T] = {list(expected)}, got {list(x.shape)}")
    if axis.size == 1:
        return flash_attention(q_BHTd, k_BKTd, v_BKTd, ranges=ranges.at(0), scale=scale)
    scale = q_BHTd.shape[-1] ** -0.5 if scale is None else float(scale)
    place = axis.size, axis.index, axis.group
    return torch.ops.qwen3f.ring_attention(q_BHTd, k_BKTd, v_BKTd, *ranges, *place, scale)


class Traffic(NamedTuple):
    """What one rank sends: the number of messages, and their bytes together."""

    messages: int
    bytes: int


def ring_traffic(
    size: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype
) -> tuple[Traffic, Traffic]:
    """What a rank sends in one layer's forward pass, and in its backward pass.

    size: the size of cp. batch, kv_heads, length: those of one rank; length is T, after the cut. Recomputation of the
    attention sends a forward pass's messages once more.
    """
    hops, elements = size - 1, 2 * batch * kv_heads * length * head_dim
    wide = torch.promote_types(dtype, torch.float32)
    there = Traffic(hops, hops * elements * dtype.itemsize)
    return there, Traffic(2 * hops, there.bytes + hops * elements * wide.itemsize)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    first: Tensor,
    last: Tensor,
    size: int,
    index: int,
    group: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator qwen3f::ring_attention."""
    axis, ranges = Axis("cp", size, index, group), RingRanges(lo, hi, first, last)
    kv, total = torch.stack([k, v]), None
    for step in range(size):
        coming = start_shift(kv, axis) if step + 1 < size else None
        out, lse = flash_attention(q, kv[0], kv[1], ranges=ranges.at(step), scale=scale)
        part = out.to(lse.dtype), lse
        total = part if total is None else merge([total, part])
        if coming is not None:
            kv = wait(coming).view(kv.shape)
    out, lse = total
    return _like(q).copy_(out), lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor,
    hi: Tensor,
    first: Tensor,
    last: Tensor,
    size: int,
    index: int,
    group: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator qwen3f::ring_attention_backward: (dq, dk, dv).

    A block of keys and values visits every rank. Each rank adds its contribution to the gradients of that block, which
    follow the block one hop behind and reach the block's owner after the last step. The owner adds its own
    contribution there.
    """
    axis, ranges = Axis("cp", size, index, group), RingRanges(lo, hi, first, last)
    kv, dq, home, following = torch.stack([k, v]), 0, 0, None
    for step in range(size):
        coming = start_shift(kv, axis) if step + 1 < size else None
        d_q, *d_kv = torch.ops.qwen3f.flash_attention_backward(
            d_out, d_lse, q, kv[0], kv[1], out, lse, *ranges.at(step), False, scale
        )
        dq = dq + d_q.to(lse.dtype)
        share = torch.stack(d_kv).to(lse.dtype)
        if following is not None:
            share = share + wait(following).view(kv.shape)
        if step == 0:
            home = share
        else:
            following = start_shift(share, axis)
        if coming is not None:
            kv = wait(coming).view(kv.shape)
    dk, dv = home + wait(following).view(kv.shape)
    return _like(q).copy_(dq), _like(k).copy_(dk), _like(v).copy_(dv)


_forward = torch.library.custom_op("qwen3f::ring_attention", forward, mutates_args=())
_backward = torch.library.custom_op("qwen3f::ring_attention_backward", backward, mutates_args=())


@_forward.register_fake
def _forward_fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_backward.register_fake
def _backward_fake(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.rest = inputs[7:]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *bounds = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = torch.ops.qwen3f.ring_attention_backward(d_out, d_lse, q, k, v, out, lse, *bounds, *ctx.rest)
    return *grads, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)

RING_ATTENTION = torch.ops.qwen3f.ring_attention.default


def _like(x_BHTd: Tensor) -> Tensor:
    """Uninitialised [B, H, T, d] with the memory layout [B, T, H, d], so that the output projection needs no copy."""
    batch, heads, length, d = x_BHTd.shape
    return x_BHTd.new_empty(batch, length, heads, d).transpose(1, 2)
