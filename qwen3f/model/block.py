"""One pre-norm transformer block, as a module without parameters and as a pure function of its parameters."""

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

    Returns (x,), in a sparse block followed by the fields of RouterStats. It is a flat tuple of tensors, because
    checkpoint and compile support that in every torch version. real_BT: bool, False for padding; used by routers only.
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
    """(layer parameters, x, cos, sin, mask, real, stream) -> Block's outputs, for all dense or all sparse layers.

    Layer parameters are this rank's shards. The function gathers those that FSDP has cut, unless `gathered` says that
    they are whole already.

    Two kinds of block are never compiled: blocks with experts over ep, because the host must know the splits; and
    blocks under schedules that defer weights' gradients, because compiled code does not call the deferring F.linear.
    """
    if execution.invariant:
        _check_invariant(sparse, layout)
    # outside torch.func's transforms: under vmap a module may not initialise its weights, even on the meta device
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
            "model.INVARIANT takes dense models only, on one device or over dp; leave out experts, tp, cp and pp, or "
            "use another execution"
        )
