"""The loss that a step differentiates: the objective's, and for a mixture of experts the routers' losses
(qwen3f/train/balance.py)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.params import Params
from qwen3f.train import balance
from qwen3f.train.objective import NEXT_TOKEN, Batch, Figures, MicroBatch, Objective, divisor, make_head, predicted
from sharding.axes import Axes
from sharding.fsdp import sum_over
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import DATA, ROWS

LossFn = Callable[..., Tensor]


class Totals(NamedTuple):
    """The divisors of a step's losses, over all its micro-batches and ranks.

    count: the objective's divisor. tokens: real tokens, the divisor of the routers' losses.
    """

    count: Tensor
    tokens: Tensor


class Terms(NamedTuple):
    """One micro-batch's parts of the step's losses. The sum over micro-batches and ranks is the step's.

    loss: the objective's. aux_loss, z_loss: the routers', without their coefficients; 0 for a dense model. load: how
    often the routers chose each expert, already summed over all ranks; None for a dense model. figures: the
    objective's.
    """

    loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    load: balance.Load | None
    figures: Figures


def add_terms(a: Terms | None, b: Terms) -> Terms:
    if a is None:
        return b
    load = None if b.load is None else balance.add(a.load, b.load)
    figures = {name: a.figures[name] + value for name, value in b.figures.items()}
    return Terms(a.loss + b.loss, a.aux_loss + b.aux_loss, a.z_loss + b.z_loss, load, figures)


def sum_totals(cfg: ModelConfig, batch: Batch, axes: Axes, objective: Objective = NEXT_TOKEN) -> Totals:
    """The whole step's divisors. batch: this rank's rows, whole (before cp cuts them)."""
    count, tokens = sum_over(divisor(objective, batch), axes, ROWS), routed_tokens(batch)
    return Totals(count, sum_over(tokens, axes, ROWS) if cfg.sparse_layers else tokens)


def sum_ranks(terms: Terms, axes: Axes) -> Terms:
    """The whole step's terms from this rank's, the same on every rank."""
    if axes.shape.size == 1:
        return terms
    numbers = torch.stack([*terms[:3], *terms.figures.values()])
    loss, aux_loss, z_loss, *figures = sum_over(numbers, axes).unbind()
    return Terms(loss, aux_loss, z_loss, terms.load, dict(zip(terms.figures, figures)))


def batch_tokens(batch: Batch) -> Tensor:
    """The number of predicted tokens with a loss weight other than 0, an int64 scalar tensor."""
    return (predicted(batch) & (batch["loss_weights"] != 0)).sum()


def routed_tokens(batch: Batch) -> Tensor:
    """The number of tokens that are not padding, an int64 scalar tensor: the divisor of the routers' losses."""
    real = model.real_tokens(batch)
    return torch.ones_like(batch["tokens"]).sum() if real is None else real.sum()


def make_loss(
    cfg: ModelConfig,
    execution: model.Execution = model.EAGER,
    *,
    dropout: bool = False,
    layout: Layout = ONE_DEVICE,
) -> LossFn:
    """loss(params, batch, total_weight, dropout_stream=None) -> Σ loss_weights · nll / total_weight, nats per token.

    float32 (float64 for a float64 model). total_weight is `batch_weight` of *all* micro-batches and ranks of the step,
    so that the cut of a batch never changes the loss. A batch in which nothing is predicted gives 0 and zero gradients,
    not NaN. The routers' losses are not included. With execution=model.REFERENCE the function works with torch.func. On
    a mesh it returns this rank's share: the sum over all ranks is the loss.
    """
    both = _make_loss_and_stats(cfg, execution, dropout, layout, NEXT_TOKEN)

    def loss(
        params: Params, batch: Batch, total_weight: Tensor | float, dropout_stream: Tensor | None = None
    ) -> Tensor:
        return both(params, MicroBatch(batch, batch), total_weight, dropout_stream)[0][0]

    return loss


