"""How a layer's skeleton runs as a function of its parameters: gathered, recomputed or not, compiled or not.

A skeleton is a module on the meta device that owns nothing. The language model's blocks and the vision tower's are
skeletons alike.
"""

import functools
from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import flash_attention, fused_experts, grouped_gemm, moe_dispatch
from qwen3f.compilation import compile_static
from qwen3f.config import ModelConfig
from sharding.fsdp import make_gather
from sharding.layout import Layout
from sharding.ring import RING_ATTENTION

LayerFn = Callable[..., tuple[Tensor, ...]]

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


def layer_fn(
    skeleton: nn.Module,
    cfg: ModelConfig,
    layout: Layout,
    stack: str,
    *,
    gathered: bool = False,
    compiled: bool = False,
    around: Callable[[LayerFn], LayerFn] | None = None,
) -> LayerFn:
    """(a layer's parameters, *args) -> skeleton(*args) with them, for any layer of a stack (ParamSpec.stack).

    Parameters are this rank's shards, by their names in the skeleton; the function gathers what FSDP has cut, unless it
    has been `gathered`. around: what to put around it, within recomputation. Recomputation, by
    cfg.gradient_checkpointing, sits inside the compiled region, where its policy sees the operators. Keep the function:
    compiled code is its own.
    """
    whole = make_gather(layout.place(cfg), layout.axes, stack=stack, dtype=layout.gather_dtype)

    def block(layer: dict[str, Tensor], *args: object) -> tuple[Tensor, ...]:
        return torch.func.functional_call(skeleton, layer if gathered else whole(layer), args, strict=True)

    if around is not None:
        block = around(block)
    policy = cfg.gradient_checkpointing
    fn = block if policy == "none" else _recomputed(block, policy, _KEPT if layout.reshard else _KEPT | _GATHERED)
    return compile_static(fn) if compiled else fn


def _recomputed(run: LayerFn, policy: str, kept: Set[object]) -> LayerFn:
    def keep(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"use_reentrant": False, "preserve_rng_state": False}  # the block's only randomness is its stream
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)

    @functools.wraps(run)
    def run_again(*args: object) -> tuple[Tensor, ...]:
        return checkpoint(run, *args, **options)

    return run_again
