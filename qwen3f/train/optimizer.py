"""The optimizer's update and global-norm clipping, as pure functions of pytrees.

AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) follows torch.optim.AdamW. Compiled, the formula becomes one kernel
per leaf, which reads and writes every tensor once. Uncompiled, torch's fused AdamW kernel does the same. Muon, for
matrices, is in qwen3f.train.muon.

AdamW.rates gives factors of the learning rate by patterns of paths. Factor 0 freezes a parameter: it has no gradient,
no moments and no weight decay, and does not count in the gradient norm.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.params import Params
from qwen3f.train import muon
from qwen3f.train.hyper import AdamW, Muon
from sharding.axes import ONE, Axes
from sharding.fsdp import sum_over_shards
from sharding.rules import Placed


class OptimizerState(NamedTuple):
    """m: path -> first moment (AdamW) or momentum (Muon), for every trainable path. v: path -> second moment, for
    paths that AdamW updates. Both have the parameters' dtype."""

    m: Params
    v: Params


class Rule(NamedTuple):
    """How one leaf is updated. decays: with weight decay. rate: as AdamW.rate. muon: by Muon, else by AdamW."""

    decays: bool
    rate: float
    muon: bool


class Scalars(NamedTuple):
    """The scalar tensors that an update depends on.

    step: updates done before this one, an integer. lr: the learning rate. scale: the gradients' factor. apply: bool; if
    False, parameters and moments are returned unchanged (decided on the device, without a sync).
    """

    step: Tensor
    lr: Tensor
    scale: Tensor
    apply: Tensor


def check_rates(hyper: AdamW, paths: Iterable[str]) -> None:
    """UserError for a pattern that matches no path, and if all parameters are frozen."""
    paths = list(paths)
    for pattern, _ in hyper.rates:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(
                f"--config.optimizer.rates: {pattern!r} matches none of the model's parameters; write a regular "
                f"expression for whole paths, such as {paths[0]} or {paths[len(paths) // 2]}"
            )
    if not trainable(hyper, paths):
        raise UserError("--config.optimizer.rates freezes every parameter; leave at least one to train")


def trainable(hyper: AdamW, paths: Iterable[str]) -> frozenset[str]:
    """The paths that are not frozen."""
    return frozenset(path for path in paths if hyper.rate(path))


def by_muon(hyper: AdamW, decay: Mapping[str, bool]) -> frozenset[str]:
    """The paths that Muon updates."""
    return frozenset(path for path in trainable(hyper, decay) if decay[path] and isinstance(hyper, Muon))


def leaf_rules(hyper: AdamW, decay: Mapping[str, bool]) -> dict[str, Rule]:
    """path -> Rule. decay: path -> whether weight decay applies (ParamSpec.decay)."""
    matrices = by_muon(hyper, decay)
    return {path: Rule(decays, hyper.rate(path), path in matrices) for path, decays in decay.items()}


def init(hyper: AdamW, decay: Mapping[str, bool], params: Params) -> OptimizerState:
    """Zero moments for the trained parameters. decay: path -> whether weight decay applies (ParamSpec.decay)."""
    matrices = by_muon(hyper, decay)
    m = {path: torch.zeros_like(p) for path, p in params.items() if hyper.rate(path)}
    return OptimizerState(m, {path: torch.zeros_like(p) for path, p in m.items() if path not in matrices})


