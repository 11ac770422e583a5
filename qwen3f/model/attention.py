"""Grouped-query attention with QK-norm and rotary positions (Qwen3 technical report, arXiv:2505.09388, §2).

B batch · T sequence · D hidden · H query heads · K key/value heads · d head_dim. Head counts are read from the local
weights, so the same code runs on a tensor-parallel shard.

A query attends to the keys up to its own position; in a packed batch only to those of its own document. A document is a
contiguous run of equal segment numbers. Padding (segment 0) is a run like any other: it attends to itself and so never
gives NaN; its loss weight is 0.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import document_attention, flash_attention, flash_decode, key_ranges
from kernels.document_attention import Run
from kernels.key_ranges import KeyRanges
from kernels.qk_norm_rope import qk_norm_rope
from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model import invariant
from qwen3f.model.execution import Execution
from qwen3f.model.kv_cache import PagedLayer, dense_allowed, extend
from qwen3f.model.norm import L2Norm, RMSNorm
from qwen3f.model.rope import apply_rope
from sharding.axes import ONE, Axes, Axis
from sharding.ring import ring_attention
from sharding.sequence_split import RingRanges, ring_ranges
from sharding.tensor import column_parallel, kv_rows, row_parallel

BACKENDS = ("auto", "reference", "sdpa", "flash")


class AttentionMask(NamedTuple):
    """Which keys each query sees, in one of four forms. At most one is set; none means plain causal attention.

    allowed: bool [B, 1, T, T], True where a query sees a key (for torch's attention and the formula).
    ranges: the contiguous range of keys that each query sees (for kernels.flash_attention).
    ring: ranges for every step of ring attention, when the sequence is cut over cp (for sharding.ring).
    documents: the documents as runs of positions (for kernels.document_attention).
    """

    allowed: Tensor | None = None
    ranges: KeyRanges | None = None
    ring: RingRanges | None = None
    documents: tuple[Run, ...] | None = None


def check_heads(cfg: ModelConfig, backend: str, cp: int = 1) -> None:
    """UserError if heads of the model or its vision tower have a size that flash attention does not support.

    It is checked for backend "flash", and for the model's heads also with cp > 1, because every step of ring attention
    calls flash attention.
    """
    sizes = {"head_dim": cfg.head_dim}
    if cfg.vision_enabled:
        size = cfg.vision_hidden_size // cfg.vision_num_attention_heads
        sizes["vision_hidden_size / config.model.vision_num_attention_heads"] = size
    for name, size in sizes.items():
        ring = cp > 1 and name == "head_dim"
        if (ring or backend == "flash") and not flash_attention.fits(size):
            what = f"cp{cp} in config.mesh" if ring else "config.attention=flash"
            instead = "leave cp out" if ring else "write --config.attention=auto"
            raise UserError(
                f"{what} needs a head size that is a multiple of 8 from 16 to 256, but config.model.{name} is {size}; "
                f"{instead}, or write another size"
            )


def make_mask(segments_BT: Tensor | None, backend: str, head_dim: int, compiled: bool = False) -> AttentionMask:
    """The mask in the form that `backend` needs. segments_BT None: plain causal attention.

    "auto" takes the fastest by measurement (kernels/bench). On a GPU, packed documents use our flash attention, which
    skips keys of other documents. On a CPU, packed documents are computed one by one, unless blocks are compiled.
    Everything else, also head sizes that flash attention does not support, uses torch's scaled_dot_product_attention
    (on a GPU cuDNN's).
    """
    if backend not in (*BACKENDS, "invariant"):
        raise UserError(f"config.attention={backend!r} is unknown; use one of {', '.join(BACKENDS)}, invariant")
    if segments_BT is None:
        return AttentionMask()
    ranges = key_ranges.ranges_from_segments(segments_BT)
    if backend == "invariant" or _takes_flash(backend, segments_BT, head_dim):
        return AttentionMask(ranges=ranges)
    if backend == "auto" and not compiled and document_attention.can(segments_BT):
        return AttentionMask(documents=document_attention.runs_of(ranges.lo))
    return AttentionMask(allowed=key_ranges.dense_mask(ranges))


def _takes_flash(backend: str, x: Tensor, head_dim: int) -> bool:
    return backend == "flash" or (backend == "auto" and x.is_cuda and flash_attention.fits(head_dim))


def batch_mask(batch: Mapping[str, Tensor], execution: Execution, head_dim: int, cp: Axis) -> AttentionMask:
    """The mask of a batch; under cp of this rank's part, from sharding.sequence_split.split_sequence."""
    if cp.size > 1:
        return AttentionMask(ring=ring_ranges(batch["starts"], cp))
    return make_mask(batch.get("segments"), execution.backend, head_dim, execution.compile != "off")


def attend(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask: AttentionMask, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ/√d + mask) v by the fastest kernel for the mask's form; [B, H, T, d]."""
    if mask.ranges is not None or backend == "flash":
        return flash_attention.flash_attention(q_BHTd, k_BKTd, v_BKTd, ranges=mask.ranges)[0]
    if torch.compiler.is_compiling() and q_BHTd.dtype == torch.float64 and not q_BHTd.is_cuda:
        # torch 2.11 compiles the CPU's fused kernel for float64 with a log-sum-exp of the wrong dtype
        return attend_reference(q_BHTd, k_BKTd, v_BKTd, mask, 0.0, None)
    grouped = q_BHTd.shape[1] != k_BKTd.shape[1]
    if grouped and not q_BHTd.is_cuda:
        # the CPU's fused kernel needs equal head counts; with enable_gqa torch falls back to the unfused one
        k_BKTd, v_BKTd = (_repeat_heads(x, q_BHTd.shape[1]) for x in (k_BKTd, v_BKTd))
        grouped = False
    if mask.documents is not None:
        return document_attention.attend(q_BHTd, k_BKTd, v_BKTd, mask.documents, causal=True)
    return F.scaled_dot_product_attention(
        q_BHTd, k_BKTd, v_BKTd, attn_mask=mask.allowed, is_causal=mask.allowed is None, enable_gqa=grouped
    )


def attend_reference(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask: AttentionMask, dropout: float, stream: Tensor | None
) -> Tensor:
    """The formula, with all scores in memory. It works with torch.func, and only it has dropout.

    dropout zeroes probabilities and scales the others by 1/(1−dropout), as transformers' eager attention does. The
    dropout mask depends only on `stream` (an int64 scalar tensor) and the element's index.
    """
    heads, length = q_BHTd.shape[1], q_BHTd.shape[2]
    k, v = _repeat_heads(k_BKTd, heads), _repeat_heads(v_BKTd, heads)
    allowed = mask.allowed
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=q_BHTd.device).tril()
    scores = (q_BHTd @ k.transpose(-1, -2)) * q_BHTd.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~allowed, float("-inf"))
    probs = scores.softmax(-1).to(q_BHTd.dtype)
    if dropout and stream is not None:
        place = torch.arange(probs.numel(), device=probs.device).view(probs.shape)
        probs = probs * (rng.uniform(stream, place) >= dropout).to(probs.dtype) / (1.0 - dropout)
    return probs @ v


