"""Divides the patches of a row among the ranks of cp and tp, which have the same rows: an equal run of patches each.

In the tower only attention needs other patches: it gathers the keys and values of all ranks. The backward pass of a
gather sums over ranks (sharding.collectives). So a rank's gradient of a weight is the part of its own patches; the step
sums these parts, as for every parameter that is replicated over an axis.
"""

import torch.nn.functional as F
from torch import Tensor

from sharding.axes import Axes
from sharding.collectives import gather, shard


def parts(axes: Axes) -> int:
    """The number of ranks that share the patches of a row."""
    return axes.cp.size * axes.tp.size


def fill_up(pixels_BPV: Tensor, axes: Axes, block: int) -> Tensor:
    """Pixels [B, P, V] with zero patches appended, so that each rank gets whole blocks of `block` patches."""
    return F.pad(pixels_BPV, (0, 0, 0, -pixels_BPV.shape[1] % (parts(axes) * block)))


def own_patches(x: Tensor, axes: Axes) -> Tensor:
    """This rank's patches of [B, P, …]: [B, P / parts, …]."""
    return shard(shard(x, axes.cp, 1), axes.tp, 1)


def all_patches(x: Tensor, axes: Axes) -> Tensor:
    """The inverse of own_patches: [B, P, …], the same on all ranks of cp and tp."""
    return gather(gather(x, axes.tp, 1), axes.cp, 1)
