"""One pre-norm transformer block, and the function of its parameters that runs it."""

import functools

import torch
from torch import Tensor, nn

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.attention import Attention, AttentionMask
from qwen3f.model.execution import Execution
from qwen3f.model.invariant import FixedRows
from qwen3f.model.kv_cache import PagedLayer
from qwen3f.model.mlp import SwiGLU
from qwen3f.model.moe import SparseMLP
from qwen3f.model.norm import RMSNorm
from qwen3f.params import LAYERS
from qwen3f.skeletons import LayerFn, layer_fn
from sharding.layout import ONE_DEVICE, Layout


class Block(nn.Module):
    """x + Attention(RMSNorm(x)), then x + MLP(RMSNorm(x)); x_BTD. A sparse block's MLP is a mixture of experts.

    Returns (x,), followed in a sparse block by the fields of RouterStats: a flat tuple of tensors, which checkpoint and
    compile pass on in every version. real_BT: bool, False for padding; only routers ask.
    """

    def __init__(self, cfg: ModelConfig, execution: Execution, sparse: bool, layout: Layout = ONE_DEVICE) -> None:
        super().__init__()
        fused, axes = execution.fused, layout.axes
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, "norm" in fused)
        self.self_attn = Attention(cfg, execution.backend, "rotation" in fused, axes)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, "norm" in fused)
        self.sparse = sparse
        self.mlp = SparseMLP(cfg, execution.experts, axes) if sparse else SwiGLU(cfg, "swiglu" in fused, axes)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask | PagedLayer,
        real_BT: Tensor | None,
        stream: Tensor | None,
    ) -> tuple[Tensor, ...]:
        a_BTD = self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, stream)
        h_BTD, x_BTD = self.post_attention_layernorm.add(a_BTD, x_BTD)
        if not self.sparse:
            return (x_BTD + self.mlp(h_BTD),)
        y_BTD, stats = self.mlp(h_BTD, real_BT)
        return x_BTD + y_BTD, *stats


@functools.lru_cache(maxsize=128)
def block_fn(
    cfg: ModelConfig, execution: Execution, sparse: bool, layout: Layout = ONE_DEVICE, gathered: bool = False
) -> LayerFn:
    """(layer parameters, x, cos, sin, mask, real, stream) -> as Block, for any layer of one kind: dense, or sparse.

    Layer parameters are this rank's shards; the function gathers what FSDP has cut, unless it has been `gathered`.

    Two kinds of block run uncompiled in any case: with experts over ep, whose splits the host must know, and under
    schedules that put off weights' gradients, past which compiled code would go.
    """
    if execution.invariant:
        _check_invariant(sparse, layout)
    # not by a transform: vmap lets no module draw its first weights, though these are thrown away
    with torch.device("meta"), torch._C._DisableFuncTorch():
        skeleton = Block(cfg, execution, sparse, layout)
    open_to_host = layout.pipeline.splits or (sparse and layout.axes.ep.size > 1)
    compiled = execution.compile == "block" and not open_to_host
    around = _fixed_rows if execution.invariant else None
    return layer_fn(skeleton, cfg, layout, LAYERS, gathered=gathered, compiled=compiled, around=around)


def _fixed_rows(run: LayerFn) -> LayerFn:
    def run_fixed(*args: object) -> tuple[Tensor, ...]:
        with FixedRows():
            return run(*args)

    return run_fixed


def _check_invariant(sparse: bool, layout: Layout) -> None:
    if sparse or any(axis.size > 1 for axis in (layout.axes.tp, layout.axes.cp, layout.axes.pp)):
        raise UserError(
            "model.INVARIANT takes dense models on one device or with their rows cut over dp; leave out tp, cp and pp, "
            "or use another execution"
        )
