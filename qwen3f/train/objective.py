"""The training loss: the next-token loss, a weighted sum over tokens divided by the weight of the whole batch.

A mixture of experts adds its routers' losses (qwen3f/train/balance.py).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cross_entropy
from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.params import Params
from qwen3f.train import balance
from sharding import tensor
from sharding.axes import Axes
from sharding.fsdp import sum_over
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import DATA

LossFn = Callable[..., Tensor]


class Totals(NamedTuple):
    """What a step's losses are divided by: `batch_weight` and `routed_tokens` of all its micro-batches and ranks."""

    weight: Tensor
    tokens: Tensor


class Terms(NamedTuple):
    """A micro-batch's parts of the step's loss; those of all micro-batches add up, and those of all ranks.

    loss: next-token, nats a token. aux_loss, z_loss: the routers', without their coefficients; 0 for a dense model.
    load: what the routers counted, on a mesh those of all ranks; None for a dense model.
    """

    loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    load: balance.Load | None


def add_terms(a: Terms | None, b: Terms) -> Terms:
    if a is None:
        return b
    load = None if b.load is None else balance.add(a.load, b.load)
    return Terms(a.loss + b.loss, a.aux_loss + b.aux_loss, a.z_loss + b.z_loss, load)


def sum_totals(cfg: ModelConfig, batch: Mapping[str, Tensor], axes: Axes) -> Totals:
    """Of the whole step, from this rank's part of the batch."""
    weight, tokens = sum_over(batch_weight(batch), axes, DATA), routed_tokens(batch)
    return Totals(weight, sum_over(tokens, axes, DATA) if cfg.sparse_layers else tokens)


def sum_ranks(terms: Terms, axes: Axes) -> Terms:
    """The whole step's terms from this rank's, the same on every rank."""
    if axes.shape.size == 1:
        return terms
    return Terms(*sum_over(torch.stack(terms[:3]), axes).unbind(), terms.load)


def batch_weight(batch: Mapping[str, Tensor]) -> Tensor:
    """Σ loss_weights over predicted tokens: the divisor of the loss, a float64 scalar tensor.

    float64, so that the order of the sum (compiled, sharded) never shows in the loss.
    """
    return torch.where(_predicted(batch), batch["loss_weights"], 0.0).sum(dtype=torch.float64)


def batch_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The number of tokens that are predicted and count, an int64 scalar tensor."""
    return (_predicted(batch) & (batch["loss_weights"] != 0)).sum()


def _predicted(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["targets"] != cross_entropy.IGNORE


def routed_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The number of real tokens, predicted or not, an int64 scalar tensor: what the routers' losses are divided by."""
    real = model.real_tokens(batch)
    return torch.ones_like(batch["tokens"]).sum() if real is None else real.sum()


def make_loss(
    cfg: ModelConfig,
    execution: model.Execution = model.EAGER,
    *,
    dropout: bool = False,
    layout: Layout = ONE_DEVICE,
) -> LossFn:
    """loss(params, batch, total_weight, dropout_stream=None) -> Σ loss_weights · nll / total_weight, nats a token.

    float32 (float64 for a float64 model). total_weight is `batch_weight` of *all* micro-batches and ranks that make
    up the step, so that cutting a batch never changes the loss. A batch in which nothing is predicted gives 0 and
    zero gradients, not NaN. The routers' losses are no part of it. With execution=model.REFERENCE the function composes
    with torch.func. On a mesh it is this rank's share: the shares of all ranks add up to the loss.
    """
    both = _make_loss_and_stats(cfg, execution, dropout, layout)

    def loss(
        params: Params, batch: Mapping[str, Tensor], total_weight: Tensor | float, dropout_stream: Tensor | None = None
    ) -> Tensor:
        return both(params, batch, total_weight, dropout_stream)[0]

    return loss


