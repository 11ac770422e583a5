"""Tensor parallelism: what a block does differently when its weights are cut over tp.

Column-parallel products (q, k, v, gate, up) take all tokens and compute this rank's heads or columns. Row-parallel
products (o, down) compute this rank's term of a sum over ranks. Between them the residual stream is cut by tokens
(sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198): it is gathered before column-parallel products, and
reduce-scattered after row-parallel ones. The B rows are flattened to one row of N tokens before the cut, so neither
collective needs a copy. Embedding, head and loss are cut along the vocabulary. In generation (Axis.whole) every rank
holds the whole residual stream: nothing is gathered, and row-parallel products end in an all-reduce.

B batch · T sequence · N = B·T tokens (n: this rank's part) · D hidden · V vocabulary (v: this rank's) · C columns of a
layer (this rank's) · S ranks of tp
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cross_entropy
from sharding.axes import Axis
from sharding.collectives import all_reduce, gather, gather_now, reduce_scatter, start_reduce_scatter, wait

Layer = tuple[Tensor, Tensor | None]  # weight and bias


def all_tokens(x_1nD: Tensor, tp: Axis) -> Tensor:
    """Gather the tokens of all ranks, [1, N, D]; the backward pass sums their gradients over ranks. Without tp, x."""
    return x_1nD if tp.size == 1 or tp.whole else gather(x_1nD.squeeze(0), tp, 0).unsqueeze(0)


def own_tokens(x_BTD: Tensor, tp: Axis) -> Tensor:
    """Sum x over ranks. Returns this rank's tokens [1, n, D]; all tokens [B, T, D] if tp.whole; x without tp."""
    if tp.whole:
        return all_reduce(x_BTD, tp)
    return x_BTD if tp.size == 1 else reduce_scatter(x_BTD.flatten(0, 1), tp, 0).unsqueeze(0)


def row_parallel(linear: nn.Linear, x: Tensor, tp: Axis) -> Tensor:
    """linear(x) where x [B, T, this rank's part] and the weight's columns are cut over tp; result as own_tokens.

    The bias is added once, after the sum over ranks.
    """
    if tp.size == 1:
        return linear(x)
    y_1nD = own_tokens(F.linear(x, linear.weight), tp)
    return y_1nD if linear.bias is None else y_1nD + linear.bias


