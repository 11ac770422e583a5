"""The MLPs of all experts as one operator: Σ over a token's experts of weight · down(silu(gate(x)) · up(x)).

It computes three products in the forward pass and six in the backward pass, with few kernels in between:

- Forward: one kernel computes gate and up in two accumulators. It reads the rows of x from their place in x (there is
  no sorted copy), and applies SwiGLU at the end. Then come down and the weighted sum of each token's rows.
- Backward: one kernel computes s = dout·down. At its end it computes, from s and the forward pass's gate and up, the
  gradients of gate, up and the routing weight (Σ h·s per row, so the expert's output is not needed), and weight·h, for
  down's gradient. Then come dx's rows as the sum of two products in one accumulator, their sum per token, and the
  gradients of the three weights.

Saved for the backward pass are the inputs, gate and up ([R, F] each). Everything else is recomputed, as in SonicMoE
(arXiv:2512.14080) and Liger-Kernel. Rounding differs from the formula: an expert's output is rounded to x's dtype
before it is weighted and added in float32; gate and up are rounded before SwiGLU, which is computed in float32. There
are no atomics, so a rerun gives the same bits.

N tokens · K experts per token · R = N·K rows, sorted by expert · E experts · D hidden · F expert width
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import grouped_gemm, moe_dispatch
from kernels.backend import check_devices, runs_triton, tl, triton
from kernels.grouped_gemm import Schedule, Tile, stride, weight_tile


def experts_mlp(
    x_ND: Tensor, weights_NK: Tensor, where: moe_dispatch.Plan, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """[N, D] in x's dtype: Σ_k weights[n, k] · down(silu(gate(x[n])) · up(x[n])), with gate, up and down of the k-th
    expert of token n.

    Args:
      x_ND, weights_NK, gate_EFD, up_EFD, down_EDF: one floating dtype and device; first-order gradients in all.
      where: moe_dispatch.plan of the choices.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    tensors = {"x": x_ND, "weights": weights_NK, "gate": gate_EFD, "up": up_EFD, "down": down_EDF}
    _check(tensors, where)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    return torch.ops.qwen3f.experts_mlp(*tensors.values(), *where, keep)[0]


