"""Tensor parallelism: what a block does differently when its weights are cut over tp.

Column-parallel products (q, k, v, gate, up) see the whole sequence and make this rank's heads or columns;
row-parallel ones (o, down) make a part of the sum over all. Between blocks the residual stream is cut along the
sequence (Korthikanti et al. 2022, arXiv:2205.05198): gathered before the first, summed and cut again after the second.
Embedding, head and loss are cut along the vocabulary.

B batch · T sequence (t: this rank's part) · D hidden · V vocabulary (v: this rank's) · S ranks of tp
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cross_entropy
from sharding.axes import Axis
from sharding.collectives import gather, reduce_scatter


def whole_sequence(x_BtD: Tensor, tp: Axis) -> Tensor:
    """[B, T, D] for a column-parallel product; the gradients of all ranks' columns add up."""
    return gather(x_BtD, tp, 1)


def row_parallel(linear: nn.Linear, x: Tensor, tp: Axis) -> Tensor:
    """linear(x) where x [B, T, this rank's part] and the weight's columns are cut: [B, t, D]. The bias comes once."""
    if tp.size == 1:
        return linear(x)
    y_BtD = reduce_scatter(F.linear(x, linear.weight), tp, 1)
    return y_BtD if linear.bias is None else y_BtD + linear.bias


def kv_projection(linear: nn.Linear, x_BTD: Tensor, heads: int, tp: Axis) -> Tensor:
    """linear(x): the keys or values that this rank's queries need, [B, T, local heads · head_dim].

    heads: in the whole model. Where they are fewer than ranks, every rank holds all and several ranks use the same one.
    """
    if heads % tp.size == 0:
        return linear(x_BTD)
    size = len(linear.weight) // heads
    rows = (x.narrow(0, tp.index * heads // tp.size * size, size) for x in linear.parameters())
    return F.linear(x_BTD, *rows)


def embedding(tokens_BT: Tensor, weight_vD: Tensor, tp: Axis) -> Tensor:
    """Rows of the embedding, [B, t, D]. A token beyond the vocabulary is F.embedding's error, as on one device."""
    if tp.size == 1:
        return F.embedding(tokens_BT, weight_vD)
    size = len(weight_vD)
    local_BT = tokens_BT - tp.index * size
    here = (local_BT >= 0) & (local_BT < size)
    outside = (tokens_BT < 0) | (tokens_BT >= size * tp.size)
    rows_BTD = F.embedding(torch.where(here, local_BT, torch.where(outside, size, 0)), weight_vD)
    return reduce_scatter(rows_BTD * here[..., None], tp, 1)


def linear_cross_entropy(
    hidden_BtD: Tensor, weight_vD: Tensor, targets_N: Tensor, weights_N: Tensor, tp: Axis
) -> Tensor:
    """Σ weights · nll over the whole vocabulary, the same on every rank; N = B·T.

    As kernels.cross_entropy.linear_cross_entropy; a target beyond the vocabulary makes it NaN.
    """
    hidden_ND = gather(hidden_BtD, tp, 1).flatten(0, 1)
    local = cross_entropy.lse_and_target(hidden_ND, weight_vD, targets_N, tp.index * len(weight_vD))
    lse_SN, target_SN = gather(torch.stack(local)[None], tp, 0).unbind(1)
    lse_N, target_N = cross_entropy.merge_shards(lse_SN, target_SN)
    ignored = targets_N == cross_entropy.IGNORE
    known = ((targets_N >= 0) & (targets_N < len(weight_vD) * tp.size)) | ignored
    nll_N = torch.where(known, lse_N - target_N, float("nan"))
    return (nll_N * torch.where(ignored, 0, weights_N).to(nll_N.dtype)).sum()