def global_norm(grads: Params, placed: Mapping[str, Placed] | None = None, axes: Axes = ONE) -> Tensor:
    """√Σ‖g‖² over all leaves, a float32 scalar (float64 for float64). placed, axes: on a mesh, how leaves are cut."""
    squares = {path: g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for path, g in grads.items()}
    total = torch.stack([*squares.values()]).sum() if placed is None else sum_over_shards(squares, placed, axes)
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that scales gradients to a norm of at most max_norm (torch's clip_grad_norm_ formula); 0: factor 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)


def update(
    hyper: AdamW,
    rules: Mapping[str, Rule],
    params: Params,
    grads: Params,
    state: OptimizerState,
    at: Scalars,
    placed: Mapping[str, Placed] | None = None,
    axes: Axes = ONE,
) -> tuple[Params, OptimizerState]:
    """One update: (new parameters, new state). The arguments are not changed; frozen parameters are returned as is.

    rules: from leaf_rules. grads: of the trained parameters. placed, axes: on a mesh, how leaves are cut.
    """
    matrices = [path for path in params if rules[path].muon]
    rest = {path: p for path, p in params.items() if rules[path].rate and not rules[path].muon}
    if torch.compiler.is_compiling():
        new, m, v = _formula(hyper, rules, rest, grads, state, at)
    else:
        new, m, v = ({path: tree[path].clone() for path in rest} for tree in (params, *state))
        _fused(hyper, rules, [new, m, v], grads, at)
    if isinstance(hyper, Muon):
        old = [{path: tree[path] for path in matrices} for tree in (params, state.m)]
        options = muon.Options(
            hyper.momentum,
            hyper.weight_decay,
            hyper.update_rms,
            hyper.iterations,
            {path: rules[path].rate for path in matrices},
        )
        got = muon.update(old[0], grads, old[1], at.lr, at.scale, options, placed, axes)
        for tree, before, after in zip((new, m), old, got):
            tree.update({path: torch.where(at.apply, after[path], before[path]) for path in before})
    # in the order of params, so that the state keeps its structure from step to step
    new = {path: new.get(path, params[path]) for path in params}
    return new, OptimizerState({path: m[path] for path in params if path in m}, v)


def _formula(
    hyper: AdamW,
    rules: Mapping[str, Rule],
    params: Params,
    grads: Params,
    state: OptimizerState,
    at: Scalars,
) -> tuple[Params, Params, Params]:
    step, base_lr, scale, apply = at
    count = (step + 1).to(torch.float64)
    correct_m, correct_v = 1.0 - hyper.b1**count, 1.0 - hyper.b2**count
    new_params, new_m, new_v = {}, {}, {}
    for path, p in params.items():
        lr = _times(base_lr, rules[path].rate)
        g = grads[path].to(p.dtype) * scale.to(p.dtype)
        m = state.m[path] + (1.0 - hyper.b1) * (g - state.m[path])
        v = hyper.b2 * state.v[path] + (1.0 - hyper.b2) * g * g
        shrink = 1.0 - lr * (hyper.weight_decay if rules[path].decays else 0.0)
        denominator = (v / correct_v.to(p.dtype)).sqrt() + hyper.eps
        new = p * shrink.to(p.dtype) - (lr / correct_m).to(p.dtype) * m / denominator
        new_params[path] = torch.where(apply, new, p)
        new_m[path] = torch.where(apply, m, state.m[path])
        new_v[path] = torch.where(apply, v, state.v[path])
    return new_params, new_m, new_v


def _times(lr: Tensor, factor: float) -> Tensor:
    return lr if factor == 1.0 else lr * factor


def _fused(
    hyper: AdamW,
    rules: Mapping[str, Rule],
    trees: list[Params],
    grads: Params,
    at: Scalars,
) -> None:
    """Update trees = [params, m, v] in place by the kernel behind torch.optim.AdamW(fused=True)."""
    step, lr, scale, apply = at
    withhold = (~apply).to(torch.float32)
    count = (step + 1).to(torch.float32)
    groups: dict[tuple[bool, float], list[str]] = {}
    for path in trees[0]:
        groups.setdefault((rules[path].decays, rules[path].rate), []).append(path)
    for (decays, factor), paths in groups.items():
        leaves = [[tree[path] for path in paths] for tree in trees]
        # On CUDA the kernel reads the rate, float32, from the device, without a sync. On the CPU .item() costs nothing.
        rate = _times(lr, factor)
        torch._fused_adamw_(
            leaves[0],
            [grads[path].to(p.dtype) * scale.to(p.dtype) for path, p in zip(paths, leaves[0])],
            leaves[1],
            leaves[2],
            [],
            [count] * len(paths),
            lr=rate.to(torch.float32) if lr.is_cuda else rate.item(),
            beta1=hyper.b1,
            beta2=hyper.b2,
            weight_decay=hyper.weight_decay if decays else 0.0,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=withhold,
        )
