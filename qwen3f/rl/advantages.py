"""Advantages: how much better a completion is than the other completions of its prompt. Pure functions, float64.

N prompts · G completions of each · R rewards
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qwen3f.errors import UserError

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]
BASELINES: tuple[Baseline, ...] = ("mean", "leave_one_out")
SCALES: tuple[Scale, ...] = ("group", "batch", "none")
COMBINE = ("sum_then_normalize", "normalize_then_sum")
EPSILON = 1e-4  # added to the standard deviation, as in TRL; added to the variance it would change small deviations


def group_advantages(
    rewards_NG: Tensor, baseline: Baseline = "mean", scale: Scale = "group", epsilon: float = EPSILON
) -> Tensor:
    """(R − baseline) / (std + epsilon), float64 [N, G] (Shao et al. 2024, arXiv:2402.03300, equation 3).

    Args:
      rewards_NG: NaN marks a completion that could not be judged. It counts in no mean and no deviation, and gets 0.
      baseline: "mean": the mean of the group. "leave_one_out": the mean of the other completions of the group (Ahmadian
        et al. 2024, arXiv:2402.14740).
      scale: what to divide by. "group": the group's standard deviation, with n − 1. "batch": that of all rewards, with
        n − 1. "none": 1 (Liu et al. 2025, arXiv:2503.20783, Dr. GRPO).
    A group with one judged completion gets exactly 0, and so does a group whose rewards are all equal, without rounding
    errors. Raises UserError for infinite rewards, another shape, or an unknown name.
    """
    check_names(baseline, scale)
    rewards = torch.as_tensor(rewards_NG).to(torch.float64)
    if rewards.dim() != 2:
        raise UserError(f"rewards have the shape {tuple(rewards.shape)}; give [prompts, completions of each]")
    if rewards.isinf().any():
        raise UserError("a reward is infinite; give a finite number, or NaN for what cannot be judged")
    judged = ~rewards.isnan()
    count = judged.sum(1, keepdim=True)
    centred = torch.where(judged, rewards - _mean(rewards, judged, 1), 0.0)
    out = centred
    if baseline == "leave_one_out":  # R − (S − R)/(n − 1) = (R − S/n) · n/(n − 1)
        out = centred * count / (count - 1).clamp(min=1)
    if scale == "group":
        out = out / (_deviation(rewards, judged, 1) + epsilon)
    elif scale == "batch":
        flat = _deviation(rewards.flatten()[None], judged.flatten()[None], 1)
        out = out / (flat + epsilon)
    return torch.where(judged & ~_all_equal(rewards, judged), out, 0.0)


def combine_rewards(
    rewards_RNG: Tensor,
    weights: Sequence[float],
    how: str = "sum_then_normalize",
    baseline: Baseline = "mean",
    scale: Scale = "group",
) -> tuple[Tensor, Tensor]:
    """(rewards [N, G], advantages [N, G]) of several rewards with weights.

    A completion counts as not judged if one of its rewards is NaN. "sum_then_normalize": the advantages of the weighted
    sum. "normalize_then_sum": advantages of each reward, their weighted sum, then normalised by mean and standard
    deviation over the batch (GDPO, Liu et al. 2026, arXiv:2601.05242), so that a reward with a small spread counts too.
    """
    if how not in COMBINE:
        raise UserError(f"combining rewards by {how!r}: write one of {', '.join(COMBINE)}")
    rewards = torch.as_tensor(rewards_RNG).to(torch.float64)
    weight_R11 = torch.tensor(list(weights), dtype=torch.float64)[:, None, None]
    total = (weight_R11 * rewards).sum(0)  # NaN where one of the rewards is NaN
    if how == "sum_then_normalize":
        return total, group_advantages(total, baseline, scale)
    unjudged = total.isnan()
    each = [group_advantages(one.masked_fill(unjudged, torch.nan), baseline, scale) for one in rewards]
    summed = (weight_R11 * torch.stack(each)).sum(0).masked_fill(unjudged, torch.nan)
    judged = ~unjudged
    flat, flat_judged = summed.flatten()[None], judged.flatten()[None]
    centred = (summed - _mean(flat, flat_judged, 1)) / (_deviation(flat, flat_judged, 1) + EPSILON)
    equal = _all_equal(flat, flat_judged)
    return total, torch.where(judged & ~equal, centred, 0.0)


def tells_nothing(rewards_NG: Tensor) -> Tensor:
    """bool [N]: whether all judged completions of a group have the same reward; its advantages are then all 0."""
    rewards = torch.as_tensor(rewards_NG).to(torch.float64)
    return _all_equal(rewards, ~rewards.isnan())[:, 0]


def check_names(baseline: str, scale: str) -> None:
    """Raises UserError for a baseline or scale that does not exist."""
    for what, name, known in (("baseline", baseline, BASELINES), ("scale", scale, SCALES)):
        if name not in known:
            raise UserError(f"advantages with {what}={name!r}: write one of {', '.join(known)}")


def _mean(x: Tensor, counts: Tensor, dim: int) -> Tensor:
    return torch.where(counts, x, 0.0).sum(dim, keepdim=True) / counts.sum(dim, keepdim=True).clamp(min=1)


def _deviation(x: Tensor, counts: Tensor, dim: int) -> Tensor:
    """Standard deviation with n − 1 of the numbers that count, from centred values; 0 for one number or none."""
    centred = torch.where(counts, x - _mean(x, counts, dim), 0.0)
    return ((centred**2).sum(dim, keepdim=True) / (counts.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()


def _all_equal(x: Tensor, counts: Tensor) -> Tensor:
    """bool [N, 1]: whether all numbers of a row that count are equal; True for one number or none."""
    high = torch.where(counts, x, -torch.inf).amax(1, keepdim=True)
    low = torch.where(counts, x, torch.inf).amin(1, keepdim=True)
    return high <= low
