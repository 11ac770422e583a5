"""Balancing the routers of a mixture of experts: the losses that push them, and the figures that show how they stand.

The loss of one layer is E·Σ f·P: f_e is how often a token chooses expert e (Σ f = k), P_e the mean of its softmax.
Only P has a gradient. Balanced, the loss is k, the number of experts a token takes, not 1. The modes of
`router_balance` differ in what f counts:

  micro: this micro-batch, layer by layer (Switch Transformer, arXiv:2101.03961).
  hf: this micro-batch, f and P averaged over layers before they are multiplied, as transformers does. Layers can make
    up for each other, so it sees less.
  global: all micro-batches of the step so far, layer by layer: Qwen3's (arXiv:2501.11873). Specialised micro-batches
    are not punished if the whole batch is even. The first micro-batch of a step knows only itself.
  global_exact: all micro-batches of the step, known from a forward pass before the first gradient.

A step's loss sums its micro-batches, each by its share of the step's real tokens (padding is never counted), and
averages over sparse layers. With `global_exact` it is the same however the batch is cut.

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
    """One micro-batch's part of the step's balancing loss, a scalar in the statistics' floating dtype.

    Args:
      load: what the micro-batch counts, on a mesh that of all ranks; stats are the rank's, and so is the part.
      others: for "global" what the step has counted before this micro-batch (None: nothing); for "global_exact" what
        the whole step counts, this micro-batch included (None: there is no other micro-batch). Else unused.
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
    the mean over layers, ln E if even; load_max_violation, the fullest expert of any layer over the mean one, minus 1;
    load_mean_violation, the mean of |load / mean load − 1|; dropped_share, of all choices. Without a real token all
    shares are 0.
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
    """uint8 [S·cell, E·cell, 3], RGB: white is the even share, blue less (full: none), red more (full: twice that)."""
    excess_SE = (share_SE.cpu() * share_SE.shape[1] - 1).clamp(-1, 1)
    red, blue = 1 - (-excess_SE).clamp(min=0), 1 - excess_SE.clamp(min=0)
    picture = torch.stack((red, torch.minimum(red, blue), blue), -1).mul(255).round().to(torch.uint8)
    return picture.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
