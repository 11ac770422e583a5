"""How the ranks that share a batch's rows share out their patches: those of cp and of tp, each an equal run of a row.

Everything in the tower but attention works on patches alone; attention gathers the keys and values of all. Gradients
come back summed over the ranks (sharding.collectives), so that each rank's gradient of a weight is its own patches'
part, which the step sums as for every leaf that is replicated over an axis.
"""

import torch.nn.functional as F
from torch import Tensor

from sharding.axes import Axes
from sharding.collectives import gather, shard


def parts(axes: Axes) -> int:
    """How many ranks share a row's patches."""
    return axes.cp.size * axes.tp.size


def fill_up(pixels_BPV: Tensor, axes: Axes, block: int) -> Tensor:
    """With so many zero patches that each rank gets whole blocks; they are beyond all grids."""
    return F.pad(pixels_BPV, (0, 0, 0, -pixels_BPV.shape[1] % (parts(axes) * block)))


def own_patches(x: Tensor, axes: Axes) -> Tensor:
    """This rank's run of [B, P, …]."""
    return shard(shard(x, axes.cp, 1), axes.tp, 1)


def all_patches(x: Tensor, axes: Axes) -> Tensor:
    """The inverse: [B, P, …], the same on all ranks of cp and tp."""
    return gather(gather(x, axes.tp, 1), axes.cp, 1)
