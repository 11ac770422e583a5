"""What multiplies an advantage, token by token: corrections and filters that no gradient passes through.

A policy's cost is linear in its advantage as long as that keeps its sign, so a factor of at least 0 may be put into the
advantage before the step, which then needs to know nothing of it. (vespo's is not: it takes none.)

[B, T] tokens
"""

import math

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.train.objective import document_sums

MODES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_weights(
    log_ratio_BT: Tensor, counts_BT: Tensor, segments_BT: Tensor, mode: str, low: float, high: float
) -> Tensor:
    """w = π_trainer / π_sampler of what was sampled, bounded; [B, T], 1 where a token does not count.

    "token_truncate": min(w, high) (TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). "token_mask": w, and 0 outside low … high (IcePop, Ling team 2025). "sequence_…": with w the product
    over the document's tokens (MIS, Liu et al. 2025, "When speed kills stability").

    Args:
      log_ratio_BT: log π_trainer − log π_sampler.
      low: masks alone have one; as in TRL it may be 0.
    """
    check_mode(mode, low, high)
    if mode == "none":
        return torch.ones_like(log_ratio_BT)
    log_ratio = torch.where(counts_BT, log_ratio_BT, 0.0)
    if mode.startswith("sequence"):
        log_ratio = per_token(document_sums(log_ratio, segments_BT, segments_BT.shape[1]), segments_BT)
    weight = log_ratio.exp()
    if mode.endswith("truncate"):
        weight = weight.clamp(max=high)
    else:
        weight = torch.where((weight < low) | (weight > high), 0.0, weight)
    return torch.where(counts_BT, weight, 1.0)


def check_mode(mode: str, low: float, high: float) -> None:
    """Raises UserError for a mode that does not exist or bounds that leave nothing."""
    if mode not in MODES:
        raise UserError(f"--config.rollout.correction={mode}: write one of {', '.join(MODES)}")
    if mode != "none" and not 0 <= low <= 1 <= high:
        raise UserError(
            f"--config.rollout.correction_low={low} and correction_high={high} must lie on both sides of 1, from 0 on"
        )


def per_token(of_documents_BS: Tensor, segments_BT: Tensor) -> Tensor:
    """[B, T]: at each token the number of its document; 0 at padding."""
    index = (segments_BT.to(torch.int64) - 1).clamp(min=0)
    return torch.where(segments_BT > 0, of_documents_BS.gather(1, index), 0.0)


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that `share` of the tokens reach (Wang et al. 2025, arXiv:2506.01939: 0.2); entropies: of all tokens
    that count, of all ranks, in any order. −∞ for none."""
    if not entropies.numel():
        return -torch.inf
    ordered = entropies.double().flatten().sort().values  # torch.quantile takes 2**24 numbers at most
    place = (1 - share) * (ordered.numel() - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return torch.lerp(low, high, place - math.floor(place)).item()


def high_entropy(entropy_BT: Tensor, counts_BT: Tensor, threshold: float) -> Tensor:
    """1 for tokens that count and reach the threshold, else 0; [B, T]."""
    return ((entropy_BT >= threshold) & counts_BT).to(entropy_BT.dtype)


def sampler_kl(log_ratio: Tensor) -> Tensor:
    """KL(sampler, trainer) of sampled tokens, by k3: e^d − d − 1 of d = log π_trainer − log π_sampler."""
    return log_ratio.exp() - log_ratio - 1