def kv_rows(linear: nn.Linear, heads: int, tp: Axis) -> Layer:
    """Weight and bias of a key or value projection, with only the rows that this rank's queries need.

    heads: key/value heads of the whole model. If they are fewer than the ranks of tp, every rank holds all of them and
    uses one, which it shares with other ranks.
    """
    if heads % tp.size == 0:
        return linear.weight, linear.bias
    size = len(linear.weight) // heads
    return tuple(
        x if x is None else x.narrow(0, tp.index * heads // tp.size * size, size) for x in (linear.weight, linear.bias)
    )


def column_parallel(x_1nD: Tensor, layers: Sequence[Layer], tp: Axis) -> list[Tensor]:
    """Each layer applied to all tokens: one [1, N, this rank's columns] per layer. Without tp, each layer applied to x.

    In compiled code the weights' gradients are computed while the gradient of x is summed over ranks. Uncompiled code
    calls F.linear, because schedules that defer the weights' gradients (sharding.pipeline.deferred_grads) intercept it.
    """
    if tp.size > 1 and not tp.whole and torch.compiler.is_compiling():
        weights, biases = zip(*layers)
        columns = _ColumnParallel.apply(x_1nD.squeeze(0), tp.size, tp.group, len(layers), *weights, *biases)
        return [y_NC.unsqueeze(0) for y_NC in columns]
    x = all_tokens(x_1nD, tp)
    return [F.linear(x, *layer) for layer in layers]


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_nD: Tensor,
        size: int,
        group: str,
        count: int,
        *layers: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x_ND = gather_now(x_nD, size, group)
        weights, biases = layers[:count], layers[count:]
        ctx.save_for_backward(x_ND, *weights)
        ctx.where, ctx.biased = (size, group), [bias is not None for bias in biases]
        return tuple(F.linear(x_ND, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *weights = ctx.saved_tensors
        dx_ND = grads_NC[0] @ weights[0]
        for dy_NC, weight in zip(grads_NC[1:], weights[1:]):
            dx_ND = torch.addmm(dx_ND, dy_NC, weight)
        dx_nD = start_reduce_scatter(dx_ND, *ctx.where)
        of_weights = [dy_NC.t() @ x_ND for dy_NC in grads_NC]
        of_biases = [dy_NC.sum(0) if biased else None for dy_NC, biased in zip(grads_NC, ctx.biased)]
        return wait(dx_nD), None, None, None, *of_weights, *of_biases


def embedding(tokens_BT: Tensor, weight_vD: Tensor, tp: Axis) -> Tensor:
    """The tokens' embeddings [B, T, D]; with tp, as own_tokens returns them. For a token outside the vocabulary
    F.embedding raises, as on one device."""
    if tp.size == 1:
        return F.embedding(tokens_BT, weight_vD)
    size = len(weight_vD)
    local_BT = tokens_BT - tp.index * size
    here = (local_BT >= 0) & (local_BT < size)
    outside = (tokens_BT < 0) | (tokens_BT >= size * tp.size)
    rows_BTD = F.embedding(torch.where(here, local_BT, torch.where(outside, size, 0)), weight_vD)
    return own_tokens(torch.where(here[..., None], rows_BTD, 0), tp)  # where, not a product: 0 · NaN is NaN


def linear_cross_entropy(
    hidden_1nD: Tensor, weight_vD: Tensor, targets_N: Tensor, weights_N: Tensor, tp: Axis
) -> Tensor:
    """Σ over tokens of weight · nll, a scalar, the same on every rank; the vocabulary is cut over tp. N = B·T.

    As kernels.cross_entropy.linear_cross_entropy; a target beyond the vocabulary makes the sum NaN.
    """
    nll_N = -token_log_probs(all_tokens(hidden_1nD, tp).squeeze(0), weight_vD, targets_N, tp)
    return (nll_N * torch.where(targets_N == cross_entropy.IGNORE, 0, weights_N).to(nll_N.dtype)).sum()


def known_rows(weight_vD: Tensor, tp: Axis, num_ids: int) -> Tensor:
    """This rank's rows of the head, only those of ids below num_ids (0: all). ValueError if no row is left."""
    first = tp.index * len(weight_vD)
    if num_ids and num_ids <= first:
        raise ValueError(f"a head of {num_ids} ids leaves no row for rank {tp.index} of tp={tp.size}")
    return weight_vD[: num_ids - first] if num_ids else weight_vD


def token_log_probs(hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, tp: Axis, num_ids: int = 0) -> Tensor:
    """log p(target) of each token over the whole vocabulary, the same on every rank; 0 where the target is IGNORE.

    hidden_ND: hidden states of all tokens. num_ids: ids from num_ids on get probability 0; 0 allows all ids. As
    kernels.cross_entropy.token_log_probs; a target beyond the vocabulary gives NaN.
    """
    known = known_rows(weight_vD, tp, num_ids)
    local = cross_entropy.lse_and_target(hidden_ND, known, targets_N, tp.index * len(weight_vD))
    lse_SN, target_SN = gather(torch.stack(local)[None], tp, 0).unbind(1)
    lse_N, target_N = cross_entropy.merge_shards(lse_SN, target_SN)
    ignored = targets_N == cross_entropy.IGNORE
    known = (targets_N >= 0) & (targets_N < (num_ids or len(weight_vD) * tp.size))
    return torch.where(ignored, 0.0, torch.where(known, target_N - lse_N, float("nan")))


def entropy(hidden_ND: Tensor, weight_vD: Tensor, tp: Axis, num_ids: int = 0) -> Tensor:
    """[N]: the entropy in nats of each token's distribution over the whole vocabulary, the same on every rank.

    No gradient. num_ids: as in token_log_probs.
    """
    lse_N, mean_N = cross_entropy.lse_and_mean_logit(hidden_ND, known_rows(weight_vD, tp, num_ids))
    if tp.size > 1:
        lse_SN, mean_SN = gather(torch.stack((lse_N, mean_N))[None], tp, 0).unbind(1)
        lse_N = lse_SN.logsumexp(0)
        mean_N = ((lse_SN - lse_N).exp() * mean_SN).sum(0)
    return lse_N - mean_N
