"""How a model runs; never what it computes."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.moe import EXPERT_FORMS

COMPILE_MODES = ("off", "block", "step")
FUSED = ("norm", "rotation", "swiglu")  # norms with their residual; norm and rotation of queries and keys; SwiGLU

# The faster by measurement on an H100 (kernels/bench): torch.compile fuses the formulas with what stands around them;
# without it every kernel wins. On a CPU the formulas run in any case.
_FASTEST = {"off": FUSED, "block": FUSED, "step": FUSED}


@dataclasses.dataclass(frozen=True)
class Execution:
    """
    Attributes:
      compile: "off"; "block" compiles one transformer block, used for all layers, where that can be (block_fn), and the
        update; "step" says that the caller compiles the whole step into one graph.
      attention: see qwen3f.model.attention.BACKENDS.
      experts: "grouped" or "reference", see qwen3f.model.moe.
      loss: "chunked" or "reference", see kernels.cross_entropy.
      kernels: which elementwise operators run our kernels on a GPU instead of the formulas: "auto", the faster by
        measurement, or a tuple of FUSED.
      invariant: what a token gets does not depend on the tokens beside it, bit for bit (qwen3f.model.invariant). Slow.
        For dense models, uncompiled, on one device or with their rows cut over dp.
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
            raise UserError("an invariant execution takes compile='off' and kernels=(), as model.INVARIANT has them")

    @property
    def backend(self) -> str:
        """Of attention."""
        return "invariant" if self.invariant else self.attention

    @property
    def fused(self) -> tuple[str, ...]:
        return _FASTEST[self.compile] if self.kernels == "auto" else self.kernels


def refuse_dropout(cfg: ModelConfig, execution: Execution) -> None:
    """Raises UserError for training with attention_dropout by an execution that has none."""
    if execution.invariant and cfg.attention_dropout:
        raise UserError(
            "config.attention=invariant has no dropout, and config.model.attention_dropout is "
            f"{cfg.attention_dropout}; write --config.model.attention_dropout=0, or --config.attention=auto"
        )


def refuse_vmap(execution: Execution, tensors: Iterable[Tensor]) -> None:
    """Raises UserError where torch.func.vmap goes over `tensors`: only REFERENCE's formulas can be mapped."""
    if torch.compiler.is_compiling() or execution.attention == "reference":
        return
    if any(_is_mapped(tensor) for tensor in tensors):
        raise UserError(
            "torch.func.vmap cannot go over the default kernels; give the model execution=model.REFERENCE, whose "
            "formulas compose with torch.func's transforms"
        )


def _is_mapped(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


EAGER = Execution()
# composes with torch.func.vmap, grad and jvp
REFERENCE = Execution(attention="reference", experts="reference", loss="reference", kernels=())
# a token's log-probability is the same in any batch, with a cache or without: training can take a rollout at its word
INVARIANT = Execution(invariant=True, kernels=())