def reference(
    x_ND: Tensor,
    weights_NK: Tensor,
    experts_NK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """The formula: every token goes through every expert. Works with torch.func. act: the activation."""
    gate_NEF, up_NEF = (torch.einsum("nd,efd->nef", x_ND, w) for w in (gate_EFD, up_EFD))
    y_NED = torch.einsum("nef,edf->ned", act(gate_NEF) * up_NEF, down_EDF)
    weights_NE = torch.zeros_like(y_NED[..., 0]).scatter(1, experts_NK, weights_NK)
    return (y_NED * weights_NE[..., None]).sum(1)


@triton.jit
def _up_kernel(
    x, order, gate_w, up_w, gate, up, h, tiles, count, D, F, stride_e, stride_f,
    TOP_K: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(F, BN)
    d = tl.arange(0, BK)
    for pid in tl.range(tl.program_id(0), tl.load(count) * blocks, stride(PROGRAMS), flatten=FLAT):
        tile = pid // blocks
        f0 = pid % blocks * BN
        expert = tl.load(tiles + tile * 3)
        first = tl.load(tiles + tile * 3 + 1)
        end = tl.load(tiles + tile * 3 + 2)
        rows = first + tl.arange(0, BM)
        token = tl.load(order + rows, mask=rows < end, other=0) // TOP_K
        x_at = x + token.to(tl.int64)[:, None] * D + d[None, :]
        acc_g = tl.zeros((BM, BN), tl.float32)
        acc_u = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, D, BK):
            if EVEN:
                x_tile = tl.load(x_at + k0)
            else:
                x_tile = tl.load(x_at + k0, mask=d[None, :] < D - k0, other=0.0)
            g_tile = weight_tile(gate_w, expert, f0, k0, F, D, stride_e, stride_f, 1, TMA, True, BN, BK)
            u_tile = weight_tile(up_w, expert, f0, k0, F, D, stride_e, stride_f, 1, TMA, True, BN, BK)
            acc_g = tl.dot(x_tile, g_tile, acc_g, input_precision="ieee")
            acc_u = tl.dot(x_tile, u_tile, acc_u, input_precision="ieee")
        f = f0 + tl.arange(0, BN)
        at = rows.to(tl.int64)[:, None] * F + f[None, :]
        mask = (rows[:, None] < end) & (f[None, :] < F)
        g = acc_g.to(h.dtype.element_ty)
        u = acc_u.to(h.dtype.element_ty)
        if KEEP:
            tl.store(gate + at, g, mask=mask)
            tl.store(up + at, u, mask=mask)
        g = g.to(tl.float32)
        tl.store(h + at, (g * tl.sigmoid(g) * u.to(tl.float32)).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _activation_part(s, weight, gate, up, dgate, dup, wh, rows, end, f0, F):
    """Writes the gradients of some columns, from s = dout·down; returns Σ h·s per row."""
    f = f0 + tl.arange(0, s.shape[1])
    at = rows.to(tl.int64)[:, None] * F + f[None, :]
    mask = (rows[:, None] < end) & (f[None, :] < F)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    h = silu * u
    tl.store(wh + at, (weight * h).to(wh.dtype.element_ty), mask=mask)
    dh = weight * s
    tl.store(dup + at, (dh * silu).to(dup.dtype.element_ty), mask=mask)
    tl.store(dgate + at, (dh * u * (sigmoid + silu * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=mask)
    return tl.sum(h * s, 1)


@triton.jit(do_not_specialize=("R",))  # as in moe_dispatch
def _activation_kernel(
    dout, order, weights, down_w, gate, up, dgate, dup, wh, dots, tiles, count, D, F, R, stride_e, stride_d,
    TOP_K: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(F, BN)
    d = tl.arange(0, BK)
    for pid in tl.range(tl.program_id(0), tl.load(count) * blocks, stride(PROGRAMS), flatten=FLAT):
        tile = pid // blocks
        f0 = pid % blocks * BN
        expert = tl.load(tiles + tile * 3)
        first = tl.load(tiles + tile * 3 + 1)
        end = tl.load(tiles + tile * 3 + 2)
        rows = first + tl.arange(0, BM)
        choice = tl.load(order + rows, mask=rows < end, other=0)
        dout_at = dout + (choice // TOP_K).to(tl.int64)[:, None] * D + d[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, D, BK):
            if EVEN:
                dout_tile = tl.load(dout_at + k0)
            else:
                dout_tile = tl.load(dout_at + k0, mask=d[None, :] < D - k0, other=0.0)
            w_tile = weight_tile(down_w, expert, f0, k0, F, D, stride_e, 1, stride_d, TMA, False, BN, BK)
            acc = tl.dot(dout_tile, w_tile, acc, input_precision="ieee")
        weight = tl.load(weights + choice, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        # in parts, because the whole tile at once would need too many registers
        parts = (acc,)
        for _ in tl.static_range(PIECES):
            finer = ()
            for i in tl.static_range(len(parts)):
                finer = finer + _halves(parts[i])
            parts = finer
        dot = tl.zeros((BM,), tl.float32)
        for i in tl.static_range(len(parts)):
            column = f0 + i * (BN // len(parts))
            dot += _activation_part(parts[i], weight, gate, up, dgate, dup, wh, rows, end, column, F)
        tl.store(dots + (pid % blocks).to(tl.int64) * R + rows, dot, mask=rows < end)


def launch_up(
    x: Tensor, gate_w: Tensor, up_w: Tensor, order: Tensor, plan: Schedule, tile: Tile, keep: bool, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, h), each [R, F]; the first two empty unless `keep`."""
    width, hidden = gate_w.shape[1:]
    h = x.new_empty(len(order), width)
    gate, up = (torch.empty_like(h) if keep else x.new_empty(0, width) for _ in range(2))
    tma = tile.tma and grouped_gemm.tiled(gate_w) and grouped_gemm.tiled(up_w)
    operands = [grouped_gemm.describe_weight(w, tile) if tma else w for w in (gate_w, up_w)]
    grid, step = grouped_gemm.programs(x, tile, len(plan.tiles) * triton.cdiv(width, tile.n))
    _up_kernel[(grid,)](
        x, order, *operands, gate, up, h, *plan, hidden, width, *gate_w.stride()[:2],
        TOP_K=top_k, KEEP=keep, TMA=tma, EVEN=hidden % tile.k == 0, BM=tile.m, BN=tile.n, BK=tile.k,
        PROGRAMS=step, FLAT=tile.flat, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gate, up, h


def launch_activation(
    dout: Tensor, weights: Tensor, down_w: Tensor, gate: Tensor, up: Tensor, order: Tensor, plan: Schedule,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dgate, dup, weight·h, each [R, F]; Σ h·s per row, float32 [R])."""
    hidden, width = down_w.shape[1:]
    dgate, dup, weighted = (torch.empty_like(gate) for _ in range(3))
    dots = dout.new_empty(triton.cdiv(width, tile.n), len(order), dtype=torch.float32)
    tma = tile.tma and grouped_gemm.tiled(down_w) and hidden % tile.k == 0
    grid, step = grouped_gemm.programs(dout, tile, len(plan.tiles) * len(dots))
    _activation_kernel[(grid,)](
        dout, order, weights, grouped_gemm.describe_weight(down_w.mT, tile) if tma else down_w, gate, up, dgate, dup,
        weighted, dots, *plan, hidden, width, len(order), *down_w.stride()[:2],
        TOP_K=weights.shape[1], TMA=tma, EVEN=hidden % tile.k == 0, PIECES=tile.pieces,
        BM=tile.m, BN=tile.n, BK=tile.k, PROGRAMS=step, FLAT=tile.flat, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dgate, dup, weighted, dots.sum(0)


@torch.library.custom_op("qwen3f::experts_mlp", mutates_args=())
def _experts_mlp(
    x: Tensor,
    weights: Tensor,
    gate_w: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [N, D], gate and up [R, F], or [0, F] unless `keep`)"""
    rows, top_k = len(order), place.shape[1]
    if not runs_triton(x):
        counts = offsets.diff()
        x_RD = x[order // top_k]
        gate, up = (grouped_gemm.linear_formula(x_RD, w, counts) for w in (gate_w, up_w))
        y_RD = grouped_gemm.linear_formula(F.silu(gate) * up, down_w, counts)
        out = moe_dispatch.reference(y_RD, weights, place)
        return out, *((gate, up) if keep else (gate.new_empty(0, gate.shape[1]) for _ in range(2)))
    if not rows:
        return x.new_empty(x.shape), *(x.new_empty(0, gate_w.shape[1]) for _ in range(2))
    x, weights, gate_w, up_w, down_w = (t.contiguous() for t in (x, weights, gate_w, up_w, down_w))
    tiles = [grouped_gemm.tile_of(kind, x.dtype) for kind in ("up", "linear")]
    plans = {m: grouped_gemm.schedule(offsets, rows, m) for m in {tile.m for tile in tiles}}
    gate, up, h = launch_up(x, gate_w, up_w, order, plans[tiles[0].m], tiles[0], keep, top_k)
    y_RD = grouped_gemm.launch_linear(h, down_w, plans[tiles[1].m], tiles[1])
    return moe_dispatch.launch_combine(y_RD, weights, place), gate, up


@_experts_mlp.register_fake
def _experts_mlp_fake(
    x: Tensor,
    weights: Tensor,
    gate_w: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = order.shape[0] if keep else 0, gate_w.shape[1]
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)


@torch.library.custom_op("qwen3f::experts_mlp_backward", mutates_args=())
def _experts_mlp_backward(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_w: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    gate: Tensor,
    up: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_w, up_w, down_w."""
    rows, top_k = len(order), place.shape[1]
    if not runs_triton(x):
        return _backward_formula(dout, x, weights, gate_w, up_w, down_w, gate, up, order, place, offsets)
    if not rows:
        return tuple(t.new_zeros(t.shape) for t in (x, weights, gate_w, up_w, down_w))
    dout, x, weights, gate_w, up_w, down_w = (t.contiguous() for t in (dout, x, weights, gate_w, up_w, down_w))
    activation, two, outer = (grouped_gemm.tile_of(kind, x.dtype) for kind in ("activation", "linear2", "outer"))
    plans = {m: grouped_gemm.schedule(offsets, rows, m) for m in {activation.m, two.m}}
    dgate, dup, weighted, dots = launch_activation(
        dout, weights, down_w, gate, up, order, plans[activation.m], activation
    )
    dx_RD = grouped_gemm.launch_linear(dgate, gate_w.mT, plans[two.m], two, (dup, up_w.mT))
    return (
        moe_dispatch.launch_combine(dx_RD, None, place),
        dots[place].to(weights.dtype),
        grouped_gemm.launch_outer(dgate, x, offsets, outer, order, top_k),
        grouped_gemm.launch_outer(dup, x, offsets, outer, order, top_k),
        grouped_gemm.launch_outer(weighted, dout, offsets, outer, order, top_k, swap=True),
    )


@_experts_mlp_backward.register_fake
def _experts_mlp_backward_fake(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_w: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    gate: Tensor,
    up: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (x, weights, gate_w, up_w, down_w))


def _backward_formula(
    dout: Tensor, x: Tensor, weights: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor, gate: Tensor, up: Tensor,
    order: Tensor, place: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    counts, token_R = offsets.diff(), order // place.shape[1]
    linear, outer = grouped_gemm.linear_formula, grouped_gemm.outer_formula
    dout_RD, x_RD = dout[token_R], x[token_R]
    s = linear(dout_RD, down_w.mT, counts)
    # elementwise as in the kernel: in float32, rounded once
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, gate, up, s = (t.to(wide) for t in (weights.flatten()[order][:, None], gate, up, s))
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    h, dh = silu * up, weight * s
    dgate, dup, weighted = (t.to(x.dtype) for t in (dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu, weight * h))
    dx_RD = linear(dgate, gate_w.mT, counts) + linear(dup, up_w.mT, counts)
    return (
        moe_dispatch.reference(dx_RD, None, place),
        (h * s).sum(1)[place].to(weights.dtype),
        outer(dgate, x_RD, counts),
        outer(dup, x_RD, counts),
        outer(dout_RD, weighted, counts),
    )


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    gate, up = output[1:]
    ctx.mark_non_differentiable(gate, up)
    ctx.save_for_backward(*inputs[:5], gate, up, *inputs[5:8])


def _backward(ctx: Context, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *torch.ops.qwen3f.experts_mlp_backward(dout, *ctx.saved_tensors), None, None, None, None


_experts_mlp.register_autograd(_backward, setup_context=_save)

EXPERTS_MLP = torch.ops.qwen3f.experts_mlp.default


def _check(tensors: dict[str, Tensor], where: moe_dispatch.Plan) -> None:
    x, gate = tensors["x"], tensors["gate"]
    if x.dim() != 2 or gate.dim() != 3 or x.shape[1] != gate.shape[2] or not x.is_floating_point():
        raise ValueError(f"x must be floating [N, D] and gate [E, F, D], got {tuple(x.shape)}, {tuple(gate.shape)}")
    shapes = {"weights": where.place.shape, "up": gate.shape, "down": gate.mT.shape}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x {x.dtype}")
    if where.place.shape[0] != x.shape[0] or len(where.offsets) != gate.shape[0] + 1:
        n, e = where.place.shape[0], len(where.offsets) - 1
        raise ValueError(f"the plan is of {n} tokens and {e} experts, x of {x.shape[0]}, gate of {gate.shape[0]}")
    check_devices(**tensors, plan=where.order)
