"""Balancing the routers of a mixture of experts: the losses, and metrics of how evenly experts are used.

The loss of one layer is E·Σ f·P: f_e is how often a token chooses expert e (Σ f = k), P_e the mean of its softmax
probability. Only P has a gradient. With perfect balance the loss is k, the number of experts per token, not 1. The
modes of `router_balance` differ in the tokens that f counts:

  micro: this micro-batch, layer by layer (Switch Transformer, arXiv:2101.03961).
  hf: this micro-batch, with f and P averaged over layers before the product, as in transformers. Imbalances of
    different layers can cancel out, so this loss detects fewer of them.
  global: all micro-batches of the step so far, layer by layer: Qwen3's (arXiv:2501.11873). Specialised micro-batches
    are not punished if the whole batch is even. The first micro-batch of a step has only its own counts.
  global_exact: all micro-batches of the step, counted by an extra forward pass before the first gradient.

A step's loss is the sum over micro-batches, weighted by their share of the step's real tokens (padding never counts),
averaged over sparse layers. With `global_exact` it does not depend on the number of micro-batches.

S sparse layers · E experts
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.model import RouterStats


class Load(NamedTuple):
    """Sums over the micro-batches of a step, without gradients; all int64.

    counts: [S, E], how often each expert was chosen. tokens: [S], real tokens. dropped: [S], choices that were dropped.
    """

    counts: Tensor
    tokens: Tensor
    dropped: Tensor


def load_of(stats: RouterStats) -> Load:
    return Load(stats.counts, stats.tokens, stats.dropped)


def add(a: Load | None, b: Load) -> Load:
    return b if a is None else Load(*(x + y for x, y in zip(a, b)))


def balance_loss(mode: str, stats: RouterStats, load: Load, others: Load | None, total_tokens: Tensor) -> Tensor:
    """One micro-batch's part of the step's balancing loss, a scalar in the dtype of the statistics.

    Args:
      mode: router_balance.
      stats: this rank's; the result is this rank's part too.
      load: the micro-batch's counts, on a mesh summed over all ranks.
      others: for "global" the sum of the loads before this micro-batch (None: there are none); for "global_exact" the
        load of the whole step, this micro-batch included (None: there is no other micro-batch). Else unused.
      total_tokens: real tokens of the whole step.
    """
    known = load
    if mode == "global":
        known = add(others, known)
    elif mode == "global_exact" and others is not None:
        known = others
    f_SE = known.counts.to(stats.probs.dtype) / known.tokens.clamp(min=1)[:, None]
    p_SE = stats.probs / total_tokens.clamp(min=1)
    if mode == "hf":
        f_SE, p_SE = f_SE.mean(0, keepdim=True), p_SE.mean(0, keepdim=True)
    return f_SE.shape[1] * (f_SE * p_SE).sum(1).mean()


def z_loss(stats: RouterStats, total_tokens: Tensor) -> Tensor:
    """One micro-batch's part of the mean over tokens and layers of logsumexp(router logits)² (arXiv:2202.08906)."""
    return stats.log_z.mean() / total_tokens.clamp(min=1)


def load_metrics(load: Load) -> dict[str, Tensor]:
    """How evenly the experts are used, from a step's counts.

    expert_load: float32 [S, E], each expert's share of its layer's choices. Scalars: load_entropy, −Σ share·ln share,
    averaged over layers (ln E if even); load_max_violation, the largest load / mean load of any layer, minus 1;
    load_mean_violation, the mean of |load / mean load − 1|; dropped_share, the share of choices that were dropped.
    Without real tokens all shares are 0.
    """
    choices_S1 = load.counts.sum(1, keepdim=True)
    share_SE = load.counts.to(torch.float32) / choices_S1.clamp(min=1)
    violation_SE = share_SE * share_SE.shape[1] - 1
    return {
        "expert_load": share_SE,
        "load_entropy": -torch.special.xlogy(share_SE, share_SE).sum(1).mean(),
        "load_max_violation": violation_SE.max(),
        "load_mean_violation": violation_SE.abs().mean(),
        "dropped_share": load.dropped.sum() / choices_S1.sum().clamp(min=1),
    }


def heat_map(share_SE: Tensor, cell: int = 8) -> Tensor:
    """A picture, uint8 RGB [S·cell, E·cell, 3]: white is the even share, blue is less (deepest: 0), red is more
    (deepest: twice the even share or above)."""
    excess_SE = (share_SE.cpu() * share_SE.shape[1] - 1).clamp(-1, 1)
    red, blue = 1 - (-excess_SE).clamp(min=0), 1 - excess_SE.clamp(min=0)
    picture = torch.stack((red, torch.minimum(red, blue), blue), -1).mul(255).round().to(torch.uint8)
    return picture.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
