"""How a program is spread over a mesh. The model's functions take a Layout to know which part is this rank's."""

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
      fsdp: cut weights, gradients and optimizer state over dp, ep and cp; otherwise they are replicated over these
        axes. Over dr they are always replicated.
      reshard: only for blocks under selective recomputation: gather the weights again in the backward pass instead of
        keeping them. Full recomputation always gathers them again; without recomputation they are always kept.
      pipeline: the schedule over pp.
      gather_dtype: the compute dtype, when the step is given weights in the master dtype: FSDP casts them to it before
        it gathers them. Gradients are then summed over ranks in the master dtype (float32: twice the traffic of
        bfloat16). None: the step is given weights in the compute dtype, and gradients are summed in it.
    """

    axes: Axes = ONE
    fsdp: bool = True
    reshard: bool = True
    pipeline: Pipeline = _ONE_STAGE
    gather_dtype: torch.dtype | None = None

    def place(self, cfg: ModelConfig) -> dict[str, rules.Placed]:
        """Path -> how the parameter is cut (rules.place, with its errors)."""
        return _place(cfg, self)


def find_gather_dtype(reduce: str, compute_dtype: torch.dtype) -> torch.dtype | None:
    """Layout.gather_dtype for config.fsdp.reduce, the dtype of gradient sums. UserError for an unknown value."""
    if reduce not in ("compute", "float32"):
        raise UserError(
            f"config.fsdp.reduce={reduce!r} is unknown; write compute, to sum gradients over ranks in the compute "
            "dtype, or float32"
        )
    return compute_dtype if reduce == "float32" else None


@functools.lru_cache(maxsize=32)
def _place(cfg: ModelConfig, layout: Layout) -> dict[str, rules.Placed]:
    return rules.place(cfg, layout.axes.shape, layout.fsdp)


ONE_DEVICE = Layout()
