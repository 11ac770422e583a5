"""The optimizer's update and global-norm clipping, as pure functions of pytrees.

AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) follows torch.optim.AdamW. Compiled, the formula becomes one kernel
a leaf: gradient, clip factor, both moments and the parameter are read once and written once. Uncompiled, torch's fused
AdamW kernel does the same. Muon, for matrices, is in qwen3f.train.muon.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.params import Params
from qwen3f.train import muon
from sharding.axes import ONE, Axes
from sharding.fsdp import sum_over_shards
from sharding.rules import Placed


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


@dataclasses.dataclass(frozen=True)
class Muon(AdamW):
    """Muon for what weight decay applies to (matrices and an untied head), AdamW with the fields above for the rest.

    momentum, iterations: see qwen3f.train.muon. update_rms: root mean square of a Muon update, relative to the learning
    rate; 0.2 is about AdamW's.
    """

    momentum: float = 0.95
    update_rms: float = 0.2
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        if self.update_rms <= 0.0 or self.iterations < 1:
            raise UserError(
                f"optimizer.update_rms={self.update_rms} and optimizer.iterations={self.iterations} must be positive"
            )


ADAMW = AdamW()
KINDS: dict[str, type[AdamW]] = {"adamw": AdamW, "muon": Muon}


class OptimizerState(NamedTuple):
    """m: first moment (AdamW) or momentum (Muon) of every path; v: second moment of AdamW's. The parameters' dtype."""

    m: Params
    v: Params


class _Scalars(NamedTuple):
    """What one update depends on beside the trees; see `update`."""

    step: Tensor
    lr: Tensor
    scale: Tensor
    apply: Tensor


def make(kind: str, **fields: float) -> AdamW:
    """The hyperparameters of an optimizer by its name; fields that only another one has are left out."""
    if kind not in KINDS:
        raise UserError(f"optimizer.kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    own = {field.name for field in dataclasses.fields(KINDS[kind])}
    return KINDS[kind](**{name: value for name, value in fields.items() if name in own})


def by_muon(hyper: AdamW, decay: Mapping[str, bool]) -> frozenset[str]:
    """The paths that Muon updates."""
    return frozenset(path for path, decays in decay.items() if decays and isinstance(hyper, Muon))


def init(hyper: AdamW, decay: Mapping[str, bool], params: Params) -> OptimizerState:
    """Zero moments. decay: path -> whether weight decay applies (ParamSpec.decay)."""
    matrices = by_muon(hyper, decay)
    m = {path: torch.zeros_like(p) for path, p in params.items()}
    return OptimizerState(m, {path: torch.zeros_like(p) for path, p in params.items() if path not in matrices})


def global_norm(grads: Params, placed: Mapping[str, Placed] | None = None, axes: Axes = ONE) -> Tensor:
    """√Σ‖g‖² over all leaves, float32 (float64 for float64 gradients). placed: how shards are cut on a mesh."""
    squares = {path: g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for path, g in grads.items()}
    total = torch.stack([*squares.values()]).sum() if placed is None else sum_over_shards(squares, placed, axes)
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients with so that their norm is at most max_norm (torch's clip_grad_norm_ formula)."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)


def update(
    hyper: AdamW,
    decay: Mapping[str, bool],
    params: Params,
    grads: Params,
    state: OptimizerState,
    *,
    step: Tensor,
    lr: Tensor,
    scale: Tensor,
    apply: Tensor,
) -> tuple[Params, OptimizerState]:
    """One step of the optimizer; the arguments are left as they are.

    Args:
      decay: path -> whether weight decay applies (ParamSpec.decay).
      step: updates done before this one, an integer scalar tensor. lr, scale (the gradients' factor): scalar tensors.
      apply: bool scalar tensor; where False everything is returned unchanged, decided on the device.
    """
    at = _Scalars(step, lr, scale, apply)
    matrices = by_muon(hyper, decay)
    rest = {path: p for path, p in params.items() if path not in matrices}
    if torch.compiler.is_compiling():
        new, m, v = _formula(hyper, decay, rest, grads, state, at)
    else:
        new, m, v = ({path: tree[path].clone() for path in rest} for tree in (params, *state))
        _fused(hyper, decay, [new, m, v], grads, at)
    if isinstance(hyper, Muon):
        old = [{path: tree[path] for path in params if path in matrices} for tree in (params, state.m)]
        got = muon.update(
            old[0],
            grads,
            old[1],
            lr=lr,
            scale=scale,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            update_rms=hyper.update_rms,
            iterations=hyper.iterations,
        )
        for tree, before, after in zip((new, m), old, got):
            tree.update({path: torch.where(apply, after[path], before[path]) for path in before})
    # in the order of params: a state keeps its structure from step to step
    return {path: new[path] for path in params}, OptimizerState({path: m[path] for path in params}, v)


def _formula(
    hyper: AdamW,
    decay: Mapping[str, bool],
    params: Params,
    grads: Params,
    state: OptimizerState,
    at: _Scalars,
) -> tuple[Params, Params, Params]:
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
    return new_params, new_m, new_v


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