def attend_invariant(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask: AttentionMask) -> Tensor:
    """As attend, by qwen3f.model.invariant."""
    at_BT = torch.arange(q_BHTd.shape[2], device=q_BHTd.device).expand(len(q_BHTd), -1)
    bounds = (torch.zeros_like(at_BT), at_BT + 1) if mask.ranges is None else mask.ranges[:2]
    return invariant.attend(q_BHTd, k_BKTd, v_BKTd, *bounds)


def attend_cached(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, cache: PagedLayer, backend: str) -> Tensor:
    """Write the new keys and values into the cache, and attend to it: [B, H, T, d].

    For torch's kernel, query heads that share a key/value head become additional query rows of one head: head counts
    are then equal, and the cache need not be repeated.
    """
    keys, values = extend(cache, k_BKTd, v_BKTd)
    if backend == "invariant":
        return invariant.attend(q_BHTd, keys, values, torch.zeros_like(cache.seen), cache.seen)
    if _takes_flash(backend, q_BHTd, q_BHTd.shape[-1]):
        if q_BHTd.shape[1] // keys.shape[1] * q_BHTd.shape[2] <= flash_decode.MAX_ROWS:
            return flash_decode.flash_decode(q_BHTd, keys, values, cache.seen)
        ranges = key_ranges.key_ranges(torch.zeros_like(cache.seen), cache.seen, cache.span)
        return flash_attention.flash_attention(q_BHTd, keys, values, ranges=ranges)[0]
    allowed = dense_allowed(cache)
    if backend == "reference":
        return attend_reference(q_BHTd, keys, values, AttentionMask(allowed), 0.0, None)
    group = q_BHTd.shape[1] // keys.shape[1]
    q = q_BHTd.unflatten(1, (-1, group)).flatten(2, 3)
    out = attend(q, keys, values, AttentionMask(allowed.repeat(1, 1, group, 1)))
    return out.unflatten(2, (group, -1)).flatten(1, 2)


