"""How a program is spread over a mesh: what the model's functions take to know their rank's share."""

import dataclasses
import functools

import torch

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from sharding import rules
from sharding.axes import ONE, Axes
from sharding.pipeline.cut import Pipeline

_ONE_STAGE = Pipeline()


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    Attributes:
      axes: this rank's view of the mesh.
      fsdp: cut weights, gradients and optimizer state over dp, ep and cp; else they are replicated there. Over dr they
        always are.
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


def find_gather_dtype(reduce: str, compute_dtype: torch.dtype) -> torch.dtype | None:
    """Layout.gather_dtype by config.fsdp.reduce: what gradients are summed in, compute or float32. Raises UserError."""
    if reduce not in ("compute", "float32"):
        raise UserError(
            f"config.fsdp.reduce={reduce!r}: write compute, to sum gradients in the forward pass's dtype, or float32"
        )
    return compute_dtype if reduce == "float32" else None


@functools.lru_cache(maxsize=32)
def _place(cfg: ModelConfig, layout: Layout) -> dict[str, rules.Placed]:
    return rules.place(cfg, layout.axes.shape, layout.fsdp)


ONE_DEVICE = Layout()
