"""What a stage minimises, as a value: what the model says about each token, and what that costs.

B rows · T places of this rank's part of the sequence · L places of the whole row · S = L documents a row at most ·
N = B·T · D hidden
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels import cross_entropy
from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model import invariant
from sharding import tensor
from sharding.collectives import all_reduce
from sharding.layout import ONE_DEVICE, Layout

Batch = Mapping[str, Tensor]
Figures = dict[str, Tensor]
Costs = Callable[[Tensor, Batch], tuple[Tensor, Figures]]
Output = Literal["nll", "log_probs", "scores"]
OUTPUTS = ("nll", "log_probs", "scores")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A step's loss is Σ costs over all micro-batches and ranks, divided by the whole step's count. So are its figures.

    Attributes:
      output: what the model says about a token. "nll": cross-entropy of its target, by the fused kernel; token and
        document must then be None. "log_probs": log p(target), at the batch's temperature. "scores": of the scalar
        head (ModelConfig.scalar_head).
      token: (numbers [B, T], batch) -> (costs [B, T], figures of the same shape). None: the number itself. Both count
        by loss_weights; where that is 0, and where nothing is predicted, they are left out and may be anything finite.
        For a document that needs several sums, costs [C, B, T].
      document: (sums [B, S], rows) -> (costs [B, S], figures of the same shape), where sums[b, k − 1] is
        Σ loss_weights · token over segment k of a row ([C, B, S] of several), and rows is the batch with its rows
        whole, also under cp. What it gives for a segment that a row does not have is left out. None: the loss is linear
        in tokens.
      count: batch -> this rank's part of the divisor, a scalar, from its whole rows. None: Σ loss_weights.
      reports: the figures' names, all of which token and document give; each becomes a metric of the step.
      entropy: token's batch has "entropy" [B, T], of the distribution at the batch's temperature, without a gradient.
      num_ids: of log_probs: ids from here on have no probability, as for a sampler that never draws them (an embedding
        may have rows that its tokenizer does not use); 0: all have.
      router_losses: add those of a mixture's routers, by ModelConfig's coefficients. False: they are measured alone.
    """

    output: Output = "nll"
    token: Costs | None = None
    document: Costs | None = None
    count: Callable[[Batch], Tensor] | None = None
    reports: tuple[str, ...] = ()
    entropy: bool = False
    num_ids: int = 0
    router_losses: bool = True

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ValueError(f"Objective.output={self.output!r}: write one of {', '.join(OUTPUTS)}")
        if self.output == "nll" and (self.token or self.document or self.reports or self.entropy):
            raise ValueError(
                "Objective.output='nll' is a sum made by the kernel: write log_probs to work on its tokens"
            )
        if self.entropy and self.output != "log_probs":
            raise ValueError("Objective.entropy needs output='log_probs'")


NEXT_TOKEN = Objective()


class MicroBatch(NamedTuple):
    """own: the batch with this rank's part of every row; rows: with the rows whole. One and the same without cp."""

    own: Batch
    rows: Batch


def batch_weight(batch: Batch) -> Tensor:
    """Σ loss_weights over predicted tokens: the default divisor, a float64 scalar tensor.

    float64, so that the order of the sum (compiled, sharded) never shows in the loss.
    """
    return torch.where(predicted(batch), batch["loss_weights"], 0.0).sum(dtype=torch.float64)


def predicted(batch: Batch) -> Tensor:
    """bool [B, T]"""
    return batch["targets"] != cross_entropy.IGNORE


def divisor(objective: Objective, batch: Batch) -> Tensor:
    """This rank's part of what the step's loss is divided by, a float64 scalar tensor. batch: whole rows."""
    if objective.count is not None:
        return objective.count(batch).to(torch.float64)
    if objective.output == "scores":
        return batch["loss_weights"].sum(dtype=torch.float64)
    return batch_weight(batch)


