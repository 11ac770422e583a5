"""Flash attention against cuDNN, FlashAttention-2, flex_attention and varlen_attn; decoding against torch's."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import flash_attention, flash_decode
from kernels.bench.case import Case, LeftOut
from kernels.key_ranges import KeyRanges, ranges_from_cu_seqlens

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
_SCORES_THAT_FIT = 1 << 30  # limit for the number of scores with which the formula, which keeps several copies, runs


def cases() -> list[Case]:
    return [_causal(4, 4096), _causal(1, 16384), _documents(16384, 700), _decode(1, 4096), _decode(64, 4096)]


def _inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    sizes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM))
    shapes = [(batch, length, *size) for size in sizes]
    return tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _formula(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges | None = None) -> Tensor:
    if q.shape[0] * q.shape[1] * q.shape[2] ** 2 > _SCORES_THAT_FIT:
        raise LeftOut("does not fit")
    return flash_attention.reference(q, k, v, ranges=ranges)[0]


def _flops(batch: int, seen: float) -> float:
    """FLOPs of two products. seen: number of visible (query, key) pairs per row."""
    return 4.0 * batch * HEADS * HEAD_DIM * seen


@functools.cache
def _compiled_flex() -> object:
    return torch.compile(flex_attention, dynamic=False)


def _causal(batch: int, length: int) -> Case:
    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled_flex()(q, k, v, block_mask=mask(), enable_gqa=True)

    @functools.cache
    def mask() -> object:
        return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda")

    flops = _flops(batch, length * (length + 1) / 2)
    entries = {
        "ours": lambda q, k, v: flash_attention.flash_attention(q, k, v)[0],
        "reference": _formula,
        "compile": torch.compile(_formula, dynamic=False),
        "cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "flex": flex,
    }
    shape = f"causal B{batch} H{HEADS} KV{KV_HEADS} d{HEAD_DIM} T{length}"
    return Case("flash_attention", shape, lambda: _inputs(batch, length), entries, flops, 2.5 * flops, "flops")


def documents(length: int, mean: int) -> Tensor:
    """int32 cu_seqlens [length + 1] of one row: documents of exponential length, padded with the total. Fixed seed."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.empty(4 * length // mean + 64).exponential_(1 / mean, generator=g).long() + 1
    ends = sizes.cumsum(0).clamp(max=length)
    return F.pad(ends, (1, max(0, length - len(ends))), value=0).cummax(0).values[: length + 1].to(torch.int32)


def _documents(length: int, mean: int) -> Case:
    cu = documents(length, mean).cuda()
    ranges = ranges_from_cu_seqlens(cu, length)
    real = cu.unique()
    sizes = real.diff().double()

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled_flex()(q, k, v, block_mask=mask(), enable_gqa=True)

    @functools.cache
    def mask() -> object:
        number = torch.searchsorted(real, torch.arange(length, device="cuda", dtype=torch.int32), right=True)
        same = lambda b, h, q, k: (q >= k) & (number[q] == number[k])  # noqa: E731
        return create_block_mask(same, None, None, length, length, device="cuda")

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """varlen_attn does not support grouped heads, so keys and values are repeated."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        longest = int(sizes.max())
        return varlen_attn(q, k, v, real, real, longest, longest, window_size=(-1, 0))

    flops = _flops(1, (sizes * (sizes + 1) / 2).sum().item())
    entries = {
        "ours": lambda q, k, v: flash_attention.flash_attention(q, k, v, ranges=ranges)[0],
        "reference": _formula,
        "cudnn, not packed": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flex": flex,
        "varlen": varlen,
    }
    shape = f"documents of mean {mean} in T{length}"
    return Case("flash_attention", shape, lambda: _inputs(1, length), entries, flops, 2.5 * flops, "flops")


def _decode(batch: int, slots: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        shapes = ((batch, HEADS, 1, HEAD_DIM), *[(batch, KV_HEADS, slots, HEAD_DIM)] * 2)
        seen = torch.full((batch, 1), slots, dtype=torch.int32, device="cuda")
        return *(torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes), seen

    def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        mask = (torch.arange(slots, device="cuda") < seen[..., None])[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    entries = {
        "ours": flash_decode.flash_decode,
        "reference": functools.partial(flash_decode.reference, scale=HEAD_DIM**-0.5),
        "sdpa": sdpa,
    }
    size = 2.0 * 2 * batch * KV_HEADS * slots * HEAD_DIM
    return Case("flash_decode", f"B{batch}, {slots} slots", inputs, entries, size, 0.0, "bytes")
