"""One pre-norm transformer block, and how it runs: through functional_call, recomputed or not, compiled or not."""

import functools
from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import flash_attention, fused_experts, grouped_gemm, moe_dispatch
from qwen3f.compilation import compile_static
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
from sharding.fsdp import make_gather
from sharding.layout import ONE_DEVICE, Layout
from sharding.ring import RING_ATTENTION

BlockFn = Callable[..., tuple[Tensor, ...]]

# What "selective" recomputation keeps: the outputs of matrix products (experts' included) and of attention, and the
# router's choice and order, which are small. Everything else is elementwise and cheaper to compute again than to keep.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    flash_attention.FLASH_ATTENTION,
    fused_experts.EXPERTS_MLP,
    grouped_gemm.GROUPED_LINEAR,
    moe_dispatch.PLAN,
    RING_ATTENTION,
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.stable,
    # what ranks have sent each other, except weights and tokens, which are gathered again
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
_GATHERED = {
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default,
}


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
) -> BlockFn:
    """(layer parameters, x, cos, sin, mask, real, stream) -> as Block, for any layer of one kind: dense, or sparse.

    Layer parameters are this rank's shards; the function gathers what FSDP has cut, unless it has been `gathered`.

    The skeleton lives on the meta device and owns nothing. Cached, since the compiled function is: every layer of a
    kind and every step of a run go through the same one. Recomputation sits inside the compiled region, where its
    policy sees the operators. Two kinds of block run uncompiled in any case: with experts over ep, whose splits the
    host must know, and under schedules that put off weights' gradients, past which compiled code would go.
    """
    if execution.invariant:
        _check_invariant(sparse, layout)
    # not by a transform: vmap lets no module draw its first weights, though these are thrown away
    with torch.device("meta"), torch._C._DisableFuncTorch():
        skeleton = Block(cfg, execution, sparse, layout)
    whole = make_gather(layout.place(cfg), layout.axes, stack=LAYERS, dtype=layout.gather_dtype)

    def block(layer: dict[str, Tensor], *args: object) -> tuple[Tensor, ...]:
        return torch.func.functional_call(skeleton, layer if gathered else whole(layer), args, strict=True)

    if execution.invariant:
        block = _fixed_rows(block)
    policy = cfg.gradient_checkpointing
    fn = block if policy == "none" else _recomputed(block, policy, _KEPT if layout.reshard else _KEPT | _GATHERED)
    open_to_host = layout.pipeline.splits or (sparse and layout.axes.ep.size > 1)
    compiled = execution.compile == "block" and not open_to_host
    return compile_static(fn) if compiled else fn


def _fixed_rows(run: BlockFn) -> BlockFn:
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


def _recomputed(run: BlockFn, policy: str, kept: Set[object]) -> BlockFn:
    def keep(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"use_reentrant": False, "preserve_rng_state": False}  # the block's only randomness is its stream
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)

    @functools.wraps(run)
    def run_again(*args: object) -> tuple[Tensor, ...]:
        return checkpoint(run, *args, **options)

    return run_again
