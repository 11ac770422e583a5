"""The next-token loss: a weighted sum over tokens, divided by the weight of the whole batch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import cross_entropy
from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.params import Params

LossFn = Callable[..., Tensor]


def check_balance(cfg: ModelConfig) -> None:
    """Raises UserError if training `cfg` needs the router's load-balancing loss, which this version doesn't have."""
    if cfg.sparse_layers and cfg.router_aux_loss_coef > 0:
        raise UserError(
            f"model.router_aux_loss_coef={cfg.router_aux_loss_coef}: this version trains experts without a "
            "load-balancing loss; write --config.model.router_aux_loss_coef=0"
        )


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


def make_loss(cfg: ModelConfig, execution: model.Execution = model.EAGER, *, dropout: bool = False) -> LossFn:
    """loss(params, batch, total_weight, dropout_stream=None) -> Σ loss_weights · nll / total_weight, nats a token.

    float32 (float64 for a float64 model). total_weight is `batch_weight` of *all* micro-batches and ranks that make
    up the step, so that cutting a batch never changes the loss. A batch in which nothing is predicted gives 0 and
    zero gradients, not NaN. With execution=model.REFERENCE the function composes with torch.func.
    """
    forward = model.make_forward(cfg, execution, dropout=dropout)

    def loss(
        params: Params, batch: Mapping[str, Tensor], total_weight: Tensor | float, dropout_stream: Tensor | None = None
    ) -> Tensor:
        hidden = forward(params, batch, dropout_stream).flatten(0, 1)
        rest = (model.head_weight(cfg, params), batch["targets"].flatten(), batch["loss_weights"].flatten())
        if execution.loss == "reference":
            total = cross_entropy.reference(hidden, *rest)
        else:
            total = cross_entropy.linear_cross_entropy(hidden, *rest, compiled=execution.compile == "block")
        divisor = torch.as_tensor(total_weight, dtype=total.dtype, device=total.device)
        return total / torch.where(divisor > 0, divisor, 1.0)

    return loss
