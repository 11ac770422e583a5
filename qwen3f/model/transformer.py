"""The language model as a pure function: tokens through embedding, blocks, final norm and head.

B batch · T sequence · D hidden · V vocabulary · L layers
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.attention import make_mask
from qwen3f.model.block import block_fn
from qwen3f.model.norm import rms_norm
from qwen3f.model.rope import rope_tables

COMPILE_MODES = ("off", "block", "step")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model runs; never what it computes.

    compile: "off"; "block" compiles one transformer block, used for all layers; "step" says that the caller compiles
      the whole step into one graph.
    attention: see qwen3f.model.attention.BACKENDS.
    loss: "chunked" or "reference", see kernels.cross_entropy.
    """

    compile: str = "off"
    attention: str = "auto"
    loss: str = "chunked"

    def __post_init__(self) -> None:
        if self.compile not in COMPILE_MODES:
            raise UserError(f"compile mode {self.compile!r} is unknown; use one of {', '.join(COMPILE_MODES)}")
        if self.loss not in ("chunked", "reference"):
            raise UserError(f"loss {self.loss!r} is unknown; use chunked or reference")


EAGER = Execution()
REFERENCE = Execution(attention="reference", loss="reference")  # composes with torch.func.vmap, grad and jvp


class ModelOutput(NamedTuple):
    """logits [B, T, V] in the parameters' dtype; hidden [B, T, D] after the final norm."""

    logits: Tensor
    hidden: Tensor


Forward = Callable[..., Tensor]


def apply(
    cfg: ModelConfig,
    params: P.Params,
    batch: Mapping[str, Tensor],
    execution: Execution = EAGER,
    dropout_stream: Tensor | None = None,
) -> ModelOutput:
    """Logits for a batch.

    Args:
      params: as qwen3f.params.init_params gives them. Their dtype is the compute dtype. A stacked leaf may also come
        as a tuple of its layers.
      batch: "tokens" int64 [B, T]; optional "positions" int64 [B, T] (default 0 … T−1) and "segments" int32 [B, T]
        (default: one document a row). Other keys are ignored.
      dropout_stream: int64 scalar tensor; attention_dropout applies exactly when it is given.
    Raises UserError for sparse or vision configurations, IndexError (CPU) for a token beyond the vocabulary.
    """
    hidden = make_forward(cfg, execution, dropout=dropout_stream is not None)(params, batch, dropout_stream)
    return ModelOutput(F.linear(hidden, head_weight(cfg, params)), hidden)


def make_forward(cfg: ModelConfig, execution: Execution = EAGER, *, dropout: bool = False) -> Forward:
    """forward(params, batch, dropout_stream=None) -> the residual stream after the final norm, [B, T, D].

    Skeletons are built here, once, since that cannot happen inside a compiled step. dropout: whether the function will
    be called with a dropout_stream; attention with dropout runs the reference formula. Arguments as in `apply`.
    """
    backend = "reference" if dropout and cfg.attention_dropout else execution.attention
    block = block_fn(cfg, backend, execution.compile == "block")
    compiled = execution.compile != "off"

    def forward(params: P.Params, batch: Mapping[str, Tensor], dropout_stream: Tensor | None = None) -> Tensor:
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = F.embedding(tokens, params[P.EMBED])
        cos, sin = rope_tables(cfg, positions, x.dtype)
        mask = make_mask(batch.get("segments"), backend, compiled)
        for index, layer in enumerate(unstack_layers(params, cfg.num_hidden_layers)):
            stream = None if dropout_stream is None else rng.fold(dropout_stream, index)
            x = block(layer, x, cos, sin, mask, stream)
        return rms_norm(x, params[P.FINAL_NORM], cfg.rms_norm_eps)

    return forward


def head_weight(cfg: ModelConfig, params: P.Params) -> Tensor:
    return params[P.EMBED] if cfg.tie_word_embeddings else params[P.HEAD]


def unstack_layers(params: P.Params, num_layers: int) -> list[dict[str, Tensor]]:
    """Per-layer parameter dicts, names relative to the block.

    One unbind a leaf: indexing a stack layer by layer makes its backward write zeros of the whole stack every time.
    """
    stacked = {
        path.removeprefix(P.LAYERS): leaf.unbind(0) if isinstance(leaf, Tensor) else leaf
        for path, leaf in params.items()
        if path.startswith(P.LAYERS)
    }
    return [{name: rows[i] for name, rows in stacked.items()} for i in range(num_layers)]