def make_objective(
    cfg: ModelConfig,
    execution: model.Execution = model.EAGER,
    *,
    dropout: bool = False,
    layout: Layout = ONE_DEVICE,
) -> Callable[..., tuple[Tensor, Terms]]:
    """objective(params, batch, totals, others=None, dropout_stream=None) -> (what a step differentiates, its Terms).

    The scalar is make_loss's plus router_aux_loss_coef · aux_loss plus router_z_loss_coef · z_loss. others: the load of
    other micro-batches, see balance.balance_loss. On a mesh both are this rank's share.
    """
    both = _make_loss_and_stats(cfg, execution, dropout, layout)

    def objective(
        params: Params,
        batch: Mapping[str, Tensor],
        totals: Totals,
        others: balance.Load | None = None,
        dropout_stream: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        loss, stats = both(params, batch, totals.weight, dropout_stream)
        if stats is None:
            return loss, token_terms(loss)
        terms = router_terms(cfg, stats, totals, others, layout.axes)
        return add_router_losses(cfg, loss, terms), terms._replace(loss=loss)

    return objective


def token_terms(loss: Tensor) -> Terms:
    """Terms without routers."""
    return Terms(loss, torch.zeros_like(loss), torch.zeros_like(loss), None)


def router_terms(
    cfg: ModelConfig,
    stats: model.RouterStats,
    totals: Totals,
    others: balance.Load | None,
    axes: Axes,
    part: float = 1.0,
) -> Terms:
    """A rank's Terms of its routers, with a next-token loss of 0. part: theirs of the model's sparse layers."""
    load = _sum_load(balance.load_of(stats), axes)
    share = part / axes.tp.size  # the routers of all ranks of tp see the same tokens
    aux = _share(balance.balance_loss(cfg.router_balance, stats, load, others, totals.tokens), share)
    z = _share(balance.z_loss(stats, totals.tokens), share)
    return Terms(torch.zeros_like(aux), aux, z, load)


def add_router_losses(cfg: ModelConfig, loss: Tensor, terms: Terms) -> Tensor:
    """What is differentiated: loss, plus the routers' losses by their coefficients."""
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
    """load(params, batch, dropout_stream=None) -> what the routers of a sparse model count; no gradients."""
    forward = model.make_forward(cfg, execution, dropout=dropout, layout=layout)
    outer = model.make_outer(cfg, layout)

    @torch.no_grad()
    def load(params: Params, batch: Mapping[str, Tensor], dropout_stream: Tensor | None = None) -> balance.Load:
        return _sum_load(balance.load_of(forward(outer(params), batch, dropout_stream)[1]), layout.axes)

    return load


def _make_loss_and_stats(
    cfg: ModelConfig, execution: model.Execution, dropout: bool, layout: Layout
) -> Callable[..., tuple[Tensor, model.RouterStats | None]]:
    forward = model.make_forward(cfg, execution, dropout=dropout, layout=layout)
    outer, token_loss = model.make_outer(cfg, layout), make_token_loss(execution, layout)

    def both(
        params: Params, batch: Mapping[str, Tensor], total_weight: Tensor | float, dropout_stream: Tensor | None
    ) -> tuple[Tensor, model.RouterStats | None]:
        params = outer(params)
        hidden, stats = forward(params, batch, dropout_stream)
        return token_loss(hidden, model.head_weight(cfg, params), batch, total_weight), stats

    return both


def make_token_loss(execution: model.Execution, layout: Layout) -> Callable[..., Tensor]:
    """token_loss(hidden, head, batch, total_weight) -> make_loss's number, from what the final norm gives.

    hidden [B, T, D], or this rank's part of it (sharding.tensor.own_tokens); head: the weight, whole but for tp's cut.
    """
    tp = layout.axes.tp

    def token_loss(hidden: Tensor, head: Tensor, batch: Mapping[str, Tensor], total_weight: Tensor | float) -> Tensor:
        rest = (head, batch["targets"].flatten(), batch["loss_weights"].flatten())
        if tp.size > 1:
            total = _share(tensor.linear_cross_entropy(hidden, *rest, tp), 1 / tp.size)
        elif execution.loss == "reference":
            total = cross_entropy.reference(hidden.flatten(0, 1), *rest)
        else:
            total = cross_entropy.linear_cross_entropy(hidden.flatten(0, 1), *rest, float32_sum=True)
        divisor = torch.as_tensor(total_weight, dtype=total.dtype, device=total.device)
        return total / torch.where(divisor > 0, divisor, 1.0)

    return token_loss


def _share(x: Tensor, part: float) -> Tensor:
    """A part of a value: of one that several ranks hold alike, or of a mean over more than is here."""
    return x if part == 1 else part * x


def _sum_load(load: balance.Load, axes: Axes) -> balance.Load:
    """The load of all ranks, in one collective. Ranks of tp count the same tokens."""
    if all(axes[name].size == 1 for name in DATA):
        return load
    counts, tokens, dropped = load
    columns = sum_over(torch.cat((counts, tokens[:, None], dropped[:, None]), 1), axes, DATA)
    return balance.Load(columns[:, :-2], columns[:, -2], columns[:, -1])