def make_differentiated(
    cfg: ModelConfig,
    objective: Objective = NEXT_TOKEN,
    execution: model.Execution = model.EAGER,
    *,
    dropout: bool = False,
    layout: Layout = ONE_DEVICE,
) -> Callable[..., tuple[Tensor, Terms]]:
    """fn(trainable, frozen, micro-batch, totals, others=None, dropout_stream=None) -> (the scalar that a step
    differentiates by `trainable`, its Terms).

    The scalar is the objective's loss plus, if it has router_losses, router_aux_loss_coef · aux_loss plus
    router_z_loss_coef · z_loss. trainable and frozen together are the model's parameters. others: the load of other
    micro-batches, see balance.balance_loss. On a mesh both results are this rank's share.
    """
    both = _make_loss_and_stats(cfg, execution, dropout, layout, objective)

    def differentiated(
        trainable: Params,
        frozen: Params,
        micro: MicroBatch,
        totals: Totals,
        others: balance.Load | None = None,
        dropout_stream: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        (loss, figures), stats = both({**trainable, **frozen}, micro, totals.count, dropout_stream)
        if stats is None:
            return loss, token_terms(loss, figures)
        terms = router_terms(cfg, stats, totals, others, layout.axes)
        return add_router_losses(cfg, objective, loss, terms), terms._replace(loss=loss, figures=figures)

    return differentiated


def token_terms(loss: Tensor, figures: Figures) -> Terms:
    """The Terms of a dense model."""
    return Terms(loss, torch.zeros_like(loss), torch.zeros_like(loss), None, figures)


def router_terms(
    cfg: ModelConfig,
    stats: model.RouterStats,
    totals: Totals,
    others: balance.Load | None,
    axes: Axes,
    part: float = 1.0,
) -> Terms:
    """The routers' part of a rank's Terms, with a loss of 0 and no figures.

    part: the fraction of the model's sparse layers that `stats` covers (a slice of a pipeline has only some).
    """
    load = _sum_load(balance.load_of(stats), axes)
    share = part / axes.tp.size  # the routers of all ranks of tp see the same tokens
    aux = _share(balance.balance_loss(cfg.router_balance, stats, load, others, totals.tokens), share)
    z = _share(balance.z_loss(stats, totals.tokens), share)
    return Terms(torch.zeros_like(aux), aux, z, load, {})


def add_router_losses(cfg: ModelConfig, objective: Objective, loss: Tensor, terms: Terms) -> Tensor:
    """loss plus the routers' losses times their coefficients; loss alone if the objective has no router_losses."""
    if not objective.router_losses:
        return loss
    for coefficient, term in ((cfg.router_aux_loss_coef, terms.aux_loss), (cfg.router_z_loss_coef, terms.z_loss)):
        if coefficient > 0:
            loss = loss + coefficient * term
    return loss


def make_load(
    cfg: ModelConfig,
    execution: model.Execution = model.EAGER,
    *,
    dropout: bool = False,
    layout: Layout = ONE_DEVICE,
) -> Callable[..., balance.Load]:
    """load(params, batch, dropout_stream=None) -> the Load of a forward pass of a sparse model; no gradients."""
    forward = model.make_forward(cfg, execution, dropout=dropout, layout=layout)
    outer = model.make_outer(cfg, layout)

    @torch.no_grad()
    def load(params: Params, batch: Batch, dropout_stream: Tensor | None = None) -> balance.Load:
        return _sum_load(balance.load_of(forward(outer(params), batch, dropout_stream)[1]), layout.axes)

    return load


def _make_loss_and_stats(
    cfg: ModelConfig, execution: model.Execution, dropout: bool, layout: Layout, objective: Objective
) -> Callable[..., tuple[tuple[Tensor, Figures], model.RouterStats | None]]:
    forward = model.make_forward(cfg, execution, dropout=dropout, layout=layout)
    outer, head = model.make_outer(cfg, layout), make_head(cfg, execution, layout, objective)

    def both(
        params: Params, micro: MicroBatch, count: Tensor | float, dropout_stream: Tensor | None
    ) -> tuple[tuple[Tensor, Figures], model.RouterStats | None]:
        params = outer(params)
        hidden, stats = forward(params, micro.own, dropout_stream)
        return head(hidden, params, micro, count), stats

    return both


def _share(x: Tensor, part: float) -> Tensor:
    """part · x: this rank's share of a value that several ranks hold, or of a mean over layers of several slices."""
    return x if part == 1 else part * x


def _sum_load(load: balance.Load, axes: Axes) -> balance.Load:
    """The load of all ranks, in one collective. Ranks of tp count the same tokens."""
    if all(axes[name].size == 1 for name in DATA):
        return load
    counts, tokens, dropped = load
    columns = sum_over(torch.cat((counts, tokens[:, None], dropped[:, None]), 1), axes, DATA)
    return balance.Load(columns[:, :-2], columns[:, -2], columns[:, -1])
