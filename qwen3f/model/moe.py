"""Mixture of experts as in Qwen3-MoE: a softmax router, the top-k experts of each token, no token dropped.

Rows are sorted by expert, go through the grouped products of kernels/grouped_gemm.py and come back in their places. The
work is that of the top-k experts of each token, however many there are. The one thing that the host waits for is the
number of rows of each expert, once a layer.

Not there yet: the load-balancing loss and the router's statistics; capacity limits (moe_drop_tokens).

N tokens · K experts a token · R = N·K rows · E experts · D hidden · F expert width
"""

import torch
from torch import Tensor, nn

from kernels.grouped_gemm import grouped_linear
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.mlp import ACTIVATIONS

EXPERT_FORMS = ("grouped", "reference")


def route(logits_NE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """(weights [N, K] in the logits' dtype, experts [N, K] int64), the likeliest expert first.

    Softmax over all experts in float32 (float64 for float64), then the top k; `normalize` makes their weights sum to 1.
    """
    probs = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)).softmax(-1)
    weights, experts = probs.topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits_NE.dtype), experts


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
        # not bincount: its output has no static size, which would cut the compiled graph
        counts_E = expert_R.new_zeros(num_experts).scatter_add(0, expert_R, torch.ones_like(expert_R)).cpu()
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
    """Router and experts of one layer; x_BTD -> [B, T, D]. form: how the experts run, one of EXPERT_FORMS."""

    def __init__(self, cfg: ModelConfig, form: str) -> None:
        super().__init__()
        if cfg.moe_drop_tokens:
            raise UserError("model.moe_drop_tokens=True: this version drops no tokens; set it to False")
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = Experts(cfg)
        self.form = form
        self.top_k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        weights_NK, experts_NK = route(self.gate(x_ND), self.top_k, self.normalize)
        mix = self.experts if self.form == "grouped" else self.experts.reference
        return mix(x_ND, weights_NK, experts_NK).view_as(x_BTD)


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