def document_sums(values_BT: Tensor, segments_BT: Tensor, size: int) -> Tensor:
    """[B, size]: at k − 1 the sum over the places of segment k, 0 where there is none; padding (0) is left out.

    A segment's places must lie side by side. Sums are made pairwise in one order, so they repeat bit for bit. Of values
    [C, B, T] of the same segments, [C, B, size].
    """
    total, length, reach = values_BT, values_BT.shape[-1], 1
    while reach < length:  # afterwards total[t] sums the last 2·reach places of t's segment, up to t
        same = segments_BT[:, reach:] == segments_BT[:, :-reach]
        total = torch.cat((total[..., :reach], total[..., reach:] + torch.where(same, total[..., :-reach], 0)), -1)
        reach *= 2
    ends = torch.ones_like(segments_BT, dtype=torch.bool)
    ends[:, :-1] = segments_BT[:, 1:] != segments_BT[:, :-1]
    place = torch.where(ends, segments_BT, 0).to(torch.int64)  # slot 0 takes what is no end, and padding
    slots = values_BT.new_zeros(*values_BT.shape[:-1], size + 1)
    return slots.scatter(-1, place.expand_as(total), torch.where(place > 0, total, 0))[..., 1:]


def segments_of(batch: Batch) -> Tensor:
    """int [B, T]; one document a row where the batch has none."""
    return batch["segments"] if "segments" in batch else torch.ones_like(batch["tokens"])


def has_document(rows: Batch) -> Tensor:
    """bool [B, S], whether a row has the segment k at k − 1."""
    segments = segments_of(rows)
    return document_sums(torch.ones_like(segments, dtype=torch.float32), segments, segments.shape[1]) > 0


def make_numbers(
    cfg: ModelConfig,
    execution: model.Execution,
    output: Output,
    layout: Layout = ONE_DEVICE,
    entropy: bool = False,
    num_ids: int = 0,
) -> Callable[[Tensor, P.Params, Batch], tuple[Tensor, Tensor | None]]:
    """numbers(hidden, outer parameters, batch) -> (what the model says of each token [B, T], entropy [B, T] or None).

    Of this rank's part of the sequence, the same on all ranks of tp; float32 (float64 for float64). A log-probability
    is 0 where nothing is predicted. The temperature divides the hidden states, in their dtype, before the head.
    num_ids: as Objective's.
    """
    tp = layout.axes.tp

    def numbers(hidden: Tensor, outer: P.Params, batch: Batch) -> tuple[Tensor, Tensor | None]:
        hidden_ND = tensor.all_tokens(hidden, tp).flatten(0, -2)
        head, shape = model.head_weight(cfg, outer), batch["tokens"].shape
        if output == "scores":
            score_N = (hidden_ND @ head[0]).to(torch.promote_types(hidden_ND.dtype, torch.float32))
            return score_N.view(shape), None
        if "temperature" in batch:
            hidden_ND = hidden_ND / batch["temperature"].flatten()[:, None].to(hidden_ND.dtype)
        targets_N = batch["targets"].flatten()
        if execution.invariant:
            log_probs_N = invariant.token_log_probs(hidden_ND, tensor.known_rows(head, tp, num_ids), targets_N)
        elif tp.size > 1:
            log_probs_N = tensor.token_log_probs(hidden_ND, head, targets_N, tp, num_ids)
        else:
            log_probs_N = cross_entropy.token_log_probs(hidden_ND, tensor.known_rows(head, tp, num_ids), targets_N)
        around = tensor.entropy(hidden_ND.detach(), head.detach(), tp, num_ids).view(shape) if entropy else None
        return log_probs_N.view(shape), around

    return numbers


def check_model(cfg: ModelConfig, objective: Objective) -> None:
    """Raises UserError where the model's end does not give what the objective reads."""
    needed = objective.output == "scores"
    if needed != cfg.scalar_head:
        raise UserError(
            f"--config.model.scalar_head={cfg.scalar_head} does not go with a stage that trains on "
            f"{objective.output}; write --config.model.scalar_head={needed}"
        )


HeadFn = Callable[[Tensor, P.Params, MicroBatch, Tensor | float], tuple[Tensor, Figures]]


