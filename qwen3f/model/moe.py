"""Mixture of experts as in Qwen3-MoE: a softmax router, the top-k experts of each token, by default no token dropped.

Rows are sorted by expert, go through the grouped products of kernels/grouped_gemm.py and come back in their places. The
work is that of the top-k experts of each token, however many there are. The one thing that the host waits for is the
number of rows of each expert, once a layer.

What the router did comes out as data beside the layer's result, so that recomputing a layer counts nothing twice; the
losses made of it are in qwen3f/train/balance.py.

N tokens · K experts a token · R = N·K rows · E experts · D hidden · F expert width
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.grouped_gemm import grouped_linear
from qwen3f.config import ModelConfig
from qwen3f.model.mlp import ACTIVATIONS

EXPERT_FORMS = ("grouped", "reference")


class RouterStats(NamedTuple):
    """What a router did with the real tokens of one call. All are sums, so those of several calls or ranks add up.

    counts: int64 [E], how often each expert was among a token's top k, dropped or not. probs: [E], Σ over tokens of the
    softmax, with its gradient. tokens: int64 scalar. log_z: scalar, Σ over tokens of logsumexp(logits)²; it has a
    gradient if the config's router_z_loss_coef is above 0. dropped: int64 scalar, how many choices found their expert
    full. Floats are float32 (float64 for float64). A whole model's have a leading axis of sparse layers.
    """

    counts: Tensor
    probs: Tensor
    tokens: Tensor
    log_z: Tensor
    dropped: Tensor


def route(probs_NE: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights [N, K] in `dtype`, experts [N, K] int64), the likeliest expert first.

    probs_NE: softmax over all experts in float32 (float64 for float64). `normalize` makes the top k sum to 1.
    """
    weights, experts = probs_NE.topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), experts


