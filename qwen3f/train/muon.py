"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): orthogonalised momentum, for matrices.

The step follows torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, arXiv:2502.16982): an update's
root mean square is about `update_rms` times the learning rate, for any shape, so AdamW's learning rate fits.

Differences from torch: it also updates an untied output head. The iteration runs in float32 (float64 for float64)
instead of bfloat16, and on the Gram matrix where that is cheaper. On a mesh, ranks share the work (sharding.matrices).

R rows · C columns of a matrix; N matrices of a stack (layers, experts); S, L the shorter and the longer side
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.params import Params
from sharding.axes import ONE, Axes
from sharding.matrices import own_shard, whole_matrices
from sharding.rules import Placed

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic, from the reference implementation
_EPS = 1e-7
_GRAM_ITERATIONS = 6  # limit for the Gram matrix: rounding gives eigenvalues below 0, which grow 12-fold each time


class Options(NamedTuple):
    """momentum: Nesterov's. weight_decay: decoupled, scaled by the learning rate. update_rms: root mean square of an
    update, relative to the learning rate. iterations: of Newton–Schulz. rates: path -> factor of its learning rate."""

    momentum: float
    weight_decay: float
    update_rms: float
    iterations: int
    rates: Mapping[str, float]


def update(
    params: Params,
    grads: Params,
    momenta: Params,
    lr: Tensor,
    scale: Tensor,
    options: Options,
    placed: Mapping[str, Placed] | None = None,
    axes: Axes = ONE,
) -> tuple[Params, Params]:
    """(parameters, momenta) after one update; the arguments are not changed.

    Every leaf is a matrix [R, C] or a stack [.., R, C]; on a mesh a shard of it, cut as placed says. scale: the
    gradients' factor; lr and scale are scalar tensors.
    """
    scaled = {path: grads[path].to(p.dtype) * scale.to(p.dtype) for path, p in params.items()}
    momenta = {path: m.lerp(scaled[path], 1.0 - options.momentum) for path, m in momenta.items()}
    looked_ahead = {path: g.lerp(momenta[path], options.momentum) for path, g in scaled.items()}
    if placed is not None:
        looked_ahead = {path: whole_matrices(x, placed[path], axes) for path, x in looked_ahead.items()}
    steps = orthogonalize(looked_ahead, options.iterations)
    new = {}
    for path, p in params.items():
        step = steps[path]
        rate = lr * options.rates[path]
        size = rate * options.update_rms * math.sqrt(max(step.shape[-2:]))
        if placed is not None:
            step = own_shard(step, placed[path], axes, len(p))
        new[path] = p * (1.0 - rate * options.weight_decay).to(p.dtype) - size.to(p.dtype) * step
    return new, momenta


def orthogonalize(matrices: Params, iterations: int) -> Params:
    """Each matrix with its singular values brought near 1 (0.7 to 1.2 after 5 iterations), in its own dtype.

    Matrices of one shape, transposed or not, are processed as one batch, even if they belong to different parameters.
    """
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for path, x in matrices.items():
        groups[tuple(sorted(x.shape[-2:]))].append(path)
    out = {}
    for paths in groups.values():
        wide = [_wide(matrices[path]) for path in paths]
        done = _newton_schulz(torch.cat(wide), iterations).split([len(x) for x in wide])
        for path, y_NSL in zip(paths, done):
            x = matrices[path]
            out[path] = (y_NSL.mT if x.shape[-2] > x.shape[-1] else y_NSL).reshape(x.shape).to(x.dtype)
    return out


def _wide(x: Tensor) -> Tensor:
    """[.., R, C] -> [N, S, L], in the precision of the iteration."""
    x_NRC = x.reshape(-1, *x.shape[-2:]).to(torch.promote_types(x.dtype, torch.float32))
    return x_NRC.mT if x_NRC.shape[1] > x_NRC.shape[2] else x_NRC


def _newton_schulz(x_NSL: Tensor, iterations: int) -> Tensor:
    """x <- (a + b x xᵀ + c (x xᵀ)²) x, repeated.

    For long matrices the iteration runs on g = x xᵀ [S, S] instead, and collects the polynomials in one factor, which
    is applied to x at the end. That takes two products with the long side in total, instead of two per iteration. With
    5 iterations, the FLOPs divided by S² are 4·L + 40·S instead of 20·L + 10·S, so the Gram form is cheaper from about
    L = 2·S on.
    """
    a, b, c = NEWTON_SCHULZ
    x_NSL = x_NSL / x_NSL.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    short, long = x_NSL.shape[1:]
    if long < 2 * short or iterations > _GRAM_ITERATIONS:  # the Gram form would cost more, or lose precision
        for _ in range(iterations):
            g_NSS = x_NSL @ x_NSL.mT
            x_NSL = torch.baddbmm(x_NSL, torch.baddbmm(g_NSS, g_NSS, g_NSS, beta=b, alpha=c), x_NSL, beta=a)
        return x_NSL
    g_NSS = x_NSL @ x_NSL.mT
    factor_NSS = eye = torch.eye(short, dtype=g_NSS.dtype, device=g_NSS.device).expand_as(g_NSS)
    for _ in range(iterations):
        p_NSS = a * eye + torch.baddbmm(g_NSS, g_NSS, g_NSS, beta=b, alpha=c)
        factor_NSS = p_NSS @ factor_NSS
        g_NSS = p_NSS @ g_NSS @ p_NSS
    return factor_NSS @ x_NSL
