"""Runs a layer's skeleton as a function of its parameters, with gathering, recomputation and compilation as configured.

A skeleton is a module on the meta device, without weights of its own. The blocks of the language model and of the
vision tower are skeletons.
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

# Operators whose outputs "selective" recomputation keeps: matrix products (also of experts), attention, and the
# router's choice and order, which are small. Everything else is elementwise, and cheaper to recompute than to keep.
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
    # communication between ranks, except weights and tokens, which are gathered again
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
    """fn(a layer's parameters, *args) -> skeleton(*args) with these parameters, for any layer of a stack.

    Parameters are this rank's shards, keyed by their names in the skeleton. The function gathers the ones that FSDP has
    cut; gathered=True: the caller has done so. stack: as in ParamSpec.stack. around: wraps the function inside the
    recomputed region. Recomputation (cfg.gradient_checkpointing) is inside the compiled region, where its policy sees
    the operators. Call layer_fn once and keep the function: each one has its own compiled code.
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

    options = {"use_reentrant": False, "preserve_rng_state": False}  # a block's random numbers come from its stream
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)

    @functools.wraps(run)
    def run_again(*args: object) -> tuple[Tensor, ...]:
        return checkpoint(run, *args, **options)

    return run_again
