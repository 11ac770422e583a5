"""Mixture of experts as in Qwen3-MoE: a softmax router, the top-k experts of each token, by default no token dropped.

kernels/moe_dispatch.py sorts the rows of all tokens by expert; kernels/fused_experts.py runs the experts on them. Only
the top-k experts of each token are computed, and the host never waits for the device.

The router's statistics are an output of the layer, so that a recomputed layer is not counted twice. The losses that use
them are in qwen3f/train/balance.py.

N tokens · K experts per token · R = N·K rows · E experts · D hidden · F expert width
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import fused_experts, moe_dispatch
from kernels.grouped_gemm import grouped_linear
from qwen3f.config import ModelConfig
from qwen3f.model.mlp import ACTIVATIONS
from sharding.axes import ONE, Axes
from sharding.expert import mix_of_ranks
from sharding.tensor import all_tokens, own_tokens

EXPERT_FORMS = ("grouped", "reference")


class RouterStats(NamedTuple):
    """Statistics of a router over the real tokens of one call. All are sums, so they can be added over calls and ranks.

    counts: int64 [E], how often each expert was among a token's top k, dropped or not. probs: [E], Σ over tokens of the
    softmax, with its gradient. tokens: int64 scalar, number of real tokens. log_z: scalar, Σ over tokens of
    logsumexp(logits)²; it has a gradient if the config's router_z_loss_coef is above 0. dropped: int64 scalar, number
    of choices that were dropped because their expert was full. Floats are float32 (float64 for float64). For a whole
    model every field has a leading axis of sparse layers.
    """

    counts: Tensor
    probs: Tensor
    tokens: Tensor
    log_z: Tensor
    dropped: Tensor


def route(probs_NE: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights [N, K] in `dtype`, experts [N, K] int64), the most probable expert first.

    probs_NE: softmax over all experts in float32 (float64 for float64). `normalize` makes the top k sum to 1.
    """
    weights, experts = probs_NE.topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), experts


class ExpertLinear(nn.Module):
    """The weight [E, out, in] of one linear layer for all experts. It only gives the weight its name."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class Experts(nn.Module):
    """Σ over a token's experts of weight · down(act(gate(x)) · up(x)); the weight is applied after down."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        sizes = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_proj = ExpertLinear(*sizes)
        self.up_proj = ExpertLinear(*sizes)
        self.down_proj = ExpertLinear(sizes[0], sizes[2], sizes[1])
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fused = cfg.hidden_act == "silu"

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = self._weights()
        where = moe_dispatch.plan(experts_NK, len(gate_EFD))
        if self.fused:
            return fused_experts.experts_mlp(x_ND, weights_NK, where, gate_EFD, up_EFD, down_EDF)
        x_RD = moe_dispatch.take(x_ND, where)
        gate_RF, up_RF = (grouped_linear(x_RD, w, where.counts) for w in (gate_EFD, up_EFD))
        y_RD = grouped_linear(self.act(gate_RF) * up_RF, down_EDF, where.counts)
        return moe_dispatch.combine(y_RD, weights_NK, where)

    def reference(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """The formula: every token goes through every expert. Works with torch.func."""
        return fused_experts.reference(x_ND, weights_NK, experts_NK, *self._weights(), self.act)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class SparseMLP(nn.Module):
    """Router and experts of one layer. form: how the experts run, one of EXPERT_FORMS.

    With moe_drop_tokens an expert takes at most ceil(moe_capacity_factor · N·K / E) rows of a call, those with the
    largest weights. N includes padding, so the capacity is a static number. A dropped choice adds zero, and the token's
    other weights do not change, so they no longer sum to 1. On one device this saves no work: a dropped row still goes
    through its expert.

    On a mesh every rank of tp routes all tokens and has a slice of each expert; ranks of ep have different experts. x
    and the result have this rank's part of the tokens (sharding.tensor). Statistics and capacity cover the tokens that
    the rank routes.
    """

    def __init__(self, cfg: ModelConfig, form: str, axes: Axes = ONE) -> None:
        super().__init__()
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = Experts(cfg)
        self.form = form
        self.num_experts = cfg.num_experts
        self.top_k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob
        self.capacity_factor = min(cfg.moe_capacity_factor, cfg.num_experts) if cfg.moe_drop_tokens else None
        self.z_loss = cfg.router_z_loss_coef > 0
        self.axes = axes

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """([B, T, D], the router's statistics). real_BT: bool, False for padding, which is not counted; None: all."""
        x_BTD = all_tokens(x_BTD, self.axes.tp)
        x_ND = x_BTD.flatten(0, -2)
        real_N = x_ND.new_ones(len(x_ND), dtype=torch.bool) if real_BT is None else real_BT.flatten()
        logits_NE = self.gate(x_ND)
        wide_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        probs_NE = wide_NE.softmax(-1)
        weights_NK, experts_NK = route(probs_NE, self.top_k, self.normalize, logits_NE.dtype)
        dropped = real_N.new_zeros((), dtype=torch.int64)
        if self.capacity_factor is not None:
            fair = self.capacity_factor * experts_NK.numel() / self.num_experts
            capacity = math.ceil(fair * (1 - 1e-12))  # in floats 1.1 · 100 / 10 is a little more than 11
            kept_NK = moe_dispatch.within_capacity(weights_NK, experts_NK, real_N, self.num_experts, capacity)
            weights_NK = torch.where(kept_NK, weights_NK, 0.0)
            dropped = (~kept_NK & real_N[:, None]).sum()
        mix = self.experts if self.form == "grouped" else self.experts.reference
        y_ND = mix_of_ranks(mix, x_ND, weights_NK, experts_NK, self.num_experts, self.axes.ep)
        y_BTD = own_tokens(y_ND.view_as(x_BTD), self.axes.tp)

        log_z_N = (wide_NE if self.z_loss else wide_NE.detach()).logsumexp(-1)
        stats = RouterStats(
            counts=moe_dispatch.count(experts_NK, real_N, self.num_experts),
            probs=(probs_NE * real_N[:, None]).sum(0),
            tokens=real_N.sum(),
            log_z=(log_z_N.square() * real_N).sum(),
            dropped=dropped,
        )
        return y_BTD, stats
