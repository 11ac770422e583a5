"""The policy's loss as an objective: a surrogate, sums, and one divisor for the whole update.

| loss    | cost of a token or document        | loss of the update         | source                                  |
|---------|------------------------------------|----------------------------|-----------------------------------------|
| grpo    | clipped, a token's ratio           | mean of documents' means   | arXiv:2402.03300                        |
| dr_grpo | the same                           | Σ / (documents · longest)  | arXiv:2503.20783                        |
| dapo    | the same                           | mean of tokens             | arXiv:2503.14476                        |
| bnpo    | the same                           | as dapo                    | TRL: there a micro-batch's mean         |
| cispo   | capped weight · log π              | mean of tokens             | arXiv:2506.13585                        |
| sapo    | soft gate                          | mean of documents' means   | arXiv:2511.20347                        |
| gspo    | clipped, a document's ratio        | mean of documents          | arXiv:2507.18071                        |
| luspo   | the same                           | mean of cost · length      | arXiv:2602.05261                        |
| vespo   | gamma weight of a document · log π | mean of tokens             | arXiv:2602.10693                        |

Tokens are those with a loss weight. Documents are all documents, also those without such a token. Both are counted over
the whole update, all micro-batches and ranks, so the gradient does not depend on how the update is split. (Deviation:
TRL's bnpo divides by the number of tokens in a micro-batch; here it equals dapo.)

[B, T] tokens · [B, S] documents of a row · [C, B, T] several numbers a token
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.limits import COLDEST, HOTTEST
from qwen3f.rl import surrogates
from qwen3f.train.objective import (
    Batch,
    Figures,
    MicroBatch,
    Objective,
    cost_shares,
    divisor,
    document_sums,
    has_document,
    predicted,
    segments_of,
)

TOKEN_MEAN, DOCUMENT_MEAN, DOCUMENT_SUM, CONSTANT = "token_mean", "document_mean", "document_sum", "constant"
AGGREGATION = {
    "grpo": DOCUMENT_MEAN,
    "dr_grpo": CONSTANT,
    "dapo": TOKEN_MEAN,
    "bnpo": TOKEN_MEAN,
    "cispo": TOKEN_MEAN,
    "sapo": DOCUMENT_MEAN,
    "gspo": DOCUMENT_MEAN,
    "luspo": DOCUMENT_SUM,
    "vespo": TOKEN_MEAN,
}
LOSSES = tuple(AGGREGATION)
OF_DOCUMENTS = ("gspo", "luspo", "vespo")  # losses that take the ratio of a document, not of a token
KINDS_OF_KL = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class GRPO:
    """The loss of a policy.

    Attributes:
      loss: one of LOSSES.
      clip_low, clip_high: the ratio of new to old policy is clipped to 1 − clip_low … 1 + clip_high (gspo's paper uses
        3e-4 and 4e-4).
      dual_clip: where the advantage is negative, the ratio is capped at this; more than 1 + clip_high; 0: no cap.
      cispo_cap: cispo's largest weight; see surrogates.cispo.
      sapo_temperatures: sapo's τ for positive advantages, and for others.
      kl_coef: weight of the KL to a frozen reference; 0: no KL, and no reference.
      kl: estimator of the KL, one of KINDS_OF_KL.
      kl_ratio: multiply the estimate by the ratio, so that off policy too its gradient is that of the reverse KL; see
        surrogates.kl_estimate.
      router_losses: add the router losses of a mixture of experts. Off by default: the prompts of one task use few
        experts, and balancing them changes the model's answers. (verl on Megatron has them off, too.)
      longest: tokens of a completion, at most; dr_grpo's constant. 0: the number of columns of the batch, for rows that
        hold one completion each.
    Raises UserError for values that do not go together.
    """

    loss: str = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    cispo_cap: float = 5.0
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    kl_coef: float = 0.0
    kl: str = "k3"
    kl_ratio: bool = True
    router_losses: bool = False
    longest: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"--config.grpo.loss={self.loss}: write one of {', '.join(LOSSES)}")
        if self.kl not in KINDS_OF_KL:
            raise UserError(f"--config.grpo.kl={self.kl}: write one of {', '.join(KINDS_OF_KL)}")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise UserError(
                f"--config.grpo.clip_low={self.clip_low} must lie in 0..1, and --config.grpo.clip_high="
                f"{self.clip_high} be at least 0"
            )
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise UserError(
                f"--config.grpo.dual_clip={self.dual_clip} must be 0 or more than 1 + clip_high={1 + self.clip_high}"
            )
        if self.cispo_cap < 1:
            raise UserError(
                f"--config.grpo.cispo_cap={self.cispo_cap} bounds the ratio itself, and below 1 scales every gradient; "
                "write 1 or more, such as 5"
            )
        if not self.kl_coef >= 0:
            raise UserError(f"--config.grpo.kl_coef={self.kl_coef} must be at least 0")
        if self.longest < 0:
            raise UserError(f"longest={self.longest} must be at least 0")
        numbers = [t for t in self.sapo_temperatures if isinstance(t, int | float) and COLDEST <= t <= HOTTEST]
        if len(numbers) != 2 or len(self.sapo_temperatures) != 2:
            raise UserError(
                f"--config.grpo.sapo_temperatures={self.sapo_temperatures}: write two numbers from {COLDEST:g} "
                f"to {HOTTEST:g}, such as (1.0,1.05)"
            )

    @property
    def clip(self) -> surrogates.Clip:
        return surrogates.Clip(self.clip_low, self.clip_high, self.dual_clip)


def policy_loss(log_probs_BT: Tensor, batch: Batch, hyper: GRPO) -> tuple[Tensor, Figures]:
    """(the loss, a scalar with a gradient for log_probs_BT; metrics) of the batch of a whole update.

    batch: advantages and loss_weights; old_logprobs (default: log_probs_BT, detached); ref_logprobs if kl_coef > 0;
    entropy, to report it; all [B, T]. segments (default: a row is one document). Advantages may differ from token to
    token, as after a correction (qwen3f.rl.correction).
    """
    blank = torch.zeros_like(log_probs_BT, dtype=torch.int64)
    rows = {"tokens": blank, "targets": blank, **batch}
    objective = make_objective(hyper, "entropy" in batch)
    return cost_shares(objective, log_probs_BT, MicroBatch(rows, rows), divisor(objective, rows))


def make_objective(hyper: GRPO, entropy: bool = True, num_ids: int = 0) -> Objective:
    """The objective that a step minimises. entropy: report the mean entropy. num_ids: the sampler's, see Objective.

    Metrics are averaged as the loss: over tokens, or over the means of documents. ratio_gap: |r − 1|, exactly 0 if all
    ratios are exactly 1. clip_low, clip_high: share that a bound takes the gradient from. moved: KL(π_old, π), by k3.
    kl: to the reference. entropy: of tokens.
    """
    reports = ("ratio_gap", "clip_low", "clip_high", "moved", *(("kl",) if hyper.kl_coef else ()))
    reports += ("entropy",) if entropy else ()
    make = _by_documents if hyper.loss in OF_DOCUMENTS else _by_tokens
    parts = (*make(hyper, reports), _make_count(hyper))
    return Objective("log_probs", *parts, reports, entropy, num_ids, hyper.router_losses)


def _make_count(hyper: GRPO) -> Callable[[Batch], Tensor] | None:
    how = AGGREGATION[hyper.loss]
    if how == TOKEN_MEAN:
        return None

    def count(rows: Batch) -> Tensor:
        documents = has_document(rows).sum()
        return documents * _longest(hyper, rows) if how == CONSTANT else documents

    return count


def _longest(hyper: GRPO, rows: Batch) -> int:
    return hyper.longest or rows["tokens"].shape[1]


def _log_ratio(log_prob: Tensor, batch: Batch) -> Tensor:
    """log π − log π_old. Without old_logprobs π is the old policy too: the value is 0, with the gradient of log π."""
    old = batch["old_logprobs"].to(log_prob.dtype) if "old_logprobs" in batch else log_prob.detach()
    return log_prob - old


def _others(hyper: GRPO, log_prob: Tensor, log_ratio: Tensor, batch: Batch, reports: tuple[str, ...]) -> Figures:
    """Metrics of a token that do not depend on the loss; "kl" has its gradient."""
    ratio = surrogates.ratio(log_ratio)
    out = {"ratio_gap": (ratio - 1).abs(), "moved": ratio - log_ratio - 1}
    if hyper.kl_coef:
        out["kl"] = surrogates.kl_estimate(log_prob, batch["ref_logprobs"].to(log_prob.dtype), hyper.kl)
    if "entropy" in reports:
        out["entropy"] = batch["entropy"].to(log_prob.dtype)
    return out


def _by_tokens(hyper: GRPO, reports: tuple[str, ...]) -> tuple[Callable, Callable | None]:
    """The token and document functions of the losses that take the ratio of a token."""

    def of_token(log_prob: Tensor, batch: Batch) -> tuple[Tensor, Figures]:
        log_ratio = _log_ratio(log_prob, batch)
        ratio, advantage = surrogates.ratio(log_ratio), batch["advantages"].to(log_prob.dtype)
        clip = hyper.clip
        if hyper.loss == "cispo":
            cost = surrogates.cispo(log_prob, ratio, advantage, hyper.cispo_cap)
            clip = surrogates.Clip(1.0, hyper.cispo_cap - 1)
        elif hyper.loss == "sapo":
            cost = surrogates.sapo(ratio, advantage, *hyper.sapo_temperatures)
        else:
            cost = surrogates.clipped(ratio, advantage, clip)
        figures = _others(hyper, log_prob, log_ratio, batch, reports)
        figures["clip_low"] = surrogates.clipped_low(ratio, advantage, clip)
        figures["clip_high"] = surrogates.clipped_high(ratio, advantage, clip)
        if hyper.kl_coef:
            cost = cost + hyper.kl_coef * (figures["kl"] * ratio if hyper.kl_ratio else figures["kl"])
        return cost, figures

    if AGGREGATION[hyper.loss] == TOKEN_MEAN:
        return of_token, None

    def token(log_prob: Tensor, batch: Batch) -> tuple[Tensor, Figures]:
        cost, figures = of_token(log_prob, batch)
        return torch.stack([cost, *(figures[name].detach() for name in reports)]), {}

    def document(sums: Tensor, rows: Batch) -> tuple[Tensor, Figures]:
        cost, *figures = sums.unbind()
        length = _lengths(rows, cost.dtype)
        mean = cost / length.clamp(min=1)
        return mean if AGGREGATION[hyper.loss] == DOCUMENT_MEAN else cost, _means(hyper, rows, reports, figures)

    return token, document


def _by_documents(hyper: GRPO, reports: tuple[str, ...]) -> tuple[Callable, Callable]:
    """The token and document functions of the losses that take the ratio of a document."""
    whole = ("clip_low", "clip_high")  # metrics of a document, not of a token
    of_tokens = tuple(name for name in reports if name not in whole)

    def token(log_prob: Tensor, batch: Batch) -> tuple[Tensor, Figures]:
        log_ratio, advantage = _log_ratio(log_prob, batch), batch["advantages"].to(log_prob.dtype)
        others = _others(hyper, log_prob, log_ratio, batch, reports)
        kl = others.get("kl", torch.zeros_like(log_prob))
        if hyper.loss == "vespo":  # the ratio is only a weight there; without bounds its exp could overflow
            log_ratio = log_ratio.clamp(-20.0, 20.0)
        figures = [others[name].detach() for name in of_tokens]
        return torch.stack([log_ratio, advantage, advantage * log_prob, kl, *figures]), {}

    def document(sums: Tensor, rows: Batch) -> tuple[Tensor, Figures]:
        log_ratio, advantage, weighted, kl, *figures = sums.unbind()
        length = _lengths(rows, log_ratio.dtype)
        ratio, mean = surrogates.sequence_ratio(log_ratio, length), advantage / length.clamp(min=1)
        if hyper.loss == "vespo":
            cost = -surrogates.gamma_weight(log_ratio, mean) * weighted
        else:
            cost = surrogates.clipped(ratio, mean, hyper.clip) * length
        cost = cost + hyper.kl_coef * (kl * ratio if hyper.kl_ratio else kl)
        if AGGREGATION[hyper.loss] == DOCUMENT_MEAN:
            cost = cost / length.clamp(min=1)
        there = (length > 0).to(cost.dtype) * length
        bounds = [there * f(ratio, mean, hyper.clip) for f in (surrogates.clipped_low, surrogates.clipped_high)]
        found = dict(zip((*of_tokens, *whole), (*figures, *bounds)))
        return cost, _means(hyper, rows, reports, [found[name].detach() for name in reports])

    return token, document


def _means(hyper: GRPO, rows: Batch, reports: tuple[str, ...], sums: list[Tensor]) -> Figures:
    """Metrics of a document from its sums, scaled so that the divisor of the loss makes them means."""
    how = AGGREGATION[hyper.loss]
    if how == TOKEN_MEAN:
        return dict(zip(reports, sums))
    length = _lengths(rows, sums[0].dtype).clamp(min=1)
    unit = _longest(hyper, rows) if how == CONSTANT else 1
    return {name: unit * x / length for name, x in zip(reports, sums)}


def _lengths(rows: Batch, dtype: torch.dtype) -> Tensor:
    """[B, S]: the number of tokens of each document that count (the sum of their loss weights)."""
    weights = torch.where(predicted(rows), rows["loss_weights"], 0).to(dtype)
    return document_sums(weights, segments_of(rows), rows["tokens"].shape[1])