def make_head(
    cfg: ModelConfig, execution: model.Execution, layout: Layout = ONE_DEVICE, objective: Objective = NEXT_TOKEN
) -> HeadFn:
    """head(hidden, outer parameters, micro-batch, count) -> this rank's shares of the loss and of the figures.

    All that the model's end has to know of an objective. hidden [B, T, D], or this rank's part of it
    (sharding.tensor.own_tokens), behind the final norm; outer parameters: whole but for tp's cut. count: the step's
    divisor; where it is 0 everything is 0. The shares of all ranks add up.
    """
    check_model(cfg, objective)
    if objective.output == "nll":
        return _nll_head(cfg, execution, layout)
    numbers_of = make_numbers(cfg, execution, objective.output, layout, objective.entropy, objective.num_ids)

    def head(hidden: Tensor, outer: P.Params, micro: MicroBatch, count: Tensor | float) -> tuple[Tensor, Figures]:
        numbers, entropy = numbers_of(hidden, outer, micro.own)
        own = micro.own if entropy is None else {**micro.own, "entropy": entropy}
        return cost_shares(objective, numbers, MicroBatch(own, micro.rows), count, layout)

    return head


def cost_shares(
    objective: Objective, numbers: Tensor, micro: MicroBatch, count: Tensor | float, layout: Layout = ONE_DEVICE
) -> tuple[Tensor, Figures]:
    """What an objective other than nll makes of the numbers [B, T] of this rank's part of the rows; as HeadFn."""
    batch, axes = micro.own, layout.axes
    counts = batch["loss_weights"] != 0
    if objective.output == "log_probs":
        counts = counts & predicted(batch)
    weights = torch.where(counts, batch["loss_weights"].to(numbers.dtype), 0)
    costs, figures = torch.where(counts, numbers, 0), {}
    if objective.token is not None:
        costs, figures = objective.token(costs, batch)
    costs, figures = (_weighted(x, counts, weights) for x in (costs, figures))
    shares = {name: _share(x.sum(), axes.tp.size) for name, x in figures.items()}
    if objective.document is None:
        total = _share(costs.sum(), axes.tp.size)
    else:  # every rank of cp and tp has the same sums
        size, copies = micro.rows["tokens"].shape[1], axes.tp.size * axes.cp.size
        sums = all_reduce(document_sums(costs, segments_of(batch), size), axes.cp)
        costs, figures = objective.document(sums, micro.rows)
        there = has_document(micro.rows)
        total = _share(torch.where(there, costs, 0).sum(), copies)
        shares |= {name: _share(torch.where(there, x, 0).sum(), copies) for name, x in figures.items()}
    if shares.keys() != set(objective.reports):
        raise ValueError(f"Objective.reports={objective.reports}, and its functions gave {sorted(shares)}")
    return _divide(total, count), {name: _divide(shares[name].detach(), count) for name in objective.reports}


def _nll_head(cfg: ModelConfig, execution: model.Execution, layout: Layout) -> HeadFn:
    tp = layout.axes.tp

    def head(hidden: Tensor, outer: P.Params, micro: MicroBatch, count: Tensor | float) -> tuple[Tensor, Figures]:
        batch = micro.own
        rest = (model.head_weight(cfg, outer), batch["targets"].flatten(), batch["loss_weights"].flatten())
        if tp.size > 1:
            total = _share(tensor.linear_cross_entropy(hidden, *rest, tp), tp.size)
        elif execution.loss == "reference":
            total = cross_entropy.reference(hidden.flatten(0, 1), *rest)
        else:
            total = cross_entropy.linear_cross_entropy(hidden.flatten(0, 1), *rest, float32_sum=True)
        return _divide(total, count), {}

    return head


def _weighted(x: Tensor | Figures, counts: Tensor, weights: Tensor) -> Tensor | Figures:
    if isinstance(x, Tensor):
        return torch.where(counts, x, 0) * weights
    return {name: _weighted(value, counts, weights) for name, value in x.items()}


def _share(x: Tensor, ranks: int) -> Tensor:
    """A rank's share of what `ranks` ranks hold alike."""
    return x if ranks == 1 else x / ranks


def _divide(x: Tensor, count: Tensor | float) -> Tensor:
    count = torch.as_tensor(count, dtype=x.dtype, device=x.device)
    return x / torch.where(count > 0, count, 1.0)
