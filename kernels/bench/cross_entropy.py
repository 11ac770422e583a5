"""Linear cross-entropy over Qwen3's vocabulary: the loss and the gradients of hidden and weight, timed together."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy
from kernels.bench.case import Case, LeftOut

_VOCABULARY = 151_936
_MOST_LOGITS = 8192 * _VOCABULARY  # the reference holds four copies of them, two in float32: 15 GB


def cases() -> list[Case]:
    return [_case(tokens, size) for tokens, size in ((8192, 2048), (16_384, 2048), (32_768, 2048), (8192, 4096))]


def _case(tokens: int, size: int) -> Case:
    def inputs() -> tuple[object, ...]:
        hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(_VOCABULARY, size, device="cuda", dtype=torch.bfloat16) * size**-0.5
        targets = torch.randint(0, _VOCABULARY, (tokens,), device="cuda")
        return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.ones(tokens, device="cuda")

    return Case(
        kernel="linear cross-entropy",
        shape=f"N{tokens} D{size} V{_VOCABULARY}",
        inputs=inputs,
        entries={
            "ours": cross_entropy.linear_cross_entropy,
            "reference": _naive,
            "compile": torch.compile(_naive, dynamic=False),
            "liger": _liger,
        },
        forward=3 * 2 * tokens * size * _VOCABULARY,
        backward=0,
        unit="flops",
        joint=True,
    )


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    if len(hidden) * len(weight) > _MOST_LOGITS:
        raise LeftOut("does not fit")
    return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none") * weights).sum()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Without token weights, which it does not support; here they are all 1."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, cross_entropy.IGNORE, 0.0, 0.0, "sum"
    )
    return loss
