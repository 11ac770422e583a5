"""How a program is spread over a mesh: what the model's functions take to know their rank's share."""

import dataclasses
import functools

import torch

from qwen3f.config import ModelConfig
from sharding import rules
from sharding.axes import ONE, Axes
from sharding.stages import Pipeline

_ONE_STAGE = Pipeline()


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    Attributes:
      axes: this rank's view of the mesh.
      fsdp: cut weights, gradients and optimizer state over the axes that cut the tokens; else they are replicated.
      reshard: where a block is recomputed selectively, gather its weights once more in the backward pass instead of
        keeping them. Recomputed in full, it always gathers them again; without recomputation it always keeps them.
      pipeline: the schedule over pp.
      gather_dtype: what FSDP gathers weights in, where they are given in the master dtype; gradients are then summed
        over ranks in that, at twice the traffic of a sum in bfloat16. None: weights are given in the dtype they compute
        in, and so are the sums.
    """

    axes: Axes = ONE
    fsdp: bool = True
    reshard: bool = True
    pipeline: Pipeline = _ONE_STAGE
    gather_dtype: torch.dtype | None = None

    def place(self, cfg: ModelConfig) -> dict[str, rules.Placed]:
        """Where the model's parameters live; errors as rules.place."""
        return _place(cfg, self)


@functools.lru_cache(maxsize=32)
def _place(cfg: ModelConfig, layout: Layout) -> dict[str, rules.Placed]:
    return rules.place(cfg, layout.axes.shape, layout.fsdp)


ONE_DEVICE = Layout()
