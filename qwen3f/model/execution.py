"""How a model runs (compilation, kernels). An Execution never changes which function the model computes."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.moe import EXPERT_FORMS

COMPILE_MODES = ("off", "block", "step")

# Kernels that can replace formulas: norms with their residual; norm and rotation of queries and keys; SwiGLU. On an
# H100 each is faster than its formula in every compile mode (kernels/bench). On a CPU the formulas always run.
FUSED = ("norm", "rotation", "swiglu")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs.

    Attributes:
      compile: "off"; "block" compiles one transformer block, which all layers use (exceptions: block_fn), and the
        update; "step" means that the caller compiles the whole step into one graph.
      attention: see qwen3f.model.attention.BACKENDS.
      experts: "grouped" or "reference", see qwen3f.model.moe.
      loss: "chunked" or "reference", see kernels.cross_entropy.
      kernels: the elementwise operators that run our kernels on a GPU instead of the formulas: a tuple of names from
        FUSED, or "auto" for those that measured faster.
      invariant: a token's result does not depend on the rest of the batch, bit for bit (qwen3f.model.invariant). Slow.
        For dense models, uncompiled, on one device or over dp.
    """

    compile: str = "off"
    attention: str = "auto"
    experts: str = "grouped"
    loss: str = "chunked"
    kernels: str | tuple[str, ...] = "auto"
    invariant: bool = False

    def __post_init__(self) -> None:
        if self.compile not in COMPILE_MODES:
            raise UserError(f"compile mode {self.compile!r} is unknown; use one of {', '.join(COMPILE_MODES)}")
        if self.experts not in EXPERT_FORMS:
            raise UserError(f"experts {self.experts!r} is unknown; use {' or '.join(EXPERT_FORMS)}")
        if self.loss not in ("chunked", "reference"):
            raise UserError(f"loss {self.loss!r} is unknown; use chunked or reference")
        if self.kernels != "auto" and not set(self.kernels) <= set(FUSED):
            raise UserError(f"kernels {self.kernels!r} are unknown; use auto or some of {', '.join(FUSED)}")
        if self.invariant and (self.compile != "off" or self.fused):
            raise UserError("an invariant execution needs compile='off' and kernels=(); use model.INVARIANT")

    @property
    def backend(self) -> str:
        """The attention backend."""
        return "invariant" if self.invariant else self.attention

    @property
    def fused(self) -> tuple[str, ...]:
        return FUSED if self.kernels == "auto" else self.kernels


def refuse_dropout(cfg: ModelConfig, execution: Execution) -> None:
    """UserError for training with attention_dropout by an invariant execution."""
    if execution.invariant and cfg.attention_dropout:
        raise UserError(
            "config.attention=invariant has no dropout, but config.model.attention_dropout is "
            f"{cfg.attention_dropout}; write --config.model.attention_dropout=0, or --config.attention=auto"
        )


def refuse_vmap(execution: Execution, tensors: Iterable[Tensor]) -> None:
    """UserError if one of `tensors` is batched by torch.func.vmap, which only REFERENCE's formulas support."""
    if torch.compiler.is_compiling() or execution.attention == "reference":
        return
    if any(_is_mapped(tensor) for tensor in tensors):
        raise UserError(
            "torch.func.vmap does not work with the default kernels; use execution=model.REFERENCE, whose formulas "
            "work with torch.func's transforms"
        )


def _is_mapped(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


EAGER = Execution()
# works with torch.func.vmap, grad and jvp; grad without recomputation, as torch's hooks for it do not
REFERENCE = Execution(attention="reference", experts="reference", loss="reference", kernels=())
# A token's log-probability is the same in any batch, with or without a cache, so training gets exactly a rollout's.
INVARIANT = Execution(invariant=True, kernels=())
