"""Tensor-parallel generation: which models can be split, and how ranks agree on tokens and sizes.

Every rank runs the same engine with the same requests. A rank has its shards of the weights by the placement table
(sharding.rules), the cache of its own key/value heads and the logits of its own ids. All decisions on the host use only
numbers that are equal on all ranks, so all ranks launch the same passes in the same order.

B rows · V vocabulary (v: this rank's)
"""

import dataclasses
import math

import torch
from torch import Tensor

from kernels.decode_ends import pack
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer.passes import Drawn
from sharding.axes import Axes, Axis
from sharding.collectives import gather, stack_now
from sharding.layout import ONE_DEVICE, Layout
from sharding.mesh import divisors


def generation_layout(cfg: ModelConfig, tp: Axis) -> Layout:
    """The layout of parameters and passes over tp. Raises UserError for a model that tp ranks cannot share."""
    if tp.size == 1:
        return ONE_DEVICE
    check(cfg, tp.size)
    return Layout(Axes(tp=dataclasses.replace(tp, whole=True)), fsdp=False)


def check(cfg: ModelConfig, size: int) -> None:
    """Raises UserError for a model that `size` ranks cannot share."""
    counts = {"key/value heads": cfg.num_key_value_heads, "ids of the vocabulary": cfg.vocab_size}
    if cfg.dense_layers:
        counts["columns of the MLP"] = cfg.intermediate_size
    if cfg.sparse_layers:
        counts["columns of an expert"] = cfg.moe_intermediate_size
    uncut = [f"{count} {name}" for name, count in counts.items() if count % size]
    if uncut:
        common = math.gcd(*counts.values())
        sizes = [f"tp{n}" for n in divisors(common)]
        raise UserError(
            f"tp={size} does not divide the model's {', '.join(uncut)}; write --config.mesh={' or '.join(sizes)}"
        )


def whole_logits(logits_Bv: Tensor, tp: Axis) -> Tensor:
    """The logits of all ranks, [B, V]."""
    return gather(logits_Bv, tp, 1)


def agreed(drawn: Drawn, tp: Axis) -> Drawn:
    """Rank 0's draws. GPUs may round a sum differently; with different tokens the ranks would no longer do the same."""
    if tp.size == 1:
        return drawn
    ids, log_probs, finite = stack_now(pack(*drawn), tp)[0]
    return Drawn(ids.long(), log_probs.to(drawn.log_probs.dtype), finite > 0)


def smallest(number: int, tp: Axis, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    return number if tp.size == 1 else int(stack_now(torch.tensor([number], device=device), tp).min())
