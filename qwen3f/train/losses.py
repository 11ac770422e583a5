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

LossFn = Callable[..., Tensor]


class Totals(NamedTuple):
    """What a step's losses are divided by: `batch_weight` and `routed_tokens` of all its micro-batches and ranks."""

    weight: Tensor
    tokens: Tensor


class Terms(NamedTuple):
    """A micro-batch's parts of the step's loss; those of all micro-batches add up.

    loss: next-token, nats a token. aux_loss, z_loss: the routers', without their coefficients; 0 for a dense model.
    load: what the routers counted; None for a dense model.
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


def make_loss(cfg: ModelConfig, execution: model.Execution = model.EAGER, *, dropout: bool = False) -> LossFn:
    """loss(params, batch, total_weight, dropout_stream=None) -> Σ loss_weights · nll / total_weight, nats a token.

    float32 (float64 for a float64 model). total_weight is `batch_weight` of *all* micro-batches and ranks that make
    up the step, so that cutting a batch never changes the loss. A batch in which nothing is predicted gives 0 and
    zero gradients, not NaN. The routers' losses are no part of it. With execution=model.REFERENCE the function composes
    with torch.func.
    """
    both = _make_loss_and_stats(cfg, execution, dropout)

    def loss(
        params: Params, batch: Mapping[str, Tensor], total_weight: Tensor | float, dropout_stream: Tensor | None = None
    ) -> Tensor:
        return both(params, batch, total_weight, dropout_stream)[0]

    return loss


def make_objective(
    cfg: ModelConfig, execution: model.Execution = model.EAGER, *, dropout: bool = False
) -> Callable[..., tuple[Tensor, Terms]]:
    """objective(params, batch, totals, others=None, dropout_stream=None) -> (what a step differentiates, its Terms).

    The scalar is make_loss's plus router_aux_loss_coef · aux_loss plus router_z_loss_coef · z_loss. others: the load of
    other micro-batches, see balance.balance_loss.
    """
    both = _make_loss_and_stats(cfg, execution, dropout)

    def objective(
        params: Params,
        batch: Mapping[str, Tensor],
        totals: Totals,
        others: balance.Load | None = None,
        dropout_stream: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        loss, stats = both(params, batch, totals.weight, dropout_stream)
        if stats is None:
            return loss, Terms(loss, torch.zeros_like(loss), torch.zeros_like(loss), None)
        aux = balance.balance_loss(cfg.router_balance, stats, others, totals.tokens)
        z = balance.z_loss(stats, totals.tokens)
        total = loss
        for coefficient, term in ((cfg.router_aux_loss_coef, aux), (cfg.router_z_loss_coef, z)):
            if coefficient > 0:
                total = total + coefficient * term
        return total, Terms(loss, aux, z, balance.load_of(stats))

    return objective


def make_load(
    cfg: ModelConfig, execution: model.Execution = model.EAGER, *, dropout: bool = False
) -> Callable[..., balance.Load]:
    """load(params, batch, dropout_stream=None) -> what the routers of a sparse model count; no gradients."""
    forward = model.make_forward(cfg, execution, dropout=dropout)

    @torch.no_grad()
    def load(params: Params, batch: Mapping[str, Tensor], dropout_stream: Tensor | None = None) -> balance.Load:
        return balance.load_of(forward(params, batch, dropout_stream)[1])

    return load


def _make_loss_and_stats(
    cfg: ModelConfig, execution: model.Execution, dropout: bool
) -> Callable[..., tuple[Tensor, model.RouterStats | None]]:
    forward = model.make_forward(cfg, execution, dropout=dropout)

    def both(
        params: Params, batch: Mapping[str, Tensor], total_weight: Tensor | float, dropout_stream: Tensor | None
    ) -> tuple[Tensor, model.RouterStats | None]:
        hidden, stats = forward(params, batch, dropout_stream)
        rest = (model.head_weight(cfg, params), batch["targets"].flatten(), batch["loss_weights"].flatten())
        if execution.loss == "reference":
            total = cross_entropy.reference(hidden.flatten(0, 1), *rest)
        else:
            total = cross_entropy.linear_cross_entropy(hidden.flatten(0, 1), *rest)
        divisor = torch.as_tensor(total_weight, dtype=total.dtype, device=total.device)
        return total / torch.where(divisor > 0, divisor, 1.0), stats

    return both