def _repeat_heads(x_BKTd: Tensor, heads: int) -> Tensor:
    """[B, heads, T, d]: repeat each key/value head j for its g query heads, j·g … j·g+g−1."""
    return x_BKTd.repeat_interleave(heads // x_BKTd.shape[1], dim=1)


class Attention(nn.Module):
    """Skeleton of one layer's attention, on the meta device; functional_call supplies the weights.

    fused: on a GPU, one kernel normalises and rotates queries and keys. Under tp, x and the result have this rank's
    part of the tokens (sharding.tensor); attention in between has all tokens and this rank's heads.
    """

    def __init__(self, cfg: ModelConfig, backend: str, fused: bool, axes: Axes = ONE) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=cfg.attention_bias)
        self.q_proj = linear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim)
        self.k_proj = linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim)
        self.v_proj = linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim)
        self.o_proj = linear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size)
        self.qk_norm = cfg.qk_norm != "none"
        if self.qk_norm:
            norm = RMSNorm if cfg.qk_norm == "rms" else L2Norm
            self.q_norm = norm(cfg.head_dim, cfg.rms_norm_eps)
            self.k_norm = norm(cfg.head_dim, cfg.rms_norm_eps)
        self.fused = fused and cfg.qk_norm == "rms"
        self.eps = cfg.rms_norm_eps
        self.head_dim = cfg.head_dim
        self.kv_heads = cfg.num_key_value_heads
        self.dropout = cfg.attention_dropout
        self.backend = backend
        self.axes = axes

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask | PagedLayer, stream: Tensor | None
    ) -> Tensor:
        tp = self.axes.tp
        queries = self.q_proj.weight, self.q_proj.bias
        keys, values = (kv_rows(linear, self.kv_heads, tp) for linear in (self.k_proj, self.v_proj))
        flat = column_parallel(x_BTD, [queries, keys, values], tp)
        q, k, v = (t.view(*cos.shape[:2], -1, self.head_dim) for t in flat)
        if self.fused and x_BTD.is_cuda:
            q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, self.eps)
        else:
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if isinstance(mask, PagedLayer):
            out = attend_cached(q, k, v, mask, self.backend)
        elif mask.ring is not None:
            out = ring_attention(q, k, v, self.axes.cp, mask.ring)[0]
        elif self.backend == "invariant":
            out = attend_invariant(q, k, v, mask)
        elif self.backend == "reference" or (self.dropout and stream is not None):
            out = attend_reference(q, k, v, mask, self.dropout, stream)
        else:
            out = attend(q, k, v, mask, self.backend)
        return row_parallel(self.o_proj, out.transpose(1, 2).flatten(-2), tp)
