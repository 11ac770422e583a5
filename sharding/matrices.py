"""Whole matrices from the shards of a parameter, for an optimizer that needs them, and back to shards.

The layers of a stack are shared out: over each axis that cuts the matrices, an all-to-all gives every rank the whole
matrices of some of the layers, so no two ranks of that axis compute the same. A matrix outside the stacks is gathered
on every rank. The experts of a layer are matrices of their own, so a cut of the experts' dimension stays.

L layers · R rows · C columns of a matrix
"""

import torch.nn.functional as F
from torch import Tensor

from sharding.axes import Axes
from sharding.collectives import gather, recut, shard
from sharding.rules import Placed


def whole_matrices(x: Tensor, placed: Placed, axes: Axes) -> Tensor:
    """[.., R, C] with whole matrices, from this rank's shard of a parameter; of a stack [L, .., R, C] some layers.

    If the layers do not divide, zeros are appended, so the last ranks may have layers of zeros.
    """
    for names, dim in matrix_cuts(placed, x.dim()):
        axis = axes.over(*names)
        x = recut(_padded(x, axis.size), axis, dim, 0) if placed.stack else gather(x, axis, dim)
    return x


def own_shard(whole: Tensor, placed: Placed, axes: Axes, layers: int) -> Tensor:
    """The inverse of whole_matrices. layers: size of the shard's first dimension, which for a stack is L."""
    cuts, sizes = [(axes.over(*names), dim) for names, dim in matrix_cuts(placed, whole.dim())], [layers]
    for axis, _ in cuts:
        sizes.append(-(-sizes[-1] // axis.size))
    for (axis, dim), size in zip(reversed(cuts), reversed(sizes[:-1])):
        whole = recut(whole, axis, 0, dim)[:size] if placed.stack else shard(whole, axis, dim)
    return whole


def matrix_cuts(placed: Placed, dims: int) -> list[tuple[tuple[str, ...], int]]:
    """(axes, dimension) of each cut through the last two of a parameter's `dims` dimensions."""
    cuts = [((axis,), dim) for axis, dim in placed.explicit] + [(placed.fsdp, placed.fsdp_dim)] * bool(placed.fsdp)
    return [(axes, dim) for axes, dim in cuts if dim >= dims - 2]


def _padded(x: Tensor, parts: int) -> Tensor:
    """x with zeros appended to its first dimension, so that it divides into `parts`."""
    more = -len(x) % parts
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, more)) if more else x
