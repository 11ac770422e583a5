"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) with Qwen3's order of casts, and L2 norm for queries and keys.

x: [.., D] with any leading dimensions; D is normalised.
"""

import torch
from torch import Tensor, nn

from kernels import rmsnorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x/√(mean(x²)+eps) over the last dimension. As in transformers, the cast back precedes the weight.

    Internal precision is float32, or float64 for float64 input. Returns x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def l2_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x/√(Σx²+eps) over the last dimension: a unit vector times a learned gain (qk_norm="l2")."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class RMSNorm(nn.Module):
    """fused: on a GPU, run the kernel of kernels/rmsnorm.py; otherwise the formula."""

    def __init__(self, size: int, eps: float, fused: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and x.is_cuda:
            return rmsnorm.rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(the norm of x + residual, x + residual)."""
        if self.fused and x.is_cuda:
            return rmsnorm.rms_norm(x, self.weight, self.eps, residual)
        total = residual + x
        return rms_norm(total, self.weight, self.eps), total


class L2Norm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return l2_norm(x, self.weight, self.eps)