def count(expert_R: Tensor, marks_R: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: Σ of the int64 marks of each expert's rows."""
    # not bincount: its output has no static size, which would cut the compiled graph
    return expert_R.new_zeros(num_experts).scatter_add(0, expert_R, marks_R)


def within_capacity(weights_NK: Tensor, experts_NK: Tensor, real_N: Tensor, num_experts: int, capacity: int) -> Tensor:
    """bool [N, K]: whether a choice is among the `capacity` heaviest of its expert.

    Of equal weights the earlier token stays. Padding (real_N False) comes after every real token.
    """
    expert_R = experts_NK.flatten()
    priority_R = torch.where(real_N[:, None], weights_NK.detach(), -1.0).flatten()
    heavy_first_R = priority_R.sort(descending=True, stable=True).indices
    order_R = heavy_first_R[expert_R[heavy_first_R].sort(stable=True).indices]
    counts_E = count(expert_R, torch.ones_like(expert_R), num_experts)
    first_E = counts_E.cumsum(0) - counts_E
    place_R = torch.arange(len(expert_R), device=expert_R.device) - first_E[expert_R[order_R]]
    return torch.zeros_like(expert_R).scatter(0, order_R, place_R).view_as(experts_NK) < capacity


class ExpertLinear(nn.Module):
    """The same linear layer of all experts, [E, out, in]; a holder of its weight's name."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class Experts(nn.Module):
    """Σ over a token's experts of weight · down(act(gate(x)) · up(x)); the weight comes after down."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        sizes = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_proj = ExpertLinear(*sizes)
        self.up_proj = ExpertLinear(*sizes)
        self.down_proj = ExpertLinear(sizes[0], sizes[2], sizes[1])
        self.act = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        num_experts, top_k = self.gate_proj.weight.shape[0], experts_NK.shape[1]
        expert_R = experts_NK.flatten()
        order_R = expert_R.sort(stable=True).indices
        place_R = torch.zeros_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
        counts_E = count(expert_R, torch.ones_like(expert_R), num_experts).cpu()
        x_RD = _TakeRows.apply(x_ND, order_R // top_k, place_R, top_k)
        gate_RF, up_RF = (grouped_linear(x_RD, p.weight, counts_E) for p in (self.gate_proj, self.up_proj))
        y_RD = grouped_linear(self.act(gate_RF) * up_RF, self.down_proj.weight, counts_E)
        y_NKD = _TakeRows.apply(y_RD, place_R, order_R, 1).unflatten(0, (-1, top_k))
        return (y_NKD * weights_NK[..., None]).sum(1)

    def reference(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """The formula, with every token through every expert; composes with torch.func."""
        gate_NEF, up_NEF = (torch.einsum("nd,efd->nef", x_ND, p.weight) for p in (self.gate_proj, self.up_proj))
        y_NED = torch.einsum("nef,edf->ned", self.act(gate_NEF) * up_NEF, self.down_proj.weight)
        weights_NE = torch.zeros_like(y_NED[..., 0]).scatter(1, experts_NK, weights_NK)
        return (y_NED * weights_NE[..., None]).sum(1)


class SparseMLP(nn.Module):
    """Router and experts of one layer. form: how the experts run, one of EXPERT_FORMS.

    With moe_drop_tokens an expert takes ceil(moe_capacity_factor · N·K / E) rows of a call, N counting padding too: a
    static number. It keeps those of the heaviest weight. A dropped choice adds zero, and the token's other weights stay
    as they are, so they no longer sum to 1. On one device this saves no work: a dropped row still goes through its
    expert.
    """

    def __init__(self, cfg: ModelConfig, form: str) -> None:
        super().__init__()
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = Experts(cfg)
        self.form = form
        self.num_experts = cfg.num_experts
        self.top_k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob
        self.capacity_factor = cfg.moe_capacity_factor if cfg.moe_drop_tokens else None
        self.z_loss = cfg.router_z_loss_coef > 0

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """([B, T, D], the router's statistics). real_BT: bool, False for padding, which is not counted; None: all."""
        x_ND = x_BTD.flatten(0, -2)
        real_N = x_ND.new_ones(len(x_ND), dtype=torch.bool) if real_BT is None else real_BT.flatten()
        logits_NE = self.gate(x_ND)
        wide_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        probs_NE = wide_NE.softmax(-1)
        weights_NK, experts_NK = route(probs_NE, self.top_k, self.normalize, logits_NE.dtype)
        dropped = real_N.new_zeros((), dtype=torch.int64)
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * experts_NK.numel() / self.num_experts)
            kept_NK = within_capacity(weights_NK, experts_NK, real_N, self.num_experts, capacity)
            weights_NK = torch.where(kept_NK, weights_NK, 0.0)
            dropped = (~kept_NK & real_N[:, None]).sum()
        mix = self.experts if self.form == "grouped" else self.experts.reference
        y_BTD = mix(x_ND, weights_NK, experts_NK).view_as(x_BTD)

        log_z_N = (wide_NE if self.z_loss else wide_NE.detach()).logsumexp(-1)
        marks_R = real_N[:, None].expand_as(experts_NK).flatten().to(torch.int64)
        stats = RouterStats(
            counts=count(experts_NK.flatten(), marks_R, self.num_experts),
            probs=(probs_NE * real_N[:, None]).sum(0),
            tokens=real_N.sum(),
            log_z=(log_z_N.square() * real_N).sum(),
            dropped=dropped,
        )
        return y_BTD, stats


class _TakeRows(torch.autograd.Function):
    """x[index], where `back` says in which rows of the result each row of x lies: `fold` of them, one after another.

    Knowing that, the backward pass is a gather and a sum in a fixed order, instead of additions in any order.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_ND: Tensor, index_R: Tensor, back_R: Tensor, fold: int
    ) -> Tensor:
        ctx.save_for_backward(back_R)
        ctx.fold = fold
        return x_ND.index_select(0, index_R)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (back_R,) = ctx.saved_tensors
        grad = grad_RD.index_select(0, back_R)
        return grad if ctx.fold == 1 else grad.unflatten(0, (-1, ctx.fold)).sum(1), None, None, None
