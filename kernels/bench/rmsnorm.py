"""RMSNorm at hidden sizes, with a residual, and in the shape of Qwen3's norms of queries and keys."""

import torch
from torch import Tensor

from kernels import rmsnorm
from kernels.bench.case import Case

_EPS = 1e-6


def cases() -> list[Case]:
    plain = [_case(rows, size, False) for rows, size in ((32_768, 4096), (262_144, 128), (16_384, 2048))]
    return [*plain, _case(32_768, 4096, True)]


def _case(rows: int, size: int, residual: bool) -> Case:
    def inputs() -> tuple[object, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

        return draw(rows, size), draw(size), _EPS, *(draw(rows, size) for _ in range(residual))

    tensor = rows * size * 2
    return Case(
        kernel="rmsnorm + residual" if residual else "rmsnorm",
        shape=f"{rows}×{size}",
        inputs=inputs,
        entries={
            "ours": rmsnorm.rms_norm,
            "reference": rmsnorm.reference,
            "compile": torch.compile(rmsnorm.reference, dynamic=False),
            "liger": _liger,
        },
        forward=tensor * (4 if residual else 2),
        backward=tensor * (4 if residual else 3),
        unit="bytes",
    )


def _liger(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Not in place, because its backward pass would overwrite the upstream gradient."""
    if residual is None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
