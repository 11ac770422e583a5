"""Attention of a few new tokens over a long KV cache, whose keys are split over many programs (flash-decoding).

With one new token per row there are only batch × heads queries, too few programs to read the cache at full bandwidth.
So each program takes one slice of one row's keys, for all query heads that share them, and a second kernel merges the
slices by their log-sum-exp (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference").

B batch · H query heads · K key/value heads · G = H/K · T new tokens · S cache slots · d head_dim, padded to the power
of two D
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import check_devices, runs_triton, tl, triton
from kernels.flash_attention import reference as attention_reference
from kernels.key_ranges import key_ranges

_PROGRAMS = 512  # about four per multiprocessor
_BLOCK = 64  # keys per step
MAX_ROWS = 128  # limit for G · T, the queries of one program


def reference(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, seen_BT: Tensor, scale: float) -> Tensor:
    """As flash_decode, with all scores in memory."""
    ranges = key_ranges(torch.zeros_like(seen_BT), seen_BT, k_BKSd.shape[2])
    return attention_reference(q_BHTd, k_BKSd, v_BKSd, causal=False, ranges=ranges, scale=scale)[0]


def flash_decode(
    q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, seen_BT: Tensor, *, scale: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v over the first seen[b, t] slots of row b; [B, H, T, d] in q's dtype, no gradients.

    Args:
      q, k, v: one dtype of float16, bfloat16, float32 (float64 runs the formula) and device, stride 1 along d. k and v
        may be slices of a larger cache. H · T / K at most 128, d 16 … 256.
      seen: int32 [B, T]; 0 gives a row of zeros. Slots that no token of a row sees may have any values.
      scale: positive; default d^−½.
    The number of splits follows from the shapes alone, so reruns are bit-identical. Raises ValueError for arguments
    that do not fit.
    """
    _check(q_BHTd, k_BKSd, v_BKSd, seen_BT)
    scale = q_BHTd.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return torch.ops.qwen3f.flash_decode(q_BHTd, k_BKSd, v_BKSd, seen_BT, scale)


@torch.library.custom_op("qwen3f::flash_decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not runs_triton(q) or not q.numel() or not k.numel():
        unseen_BS = torch.arange(k.shape[2], device=q.device) >= F.pad(seen, (1, 0)).amax(1, keepdim=True)
        v = v.masked_fill(unseen_BS[:, None, :, None], 0)  # 0 · NaN is NaN, even with probability 0
        return out.copy_(reference(q, k, v, seen, scale))
    (batch, heads, length, d), (_, kv_heads, slots, _) = q.shape, k.shape
    rows = heads // kv_heads * length
    splits = max(1, min(triton.cdiv(slots, _BLOCK), _PROGRAMS // (batch * kv_heads)))
    partial = q.new_empty(batch * kv_heads, splits, rows, d, dtype=torch.float32)
    lse = q.new_empty(batch * kv_heads, splits, rows, dtype=torch.float32)
    D, R = triton.next_power_of_2(d), max(16, triton.next_power_of_2(rows))
    with torch.cuda.device_of(q):
        _split_kernel[(batch * kv_heads, splits)](
            q, k, v, seen, partial, lse, scale * math.log2(math.e), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            length, kv_heads, triton.cdiv(triton.cdiv(slots, splits), _BLOCK) * _BLOCK, rows, d,
            GROUP=heads // kv_heads, R=R, BN=_BLOCK, D=D, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=2 if D * k.element_size() > 256 else 3,
        )  # fmt: skip
        _merge_kernel[(batch * kv_heads, rows)](
            partial, lse, out, rows, d, splits, SPLITS=triton.next_power_of_2(splits), D=D, num_warps=4
        )
    return out


@_decode.register_fake
def _decode_fake(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, partial_ptr, lse_ptr, scale, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, T, K,
    SPLIT, rows, d, GROUP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of SPLIT keys for the R rows (g, t) of one key/value head: its normalised output and log2-sum-exp2."""
    b, kh = (tl.program_id(0) // K).to(tl.int64), (tl.program_id(0) % K).to(tl.int64)
    row, column = tl.arange(0, R), tl.arange(0, D)
    g, t = row // T, row % T
    inside = row < rows
    q_at = q_ptr + b * sqb + (kh * GROUP + g)[:, None] * sqh + t[:, None] * sqt + column[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (column < d)[None, :], other=0.0)
    seen = tl.load(seen_ptr + b * T + t, mask=inside, other=0)
    begin = tl.program_id(1) * SPLIT
    end = tl.minimum(begin + SPLIT, tl.max(seen, 0))

    acc = tl.zeros([R, D], tl.float32)
    total = tl.zeros([R], tl.float32)
    top = tl.full([R], -1e30, tl.float32)
    for start in tl.range(begin, end, BN):
        at = start + tl.arange(0, BN)
        use = (at < end)[:, None] & (column < d)[None, :]
        k = tl.load(k_ptr + b * skb + kh * skh + at[:, None].to(tl.int64) * skt + column[None, :], mask=use, other=0.0)
        v = tl.load(v_ptr + b * svb + kh * svh + at[:, None].to(tl.int64) * svt + column[None, :], mask=use, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        scores = tl.where(at[None, :] < seen[:, None], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        probs = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    some = total > 0
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * rows + row
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(partial_ptr + place[:, None] * d + column[None, :], acc, mask=inside[:, None] & (column < d)[None, :])
    tl.store(
        lse_ptr + place, tl.where(some, top + tl.math.log2(tl.where(some, total, 1.0)), float("-inf")), mask=inside
    )


@triton.jit
def _merge_kernel(partial_ptr, lse_ptr, out_ptr, rows, d, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    """One row (g, t) of one key/value head: the mean of its slices' outputs, weighted by their sums of exponentials."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, split = tl.arange(0, D), tl.arange(0, SPLITS)
    place = (head * splits + split) * rows + row
    lse = tl.load(lse_ptr + place, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.math.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    use = (split < splits)[:, None] & (column < d)[None, :]
    parts = tl.load(partial_ptr + place[:, None] * d + column[None, :], mask=use, other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (head * rows + row) * d + column, out.to(out_ptr.dtype.element_ty), mask=column < d)


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point() or x.dtype != q.dtype or x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be [batch, heads, positions, head_dim] of one floating dtype with stride 1 along "
                f"head_dim, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
            )
    check_devices(q=q, k=k, v=v, seen=seen)
    (batch, heads, length, d), kv_heads = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d or not kv_heads or heads % kv_heads:
        raise ValueError(f"q, k and v do not fit together: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if heads // kv_heads * length > MAX_ROWS:
        raise ValueError(
            f"q has {length} tokens × {heads // kv_heads} query heads per key/value head; at most {MAX_ROWS} fit"
        )
    if not 16 <= d <= 256:
        raise ValueError(f"head_dim must be 16 … 256, got {d}")
    if seen.shape != (batch, length) or seen.dtype != torch.int32 or not seen.is_contiguous():
        raise ValueError(f"seen must be contiguous int32 [{batch}, {length}], got {seen.dtype} {tuple(seen.shape)}")
