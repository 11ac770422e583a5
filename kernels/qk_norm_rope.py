"""RMSNorm of each head of queries and keys, then rotary positions, in one launch (Qwen3's QK-norm and RoPE).

The forward pass reads and writes q and k once; separate norm and rotation would do so twice. The backward pass reads q,
k and both gradients once, writes once, and computes the norm again. As in kernels.rmsnorm, a fixed number of programs
loop over the heads with the weights' gradients in registers, and a second kernel adds their partial sums. There are no
atomics, so a rerun on the same card is bit-identical.

B batch · T sequence · H query heads · K key heads · d head_dim · F = d/2 frequencies · P programs
"""

import torch
from torch import Tensor

from kernels import backend, rmsnorm, rope
from kernels.backend import runs_triton, tl, triton
from kernels.rope import Config, head_offset, table_offset


def reference(
    q_BTHd: Tensor, k_BTKd: Tensor, q_weight_d: Tensor, k_weight_d: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm, then rotation, in plain torch; works with torch.func."""
    q, k = rmsnorm.reference(q_BTHd, q_weight_d, eps), rmsnorm.reference(k_BTKd, k_weight_d, eps)
    return rope.reference(q, k, cos_BTF, sin_BTF)


def qk_norm_rope(
    q_BTHd: Tensor, k_BTKd: Tensor, q_weight_d: Tensor, k_weight_d: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """kernels.rope.rope applied to rms_norm(q, q_weight, eps) and rms_norm(k, k_weight, eps) of kernels.rmsnorm.

    It rounds where these operators round: the normalised head, its product with the weight, the rotated head. The
    backward pass computes in float32 (float64 for float64), and saves only q and k.

    Args: q, k, cos, sin as in `rope`; q_weight_d, k_weight_d: [d], q's dtype.
    Returns q and k, normalised and rotated, contiguous. First-order gradients in q, k and both weights.
    Raises ValueError for shapes, dtypes, devices or strides other than these.
    """
    rope.check(q_BTHd, k_BTKd, cos_BTF, sin_BTF)
    for name, weight in (("q_weight", q_weight_d), ("k_weight", k_weight_d)):
        if weight.shape != q_BTHd.shape[-1:] or weight.dtype != q_BTHd.dtype or weight.stride(0) != 1:
            raise ValueError(
                f"{name} must be {q_BTHd.dtype} [{q_BTHd.shape[-1]}] of stride 1, got {weight.dtype} "
                f"{tuple(weight.shape)} of strides {weight.stride()}"
            )
    backend.check_devices(q=q_BTHd, q_weight=q_weight_d, k_weight=k_weight_d)
    return torch.ops.qwen3f.qk_norm_rope(q_BTHd, k_BTKd, q_weight_d, k_weight_d, cos_BTF, sin_BTF, eps)


def forward_config(half: int) -> Config:
    """2048 pairs per program, so that each thread has eight 16-byte loads in flight."""
    return Config(rows=max(1, 2048 // triton.next_power_of_2(half)), warps=4)


def backward_config(half: int) -> Config:
    """2048 pairs per program, three programs per multiprocessor: the fastest on an H100."""
    return Config(rows=max(1, 2048 // triton.next_power_of_2(half)), warps=4, per_processor=3)


@triton.jit
def _normalise(first, second, size, eps):
    """(both halves of the heads times 1/√(mean square + eps), that factor)."""
    rstd = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / size + eps)[:, None]
    return first * rstd, second * rstd, rstd


@triton.jit
def _forward_tile(
    x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, block, rows, T, half, x_b, x_t, x_h, table_b, table_t, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = block * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (col < half)
    at = head_offset(row, T, x_b, x_t, x_h, HEADS)[:, None] + col
    angle = table_offset(row, T, table_b, table_t, HEADS)[:, None] + col
    first = tl.load(x_ptr + at, mask=mask, other=0.0)
    second = tl.load(x_ptr + at + half, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    first_weight = tl.load(weight_ptr + col, mask=col < half, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + col + half, mask=col < half, other=0.0).to(tl.float32)
    dtype = first.dtype
    first, second, _rstd = _normalise(first.to(tl.float32), second.to(tl.float32), 2 * half, eps)
    first = (first.to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = (second.to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    to = row.to(tl.int64)[:, None] * (2 * half) + col
    tl.store(out_ptr + to, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_ptr + to + half, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, q_blocks, q_rows, k_rows, T, half,
    q_b, q_t, q_h, k_b, k_t, k_h, table_b, table_t, eps,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < q_blocks:
        _forward_tile(
            q_ptr, q_weight_ptr, q_out_ptr, cos_ptr, sin_ptr, block, q_rows, T, half,
            q_b, q_t, q_h, table_b, table_t, eps, H, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _forward_tile(
            k_ptr, k_weight_ptr, k_out_ptr, cos_ptr, sin_ptr, block - q_blocks, k_rows, T, half,
            k_b, k_t, k_h, table_b, table_t, eps, K, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, cos_ptr, sin_ptr, block, rows, T, half,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, table_b, table_t, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Handles tile `block` and every P-th tile after it.

    With dz = dy rotated back, n = x·rstd and m = dz·w: dx = rstd·(m − n·mean(m·n)), dw = Σ dz·n over these tiles.
    """
    col = tl.arange(0, BLOCK)[None, :]
    first_weight = tl.load(weight_ptr + col, mask=col < half, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + col + half, mask=col < half, other=0.0).to(tl.float32)
    first_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    second_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    dtype = dx_ptr.dtype.element_ty
    for start in tl.range(block * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < half)
        at = head_offset(row, T, x_b, x_t, x_h, HEADS)[:, None] + col
        d_at = head_offset(row, T, dy_b, dy_t, dy_h, HEADS)[:, None] + col
        angle = table_offset(row, T, table_b, table_t, HEADS)[:, None] + col
        first = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
        first_dy = tl.load(dy_ptr + d_at, mask=mask, other=0.0).to(tl.float32)
        second_dy = tl.load(dy_ptr + d_at + half, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        first, second, rstd = _normalise(first, second, 2 * half, eps)
        first_dz = first_dy * cos + second_dy * sin
        second_dz = second_dy * cos - first_dy * sin
        first_dw += first_dz * first
        second_dw += second_dz * second
        first_m = first_dz * first_weight
        second_m = second_dz * second_weight
        mean = tl.sum(first_m * first + second_m * second, axis=1)[:, None] / (2 * half)
        to = row.to(tl.int64)[:, None] * (2 * half) + col
        tl.store(dx_ptr + to, (rstd * (first_m - first * mean)).to(dtype), mask=mask)
        tl.store(dx_ptr + to + half, (rstd * (second_m - second * mean)).to(dtype), mask=mask)
    tl.store(partial_ptr + col, tl.sum(first_dw, axis=0)[None, :], mask=col < half)
    tl.store(partial_ptr + half + col, tl.sum(second_dw, axis=0)[None, :], mask=col < half)


@triton.jit
def _backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, partial_ptr, cos_ptr, sin_ptr,
    q_rows, k_rows, T, half, dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, q_b, q_t, q_h, k_b, k_t, k_h, table_b, table_t, eps,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    partial_ptr += program * 4 * half
    _backward_rows(
        dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, partial_ptr, cos_ptr, sin_ptr, program, q_rows, T, half,
        dq_b, dq_t, dq_h, q_b, q_t, q_h, table_b, table_t, eps, H, ROWS, BLOCK, STAGES,
    )  # fmt: skip
    last = tl.num_programs(0) - 1 - program  # reversed, so that a program with one more tile of q has one less of k
    _backward_rows(
        dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, partial_ptr + 2 * half, cos_ptr, sin_ptr, last, k_rows, T, half,
        dk_b, dk_t, dk_h, k_b, k_t, k_h, table_b, table_t, eps, K, ROWS, BLOCK, STAGES,
    )  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, config: Config
) -> tuple[Tensor, Tensor]:
    _, T, H, d = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_rows, k_rows = q.numel() // d, k.numel() // d
    q_blocks, k_blocks = triton.cdiv(q_rows, config.rows), triton.cdiv(k_rows, config.rows)
    if q_rows + k_rows:
        with torch.cuda.device_of(q):
            _forward_kernel[(q_blocks + k_blocks,)](
                q, k, q_weight, k_weight, q_out, k_out, cos, sin, q_blocks, q_rows, k_rows, T, d // 2,
                *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], eps,
                H, k.shape[2], config.rows, triton.next_power_of_2(d // 2), num_warps=config.warps,
            )  # fmt: skip
    return q_out, k_out


def launch_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float, config: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, both weights' gradients [2, d])."""
    _, T, H, d = q.shape
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    q_rows, k_rows = q.numel() // d, k.numel() // d
    if not q_rows + k_rows:
        return dq, dk, q_weight.new_zeros(2, d)
    programs = min(rmsnorm.processors(q.device) * config.per_processor, triton.cdiv(max(q_rows, k_rows), config.rows))
    partial = q.new_empty(programs, 2 * d, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _backward_kernel[(programs,)](
            dq_out, dk_out, q, k, q_weight, k_weight, dq, dk, partial, cos, sin, q_rows, k_rows, T, d // 2,
            *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], eps,
            H, k.shape[2], config.rows, triton.next_power_of_2(d // 2), config.stages, num_warps=config.warps,
        )  # fmt: skip
        return dq, dk, rmsnorm.sum_programs(partial, q_weight.dtype).view(2, d)


@torch.library.custom_op("qwen3f::qk_norm_rope", mutates_args=())
def _op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not runs_triton(q):
        return reference(q, k, q_weight, k_weight, cos, sin, eps)
    cos, sin = rope.same_strides(cos, sin)
    return launch_forward(q, k, q_weight, k_weight, cos, sin, eps, forward_config(q.shape[-1] // 2))


@torch.library.custom_op("qwen3f::qk_norm_rope_backward", mutates_args=())
def _op_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, both weights' gradients [2, d])."""
    if runs_triton(q):
        tables, config = rope.same_strides(cos, sin), backward_config(q.shape[-1] // 2)
        grads = rope.dense(dq_out), rope.dense(dk_out)
        return launch_backward(*grads, q, k, q_weight, k_weight, *tables, eps, config)
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dq_out, dk_out, cos, sin)]
    (dq, dq_weight), (dk, dk_weight) = (
        _norm_backward(dz, x, weight, eps)
        for dz, x, weight in zip(rope.reference(wide[0], wide[1], wide[2], -wide[3]), (q, k), (q_weight, k_weight))
    )
    return dq, dk, torch.stack((dq_weight, dk_weight))


def _norm_backward(dz: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(dz.dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, m = wide * rstd, dz * weight
    dx = rstd * (m - normed * (m * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), (dz * normed).sum((0, 1, 2)).to(weight.dtype)


@_op.register_fake
def _op_fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_op_backward.register_fake
def _op_backward_fake(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), q_weight.new_empty(2, *q_weight.shape)


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.eps = inputs[-1]


def _gradients(ctx: Context, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, weights = torch.ops.qwen3f.qk_norm_rope_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps)
    return dq, dk, weights[0], weights[1], None, None, None


_op.register_autograd(_gradients, setup_context=_save)
