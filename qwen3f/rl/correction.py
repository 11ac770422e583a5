"""Weights that multiply the advantages, token by token: corrections and filters without a gradient.

The cost of a policy loss is linear in the advantage as long as the advantage keeps its sign. So a weight ≥ 0 can be
multiplied into the advantage before the step, and the loss needs no change. (vespo is not linear and takes no weights.)

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
    """[B, T]: w = π_trainer / π_sampler of the sampled tokens, bounded; 1 where a token does not count.

    "token_truncate": min(w, high) (TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). "token_mask": w, and 0 outside low … high (IcePop, Ling team 2025). "sequence_…": with w the product
    over the document's tokens (MIS, Liu et al. 2025, "When speed kills stability").

    Args:
      log_ratio_BT: log π_trainer − log π_sampler.
      low: only used by the masks; as in TRL it may be 0.
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
    """Raises UserError for a mode that does not exist, or bounds that exclude the ratio 1."""
    if mode not in MODES:
        raise UserError(f"--config.rollout.correction={mode}: write one of {', '.join(MODES)}")
    if mode != "none" and not 0 <= low <= 1 <= high:
        raise UserError(
            f"--config.rollout.correction_low={low} must lie in 0..1, and --config.rollout.correction_high={high} be "
            "at least 1"
        )


def per_token(of_documents_BS: Tensor, segments_BT: Tensor) -> Tensor:
    """[B, T]: each token gets the value of its document in of_documents_BS; padding gets 0."""
    index = (segments_BT.to(torch.int64) - 1).clamp(min=0)
    return torch.where(segments_BT > 0, of_documents_BS.gather(1, index), 0.0)


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that `share` of the tokens reach or exceed (Wang et al. 2025, arXiv:2506.01939, use 0.2).

    entropies: of all tokens that count, of all ranks, in any order. −∞ if there are none.
    """
    if not entropies.numel():
        return -torch.inf
    ordered = entropies.double().flatten().sort().values  # torch.quantile takes 2**24 numbers at most
    place = (1 - share) * (ordered.numel() - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return torch.lerp(low, high, place - math.floor(place)).item()


def high_entropy(entropy_BT: Tensor, counts_BT: Tensor, threshold: float) -> Tensor:
    """[B, T]: 1 for tokens that count and reach the threshold, else 0."""
    return ((entropy_BT >= threshold) & counts_BT).to(entropy_BT.dtype)


def sampler_kl(log_ratio: Tensor) -> Tensor:
    """The k3 estimate of KL(sampler, trainer) for each sampled token: e^d − d − 1.

    log_ratio: d = log π_trainer − log π_sampler, of any shape.
    """
    return log_ratio.exp() - log_ratio - 1
