"""The experts of a Qwen3-30B-A3B layer after the router: sorting by expert, MLPs, weighted sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fused_experts, moe_dispatch
from kernels.bench.case import Case


def cases() -> list[Case]:
    return [case(32_768, 2048, 768, 128, 8)]


def case(tokens: int, hidden: int, width: int, experts: int, top_k: int) -> Case:
    flops = 2 * tokens * top_k * hidden * width * 3
    return Case(
        kernel="moe experts",
        shape=f"T {tokens} D {hidden} I {width} E {experts} top-{top_k}",
        inputs=lambda: inputs(tokens, hidden, width, experts, top_k),
        entries={
            "ours": ours,
            "reference": by_expert,
            "grouped_mm": grouped_mm,
            "compile": torch.compile(grouped_mm, dynamic=False),
            "liger": liger,
        },
        forward=flops,
        backward=2 * flops,
        unit="flops",
    )


def inputs(
    tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """(x, weights, choices, gate, up, down, gate and up concatenated). Routing is by random scores, without a bias."""
    x, scores = (torch.randn(tokens, n, device="cuda") for n in (hidden, experts))
    weights, choices = scores.softmax(-1).topk(top_k)
    gate, up = (torch.randn(experts, width, hidden, device="cuda", dtype=dtype) / hidden**0.5 for _ in range(2))
    down = torch.randn(experts, hidden, width, device="cuda", dtype=dtype) / width**0.5
    x, weights, gate, up, down = (
        t.to(dtype).requires_grad_() for t in (x, weights / weights.sum(-1, keepdim=True), gate, up, down)
    )
    return x, weights, choices, gate, up, down, torch.cat([gate, up], 1).detach()


def ours(x: Tensor, weights: Tensor, choices: Tensor, gate: Tensor, up: Tensor, down: Tensor, _: Tensor) -> Tensor:
    return fused_experts.experts_mlp(x, weights, moe_dispatch.plan(choices, gate.shape[0]), gate, up, down)


def by_expert(x: Tensor, weights: Tensor, choices: Tensor, gate: Tensor, up: Tensor, down: Tensor, _: Tensor) -> Tensor:
    """A loop over experts, as in transformers' eager experts."""
    out = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        token, slot = (choices == expert).nonzero(as_tuple=True)
        rows = x[token]
        y = (F.silu(rows @ gate[expert].t()) * (rows @ up[expert].t())) @ down[expert].t()
        out = out.index_add(0, token, y * weights[token, slot, None])
    return out


def grouped_mm(
    x: Tensor, weights: Tensor, choices: Tensor, gate: Tensor, up: Tensor, down: Tensor, joined: Tensor
) -> Tensor:
    """torch's grouped_mm, in the steps of transformers 5's grouped_mm experts."""
    expert_R, order_R = choices.flatten().sort()
    counts_E = torch.histc(expert_R.int(), bins=gate.shape[0], min=0, max=gate.shape[0] - 1)
    offsets_E = counts_E.cumsum(0, dtype=torch.int32)
    rows_RD = x[order_R // choices.shape[1]]
    gate_RF, up_RF = F.grouped_mm(rows_RD, _Joined.apply(gate, up, joined).mT, offs=offsets_E).chunk(2, -1)
    y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down.mT, offs=offsets_E) * weights.flatten()[order_R, None]
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=x.device)
    return y_RD[place_R].view(*choices.shape, -1).sum(1)


def liger(
    x: Tensor, weights: Tensor, choices: Tensor, gate: Tensor, up: Tensor, down: Tensor, joined: Tensor
) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, _Joined.apply(gate, up, joined), down, choices.int(), weights)


class _Joined(torch.autograd.Function):
    """gate and up as one tensor, which rivals need, without the cost of concatenating them."""

    @staticmethod
    def forward(ctx: object, gate: Tensor, up: Tensor, joined: Tensor) -> Tensor:
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *grad.chunk(2, 1), None
