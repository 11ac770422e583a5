"""An Objective says what a stage minimises: which number the model gives for each token, and what that number costs.

B rows · T positions of this rank's part of the sequence · L positions of the whole row · S = L, the most documents that
a row can have · N = B·T · D hidden
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
    """A step's loss is the sum of costs over all micro-batches and ranks, divided by the whole step's count.

    Its figures (named values that are logged as metrics) are summed and divided in the same way.

    Attributes:
      output: the number that the model gives for each token. "nll": cross-entropy of its target, by the fused kernel;
        token and document must then be None. "log_probs": log p(target), at the batch's temperature. "scores": the
        output of the scalar head (ModelConfig.scalar_head).
      token: (numbers [B, T], batch) -> (costs [B, T], figures of the same shape). None: the cost is the number itself.
        Costs and figures are multiplied by loss_weights. Where a weight is 0 or nothing is predicted, they are ignored,
        but must be finite. For a `document` that needs C sums, costs are [C, B, T].
      document: (sums [B, S], rows) -> (costs [B, S], figures of the same shape). sums[b, k − 1] is Σ loss_weights ·
        cost over segment k of row b ([C, B, S] for C sums). rows: the batch with whole rows, also under cp. Results for
        segments that a row does not have are ignored. None: the loss is the sum of the tokens' costs.
      count: batch with whole rows -> this rank's part of the divisor, a scalar. None: Σ loss_weights.
      reports: the names of all figures that token and document return; each becomes a metric of the step.
      entropy: give `token` the key "entropy" [B, T] in its batch: the entropy of the distribution at the batch's
        temperature, without a gradient.
      num_ids: only for log_probs: ids from num_ids on get probability 0, as for a sampler that never draws them (an
        embedding may have more rows than its tokenizer has ids); 0: all ids are allowed.
      router_losses: add the routers' losses, with ModelConfig's coefficients. False: they are only logged.
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
    """own: the batch with this rank's part of every row. rows: the batch with whole rows. Without cp: the same."""

    own: Batch
    rows: Batch


def batch_weight(batch: Batch) -> Tensor:
    """Σ loss_weights over predicted tokens, a float64 scalar tensor: the default divisor.

    float64, so that the order of summation (compiled, sharded) does not change the loss.
    """
    return torch.where(predicted(batch), batch["loss_weights"], 0.0).sum(dtype=torch.float64)


def predicted(batch: Batch) -> Tensor:
    """bool [B, T]: whether the position has a target."""
    return batch["targets"] != cross_entropy.IGNORE


def divisor(objective: Objective, batch: Batch) -> Tensor:
    """This rank's part of the divisor of the step's loss, a float64 scalar tensor. batch: with whole rows."""
    if objective.count is not None:
        return objective.count(batch).to(torch.float64)
    if objective.output == "scores":
        return batch["loss_weights"].sum(dtype=torch.float64)
    return batch_weight(batch)


def document_sums(values_BT: Tensor, segments_BT: Tensor, size: int) -> Tensor:
    """[B, size]: element k − 1 is the sum of the values in segment k, 0 if there is none; padding (segment 0) is left
    out. For values [C, B, T], [C, B, size].

    A segment must be contiguous. Sums are pairwise and in a fixed order, so results repeat bit for bit.
    """
    total, length, reach = values_BT, values_BT.shape[-1], 1
    while reach < length:  # after each round total[t] sums up to 2·reach values of t's segment that end at t
        same = segments_BT[:, reach:] == segments_BT[:, :-reach]
        total = torch.cat((total[..., :reach], total[..., reach:] + torch.where(same, total[..., :-reach], 0)), -1)
        reach *= 2
    ends = torch.ones_like(segments_BT, dtype=torch.bool)
    ends[:, :-1] = segments_BT[:, 1:] != segments_BT[:, :-1]
    place = torch.where(ends, segments_BT, 0).to(torch.int64)  # slot 0, dropped, takes all but the segments' last sums
    slots = values_BT.new_zeros(*values_BT.shape[:-1], size + 1)
    return slots.scatter(-1, place.expand_as(total), torch.where(place > 0, total, 0))[..., 1:]


def segments_of(batch: Batch) -> Tensor:
    """The batch's segments, int [B, T]; without that key, one document per row."""
    return batch["segments"] if "segments" in batch else torch.ones_like(batch["tokens"])


def has_document(rows: Batch) -> Tensor:
    """bool [B, S]: element k − 1 says whether the row has segment k."""
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
    """numbers(hidden, outer parameters, batch) -> (the model's number for each token [B, T], entropy [B, T] or None).

    [B, T] is this rank's part of the sequence; all ranks of tp get the same. float32 (float64 for float64). A
    log-probability is 0 where nothing is predicted. The hidden states are divided by the temperature, in their dtype,
    before the head. num_ids: as Objective's.
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
    """UserError if the model's head (vocabulary or scalar) is not the one that the objective needs."""
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

    hidden: [B, T, D] after the final norm, or with tp this rank's part of it (sharding.tensor.own_tokens). outer
    parameters: whole, except for tp's cut. count: the step's divisor; if it is 0, all results are 0. The sum of the
    shares over all ranks is the loss, and the figures.
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
    """The shares of loss and figures, as make_head's, from the model's numbers [B, T]; not for output "nll"."""
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
    else:  # all ranks of cp and tp compute the same sums, so each takes an equal share
        size, copies = micro.rows["tokens"].shape[1], axes.tp.size * axes.cp.size
        sums = all_reduce(document_sums(costs, segments_of(batch), size), axes.cp)
        costs, figures = objective.document(sums, micro.rows)
        there = has_document(micro.rows)
        total = _share(torch.where(there, costs, 0).sum(), copies)
        shares |= {name: _share(torch.where(there, x, 0).sum(), copies) for name, x in figures.items()}
    if shares.keys() != set(objective.reports):
        raise ValueError(f"Objective.reports={objective.reports}, but token and document returned {sorted(shares)}")
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
    """One rank's share of a value that `ranks` ranks all have."""
    return x if ranks == 1 else x / ranks


def _divide(x: Tensor, count: Tensor | float) -> Tensor:
    count = torch.as_tensor(count, dtype=x.dtype, device=x.device)
    return x / torch.where(count > 0, count, 1.0)
