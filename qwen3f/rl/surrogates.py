"""Formulas of policy-gradient losses: a pure function for each formula, with its source.

lr = log π − log π_old and r = exp(lr) belong to a token, or to a sequence (`sequence_ratio`); A is its advantage.
Results are costs to minimise, with the shape of the arguments: [B, T] tokens or [B, S] documents.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The largest log-ratio that counts, as in verl. In float32 e^89 is infinite, and 0 · ∞ is NaN.
MOST_LOG = 20.0


class Clip(NamedTuple):
    """Bounds of r: 1 − low, 1 + high, and `dual` as an upper bound where A < 0 (0: no such bound)."""

    low: float
    high: float
    dual: float = 0.0


def ratio(log_ratio: Tensor) -> Tensor:
    """exp(lr), of at most MOST_LOG; beyond it without a gradient.

    An infinite ratio would make NaN of the gradient where a bound leaves it out, and of the cost where A is 0.
    """
    return log_ratio.clamp(max=MOST_LOG).exp()


def clipped(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """−min(r · A, clip(r, 1 − low, 1 + high) · A).

    PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7); the separate upper bound is from DAPO (Yu et al. 2025,
    arXiv:2503.14476, §3.1). With dual, the cost for A < 0 is at most −dual · A (Ye et al. 2020, arXiv:1912.09729,
    equation 5). Capping the first r at dual gives the same; TRL's delta does this.
    """
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantage
    if clip.dual:
        ratio = ratio.clamp(max=clip.dual)
    return -torch.minimum(ratio * advantage, bounded)


def clipped_low(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where the lower bound takes the gradient away, else 0."""
    return ((ratio < 1 - clip.low) & (advantage < 0)).to(ratio.dtype)


def clipped_high(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where an upper bound takes the gradient away, else 0: 1 + high where A > 0, dual where A < 0."""
    beyond = (ratio > 1 + clip.high) & (advantage > 0)
    if clip.dual:
        beyond = beyond | ((ratio > clip.dual) & (advantage < 0))
    return beyond.to(ratio.dtype)


def cispo(log_prob: Tensor, ratio: Tensor, advantage: Tensor, cap: float) -> Tensor:
    """−sg(min(r, cap)) · A · log π (MiniMax-M1, arXiv:2506.13585, equations 4 and 5, without a lower bound).

    cap bounds the weight itself, not its distance from 1 (ScaleRL, arXiv:2510.13786, uses 5). A cap below 1 would scale
    every gradient.
    """
    return -ratio.clamp(max=cap).detach() * advantage * log_prob


def sapo(ratio: Tensor, advantage: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """−(4/τ) · σ(τ(r − 1)) · A, with a τ for A > 0 and one for the rest (Gao et al. 2025, arXiv:2511.20347)."""
    tau = torch.full_like(ratio, temperature_neg).masked_fill(advantage > 0, temperature_pos)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage


def sequence_ratio(log_ratio_sum: Tensor, length: Tensor) -> Tensor:
    """A document's ratio: `ratio` of Σ lr / |y| (GSPO, Zheng et al. 2025, arXiv:2507.18071, equation 7).

    log_ratio_sum is the sum over the document's tokens that count, length is their number. Without the division a
    ratio grows with the length: 0.012 per token makes a factor of 3.3 after 100 tokens.
    """
    return ratio(log_ratio_sum / length.clamp(min=1))


def gamma_weight(log_ratio_sum: Tensor, advantage: Tensor) -> Tensor:
    """φ(w) = e^λ · w^k · e^(−λw), w = exp(Σ lr) of a sequence, without a gradient (VESPO, arXiv:2602.10693).

    (k, λ) = (2, 3) for A ≥ 0, else (3, 2), and log w within [log 1e-8, 20], as in TRL.
    """
    log_w = log_ratio_sum.detach().clamp(math.log(1e-8), 20.0)
    k, lam = (torch.full_like(log_w, b).masked_fill(advantage >= 0, a) for a, b in ((2.0, 3.0), (3.0, 2.0)))
    return (lam + k * log_w - lam * log_w.exp()).exp()


def kl_estimate(log_prob: Tensor, ref_log_prob: Tensor, kind: str) -> Tensor:
    """An estimate of KL(π, π_ref) from one token (Schulman 2020, "Approximating KL divergence"), Δ = log π − log π_ref.

    "k1": Δ. "k2": Δ²/2. "k3": e^(−Δ) + Δ − 1. As a loss each has a different expected gradient (Tang and Munos 2025,
    arXiv:2506.09477). On policy, k2 has that of the reverse KL. k1 has 0 and k3 that of the forward KL, unless they are
    multiplied by the ratio. In k3 a Δ below −MOST_LOG counts as −MOST_LOG, without a gradient.
    """
    delta = log_prob - ref_log_prob
    if kind == "k1":
        return delta
    if kind == "k2":
        return delta**2 / 2
    if kind == "k3":
        delta = delta.clamp(min=-MOST_LOG)
        return torch.exp(-delta) + delta - 1
    raise ValueError(f"kl={kind!r}: write k1, k2 or k3")
