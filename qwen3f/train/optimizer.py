"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and global-norm clipping, as pure functions of pytrees.

Arithmetic follows torch.optim.AdamW. Compiled, the formula becomes one kernel a leaf: gradient, clip factor, both
moments and the parameter are read once and written once. Uncompiled, torch's fused AdamW kernel does the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.params import Params


@dataclasses.dataclass(frozen=True)
class AdamW:
    """b1, b2, eps as in the paper; weight_decay is decoupled and scaled by the learning rate; clip_norm 0: no clip."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("eps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0.0:
                raise UserError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")


class AdamWState(NamedTuple):
    """First and second moments, in the parameters' structure and dtype."""

    m: Params
    v: Params


class _Scalars(NamedTuple):
    """What one update depends on beside the trees; see `update`."""

    step: Tensor
    lr: Tensor
    scale: Tensor
    apply: Tensor


def init(params: Params) -> AdamWState:
    return AdamWState(*({path: torch.zeros_like(p) for path, p in params.items()} for _ in range(2)))


def global_norm(grads: Params) -> Tensor:
    """√Σ‖g‖² over all leaves, float32 (float64 for float64 gradients)."""
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in grads.values()]
    return torch.stack(squares).sum().sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients with so that their norm is at most max_norm (torch's clip_grad_norm_ formula)."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)


def update(
    hyper: AdamW,
    decay: Mapping[str, bool],
    params: Params,
    grads: Params,
    state: AdamWState,
    *,
    step: Tensor,
    lr: Tensor,
    scale: Tensor,
    apply: Tensor,
) -> tuple[Params, AdamWState]:
    """One AdamW step; the arguments are left as they are.

    Args:
      decay: path -> whether weight decay applies (ParamSpec.decay).
      step: updates done before this one, an integer scalar tensor. lr, scale (the gradients' factor): scalar tensors.
      apply: bool scalar tensor; where False everything is returned unchanged, decided on the device.
    """
    at = _Scalars(step, lr, scale, apply)
    if torch.compiler.is_compiling():
        return _formula(hyper, decay, params, grads, state, at)
    copies = [{path: x.clone() for path, x in tree.items()} for tree in (params, *state)]
    _fused(hyper, decay, copies, grads, at)
    return copies[0], AdamWState(*copies[1:])


def _formula(
    hyper: AdamW,
    decay: Mapping[str, bool],
    params: Params,
    grads: Params,
    state: AdamWState,
    at: _Scalars,
) -> tuple[Params, AdamWState]:
    step, lr, scale, apply = at
    count = (step + 1).to(torch.float64)
    correct_m, correct_v = 1.0 - hyper.b1**count, 1.0 - hyper.b2**count
    new_params, new_m, new_v = {}, {}, {}
    for path, p in params.items():
        g = grads[path].to(p.dtype) * scale.to(p.dtype)
        m = state.m[path] + (1.0 - hyper.b1) * (g - state.m[path])
        v = hyper.b2 * state.v[path] + (1.0 - hyper.b2) * g * g
        shrink = 1.0 - lr * (hyper.weight_decay if decay[path] else 0.0)
        denominator = (v / correct_v.to(p.dtype)).sqrt() + hyper.eps
        new = p * shrink.to(p.dtype) - (lr / correct_m).to(p.dtype) * m / denominator
        new_params[path] = torch.where(apply, new, p)
        new_m[path] = torch.where(apply, m, state.m[path])
        new_v[path] = torch.where(apply, v, state.v[path])
    return new_params, AdamWState(new_m, new_v)


def _fused(
    hyper: AdamW,
    decay: Mapping[str, bool],
    trees: list[Params],
    grads: Params,
    at: _Scalars,
) -> None:
    """In place on trees = [params, m, v]: the kernel behind torch.optim.AdamW(fused=True)."""
    step, lr, scale, apply = at
    withhold = (~apply).to(torch.float32)
    count = (step + 1).to(torch.float32)
    # On CUDA the kernel reads a float32 rate from the device, without a sync; on the CPU a number costs nothing.
    rate = lr.to(torch.float32) if lr.is_cuda else lr.item()
    for decays in (True, False):
        paths = [path for path in trees[0] if decay[path] == decays]
        leaves = [[tree[path] for path in paths] for tree in trees]
        torch._fused_adamw_(
            leaves[0],
            [grads[path].to(p.dtype) * scale.to(p.dtype) for path, p in zip(paths, leaves[0])],
            leaves[1],
            leaves[2],
            [],
            [count] * len(paths),
            lr=rate,
            beta1=hyper.b1,
            beta2=hyper.b2,
            weight_decay=hyper.weight_decay if decays else 0.0,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=withhold,
        )
