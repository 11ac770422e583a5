"""Rotary positions, and the norms of queries and keys before them, at Qwen3-1.7B's heads."""

import torch
from torch import Tensor

from kernels import qk_norm_rope, rmsnorm, rope
from kernels.bench.case import Case

_EPS = 1e-6
_B, _T, _H, _K, _D = 4, 4096, 16, 8, 128
_BYTES = 2 * _B * _T * (_H + _K) * _D
_SHAPE = f"{_B}×{_T}×({_H}+{_K})×{_D}"
Pair = tuple[Tensor, Tensor]


def cases() -> list[Case]:
    return [
        Case(
            kernel="rope",
            shape=_SHAPE,
            inputs=lambda: _inputs(norms=False),
            entries={
                "ours": rope.rope,
                "reference": rope.reference,
                "compile": torch.compile(rope.reference, dynamic=False),
                "liger": _liger_rope,
            },
            forward=2 * _BYTES,
            backward=2 * _BYTES,
            unit="bytes",
        ),
        Case(
            kernel="qk_norm_rope",
            shape=_SHAPE,
            inputs=lambda: _inputs(norms=True),
            entries={
                "ours": qk_norm_rope.qk_norm_rope,
                "reference": qk_norm_rope.reference,
                "compile": torch.compile(qk_norm_rope.reference, dynamic=False),
                "liger": _liger_pair,
                "apart": _apart,
            },
            forward=2 * _BYTES,
            backward=3 * _BYTES,
            unit="bytes",
        ),
    ]


def _inputs(norms: bool) -> tuple[object, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    angles = torch.rand(1, _T, _D // 2, device="cuda").mul(1000).expand(_B, _T, _D // 2)
    heads, tables = (draw(_B, _T, _H, _D), draw(_B, _T, _K, _D)), (angles.cos().bfloat16(), angles.sin().bfloat16())
    return (*heads, draw(_D), draw(_D), *tables, _EPS) if norms else (*heads, *tables)


def _apart(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Pair:
    """Our own kernels, not fused."""
    return rope.rope(rmsnorm.rms_norm(q, q_weight, eps), rmsnorm.rms_norm(k, k_weight, eps), cos, sin)


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """In place in both directions, because it has no other form. It gets one row of the tables, because it would copy
    expanded ones."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos[:1], sin[:1], None, 1, _D)
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger_pair(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Pair:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    q = LigerRMSNormFunction.apply(q, q_weight, eps, 0.0, "llama", False)
    k = LigerRMSNormFunction.apply(k, k_weight, eps, 0.0, "llama", False)
    return _liger_rope(q, k, cos, sin)
