"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) with grouped heads and packed documents, forward and backward.

The kernels are in flash_attention_forward.py and flash_attention_backward.py. They read and write tiles with the tensor
memory accelerator, so they need a Hopper GPU or newer. Scores are never in memory. The backward pass needs the inputs,
the output and the log-sum-exp of every row.

B batch · H query heads · K key/value heads, H a multiple of K · T queries · S keys · d head_dim
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import check_devices, runs_triton, triton
from kernels.flash_attention_backward import key_kernel, query_kernel, rows_kernel
from kernels.flash_attention_forward import CAUSAL, FULL, RANGES, forward_kernel
from kernels.key_ranges import KeyRanges, dense_mask

_PAD = 128  # rows' statistics are padded to a multiple of this, which is a multiple of every tile's height
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reference(
    q_BHTd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    *,
    causal: bool = True,
    ranges: KeyRanges | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As flash_attention, with all scores in memory in at least float32; works with torch.func."""
    group, scale = q_BHTd.shape[1] // k_BKSd.shape[1], _scale(q_BHTd, scale)
    wide = torch.promote_types(q_BHTd.dtype, torch.float32)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k_BKSd, v_BKSd))
    scores = (q_BHTd.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    allowed = _allowed(q_BHTd, k_BKSd, causal, ranges)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    seen = lse != float("-inf")
    probs = (scores - torch.where(seen, lse, 0.0)[..., None]).exp()
    return (probs @ v.to(wide)).to(q_BHTd.dtype), lse


def flash_attention(
    q_BHTd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    *,
    causal: bool = True,
    ranges: KeyRanges | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(softmax(scale · q kᵀ + mask) v [B, H, T, d] in q's dtype, its log-sum-exp [B, H, T] in float32).

    Both outputs are differentiable, once, in q, k and v. A row that sees no key gives 0 and −∞, and no gradient.

    Args:
      q, k, v: one dtype of float16, bfloat16, float32 (float64 runs the formula) and device; query head h uses
        key/value head h // (H / K). The stride along d must be 1, the others multiples of 16 bytes; both [B, H, T, d]
        and a transposed [B, T, H, d] have that. The output has the layout of the latter. d: 16 … 256, a multiple of 16
        bytes.
      causal: query t sees keys up to t; needs T = S. Ignored when ranges are given.
      ranges: which keys each query sees, see kernels.key_ranges (packed documents, chunks of a ring, windows).
      scale: of the scores, positive; default d^−½.
    Reruns are bit-identical. Raises ValueError for arguments that do not fit, before anything is launched.
    """
    _check(q_BHTd, k_BKSd, v_BKSd, causal, ranges)
    scale = _scale(q_BHTd, scale)
    bounds = (None, None, None, None) if ranges is None else ranges
    return torch.ops.qwen3f.flash_attention(q_BHTd, k_BKSd, v_BKSd, *bounds, causal, scale)


def fits(head_dim: int) -> bool:
    """Whether flash_attention supports heads of this size, in half and in single precision."""
    return 16 <= head_dim <= 256 and head_dim % 8 == 0


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over the union of disjoint sets of keys, from the results for each set.

    parts: (out [..., T, d], lse [..., T]) pairs, as from flash_attention. The result has the outs' dtype. It is plain
    torch, so gradients flow to outs and lses. Rows that see no key in any part stay 0 and −∞.
    """
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    shares = (lses - torch.where(lse == float("-inf"), 0.0, lse)).exp()
    out = sum(share[..., None] * out for share, (out, _) in zip(shares, parts))
    return out.to(parts[0][0].dtype), lse


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


def forward_tiles(D: int, itemsize: int, ragged: bool) -> Tiles:
    """The fastest tiles on an H100 at D 128. D: head_dim, rounded up to a power of two. ragged: with ranges."""
    if itemsize == 4:
        return Tiles(32, 32, 4, 2)
    return Tiles(128, 64, 8, 2) if D == 256 else Tiles(64, 64, 4, 3)


def query_tiles(D: int, itemsize: int, ragged: bool) -> Tiles:
    if itemsize == 4:
        return Tiles(32, 32, 4, 1)
    if D == 256:
        return Tiles(64, 64, 8, 1)
    return Tiles(64, 64, 4, 2) if ragged else Tiles(128, 64, 8, 3)


def key_tiles(D: int, itemsize: int, ragged: bool) -> Tiles:
    if itemsize == 4:
        return Tiles(32, 32, 4, 1)
    return Tiles(32, 64, 8, 1) if D == 256 else Tiles(64, 64, 4, 2)


@torch.library.custom_op("qwen3f::flash_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, lo, hi, first, last, causal, scale)
    if not runs_triton(q) or not q.numel() or not k.numel():
        ranges = None if lo is None else KeyRanges(lo, hi, first, last)
        exact, exact_lse = reference(q, k, v, causal=causal, ranges=ranges, scale=scale)
        return out.copy_(exact), lse.copy_(exact_lse)
    D, tiles = _columns(q), forward_tiles(_columns(q), q.element_size(), lo is not None)
    batch, heads, length, _ = q.shape
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(length, tiles.queries) * batch * heads,)](
            _tile(q, tiles.queries, D), _tile(k, tiles.keys, D), _tile(v, tiles.keys, D), _tile(out, tiles.queries, D),
            lse, lse if lo is None else lo, lse if lo is None else hi, scale * math.log2(math.e), length, k.shape[2],
            heads, GROUP=heads // k.shape[1], MASK=_mask(causal, lo), BM=tiles.queries, BN=tiles.keys, D=D,
            PRECISION=_precision(q), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("qwen3f::flash_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_like(x) for x in (q, k, v))
    if not runs_triton(q) or not q.numel() or not k.numel():
        ranges = None if lo is None else KeyRanges(lo, hi, first, last)
        exact = _formula_backward(d_out, d_lse, q, k, v, out, lse, _allowed(q, k, causal, ranges), scale)
        return tuple(x.copy_(y) for x, y in zip((dq, dk, dv), exact))
    d_out = d_out if _layout_fits(d_out) and _is_aligned(d_out) else _like(d_out).copy_(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    D, size = _columns(q), q.element_size()
    (batch, heads, length, _), (_, kv_heads, keys, _) = q.shape, k.shape
    padded = triton.cdiv(length, _PAD) * _PAD
    rows = q.new_empty(batch, heads, 2, padded, dtype=torch.float32)
    log2_scale = scale * math.log2(math.e)
    shared = {"GROUP": heads // kv_heads, "MASK": _mask(causal, lo), "D": D, "PRECISION": _precision(q)}
    with torch.cuda.device_of(q):
        rows_kernel[(padded // _PAD * batch * heads,)](
            _tile(out, _PAD, D), _tile(d_out, _PAD, D), lse, lse if d_lse is None else d_lse, rows, log2_scale, length,
            padded, heads, HAS_DLSE=d_lse is not None, BM=_PAD, D=D, num_warps=8,
        )  # fmt: skip
        t = key_tiles(D, size, lo is not None)
        key_kernel[(triton.cdiv(keys, t.keys) * batch * kv_heads,)](
            _tile(q, t.queries, D), *(_tile(x, t.keys, D) for x in (k, v)), _tile(d_out, t.queries, D),
            *(_tile(x, t.keys, D) for x in (dk, dv)), rows, *(rows if x is None else x for x in (first, last)),
            log2_scale, length, padded, keys, kv_heads, **shared, BM=t.queries, BN=t.keys, num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip
        t = query_tiles(D, size, lo is not None)
        query_kernel[(triton.cdiv(length, t.queries) * batch * heads,)](
            _tile(q, t.queries, D), *(_tile(x, t.keys, D) for x in (k, v)), *(_tile(x, t.queries, D) for x in (d_out,
            dq)), rows, *(rows if x is None else x for x in (lo, hi)), log2_scale, length, padded, keys, heads,
            **shared, BM=t.queries, BN=t.keys, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.causal, ctx.scale = causal, scale


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *bounds = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = torch.ops.qwen3f.flash_attention_backward(d_out, d_lse, q, k, v, out, lse, *bounds, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)

FLASH_ATTENTION = torch.ops.qwen3f.flash_attention.default


def _formula_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    allowed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    q, k, v, out, d_out = (x.to(lse.dtype) for x in (q, k, v, out, d_out))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    probs = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    delta = (d_out * out).sum(-1) - (0 if d_lse is None else d_lse)
    d_scores = probs * (d_out @ v.transpose(-1, -2) - delta[..., None]) * scale
    dk, dv = d_scores.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ d_out
    return d_scores @ k, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def _allowed(q: Tensor, k: Tensor, causal: bool, ranges: KeyRanges | None) -> Tensor | None:
    if ranges is not None:
        return dense_mask(ranges)
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else None


def _scale(q: Tensor, scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def _like(x_BHTd: Tensor) -> Tensor:
    """Uninitialised [B, H, T, d] with the memory layout [B, T, H, d], so that the output projection needs no copy."""
    batch, heads, length, d = x_BHTd.shape
    return x_BHTd.new_empty(batch, length, heads, d).transpose(1, 2)


def _mask(causal: bool, lo: Tensor | None) -> int:
    return RANGES if lo is not None else CAUSAL if causal else FULL


def _columns(q: Tensor) -> int:
    return triton.next_power_of_2(q.shape[3])


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"  # half precision ignores it


def _tile(x_BHTd: Tensor, rows: int, D: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not _is_aligned(x_BHTd):
        raise ValueError("q, k and v must start at a multiple of 16 bytes; clone the tensor")
    return TensorDescriptor(x_BHTd, list(x_BHTd.shape), list(x_BHTd.stride()), [1, 1, rows, D])


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _layout_fits(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can load tiles of x. Strides of axes of size 1 count too."""
    return x.stride(-1) == 1 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, ranges: KeyRanges | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, positions, head_dim], got {tuple(x.shape)}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}; q, k and v must have one floating dtype (q: {q.dtype})")
        if not _layout_fits(x):
            raise ValueError(
                f"{name} has strides {x.stride()}: the last must be 1, others multiples of 16 bytes; use .contiguous()"
            )
    check_devices(q=q, k=k, v=v)
    (batch, heads, length, d), (_, kv_heads, keys, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d:
        raise ValueError(
            f"k and v must be [{batch}, kv_heads, keys, {d}] as q, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, no multiple of k's {kv_heads}")
    if not 16 <= d <= 256:
        raise ValueError(f"head_dim must be 16 … 256, got {d}")
    if ranges is None:
        if causal and length != keys:
            raise ValueError(f"causal needs as many queries as keys, got {length} and {keys}; pass ranges")
        return
    check_devices(q=q, **ranges._asdict())
    for name, x in ranges._asdict().items():
        shape = (batch, length if name in ("lo", "hi") else keys)
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"ranges.{name} must be contiguous int32 {list(shape)}, got {x.dtype} {list(x.shape)}")
