"""RMSNorm with an optional residual that is added first; forward and backward pass each read memory once.

In the backward pass a fixed number of programs loop over the rows with the weight's gradient in registers (float32).
Each writes one partial row, and a second kernel adds these up. There are no atomics, so a rerun on the same card is
bit-identical. While a row is computed, the next ones are loaded to shared memory (Triton's pipelined loop).

N rows · D normalised · P programs
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend, dependent_launch
from kernels.backend import runs_triton, tl, triton

MAX_SIZE = 16_384  # a whole row must fit into the registers of one program
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reference(
    x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula of qwen3f.model.norm.rms_norm in plain torch; works with torch.func."""
    if residual is not None:
        x = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = weight_D * wide.to(x.dtype)
    return out if residual is None else (out, x)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """weight · x/√(mean(x²)+eps) over the last dimension. With a residual: (the norm of x + residual, x + residual).

    It rounds where qwen3f.model.norm does: the sum, the normalised row, and its product with the weight. In between,
    and in the whole backward pass, it computes in float32 (float64 for float64 inputs, by the formula). Saved for the
    backward pass: x or the sum, and 1/√(…) of each row in float32.

    Args:
      x: [..., D] in bfloat16, float16, float32 or float64; D ≤ MAX_SIZE, adjacent in memory. Rows with a constant
        stride are read in place (such as a part of a wider tensor), others are copied first.
      weight_D: [D], x's dtype.
      residual: like x.
    Returns [..., D] contiguous in x's dtype; with a residual (normed, x + residual). First-order gradients.
    Raises ValueError for shapes, dtypes, devices or strides other than these.
    """
    _check(x, weight_D, residual)
    if residual is None:
        return torch.ops.qwen3f.rms_norm(x, weight_D, eps)[0]
    return torch.ops.qwen3f.rms_norm_add(x, residual, weight_D, eps)[:2]


class Config(NamedTuple):
    """How a kernel is launched: rows per tile and warps per program. For programs that loop also: the loop's stages,
    programs per multiprocessor, and whether the weight stays in registers."""

    rows: int
    warps: int
    stages: int = 1
    per_processor: int = 1
    keep_weight: bool = True


def forward_config(size: int) -> Config:
    """One row per program; of short rows several, so that a thread has four 16-byte loads in flight."""
    block = triton.next_power_of_2(size)
    if block <= 1024:
        return Config(rows=max(1, 4096 // block), warps=4)
    return Config(rows=1, warps=min(16, block // 512))


def backward_config(size: int, itemsize: int) -> Config:
    """The fastest on an H100: tiles of one row or 4096 elements, with two more loaded ahead; short rows in large tiles,
    without loading ahead. The longest rows need all registers.
    """
    block = triton.next_power_of_2(size)
    if block > 8192:
        return Config(rows=1, warps=16 if itemsize == 2 else 32, keep_weight=False)
    if block <= 256:
        return Config(rows=32768 // itemsize // block, warps=16)
    rows = max(1, 4096 // block)
    if block > 4096:
        return Config(rows, warps=16, stages=3 if itemsize == 2 else 2)
    return Config(rows, warps=8, stages=3, per_processor=1 if block == 4096 else 2)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rstd_ptr, rows, size, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (col < size)
    wide_row = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide_row * x_stride + col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + wide_row * residual_stride + col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + wide_row * size + col, x, mask=mask)
    weight = tl.load(weight_ptr + col, mask=col < size, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    normed = (wide * rstd[:, None]).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + wide_row * size + col, (normed * weight).to(x.dtype), mask=mask)


@triton.jit
def _backward_kernel(
    d_out_ptr, d_sum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, size, d_out_stride, d_sum_stride, x_stride,
    HAS_SUM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, KEEP_WEIGHT: tl.constexpr,
):  # fmt: skip
    """With m = dy·w and n = x·rstd: dx = rstd·(m − n·mean(m·n)) + dsum, and dw = Σ dy·n over this program's rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)[None, :]
    if KEEP_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < size, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < size)
        wide_row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + wide_row * x_stride + col, mask=mask, other=0.0)
        d_out = tl.load(d_out_ptr + wide_row * d_out_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * rstd
        dw += d_out * normed
        if not KEEP_WEIGHT:
            weight = tl.load(weight_ptr + col, mask=col < size, other=0.0).to(tl.float32)
        m = d_out * weight
        mean = tl.sum(m * normed, axis=1)[:, None] / size
        dx = rstd * (m - normed * mean)
        if HAS_SUM:
            dx += tl.load(d_sum_ptr + wide_row * d_sum_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide_row * size + col, dx.to(x.dtype), mask=mask)
    tl.store(partial_ptr + program * size + col, tl.sum(dw, axis=0)[None, :], mask=col < size)


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, programs, size, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, PROGRAMS)[:, None]
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < programs) & (col < size)[None, :]
    part = tl.load(partial_ptr + row * size + col[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(part, axis=0).to(out_ptr.dtype.element_ty), mask=col < size)


def sum_programs(partial_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum float32 [P, D] over P in a fixed order, by Triton: [D] in `dtype`. P: up to a few thousand."""
    programs, size = partial_PD.shape
    out = partial_PD.new_empty(size, dtype=dtype)
    _sum_kernel[(triton.cdiv(size, 16),)](
        partial_PD, out, programs, size, triton.next_power_of_2(programs), 16, num_warps=8
    )
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; 2 for the interpreter, so that programs loop in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch_forward(
    x_ND: Tensor, weight_D: Tensor, eps: float, residual_ND: Tensor | None, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum, rstd [N]) by Triton; without a residual, sum is out."""
    rows, size = x_ND.shape
    out, rstd = x_ND.new_empty(rows, size), x_ND.new_empty(rows, dtype=torch.float32)
    total = out if residual_ND is None else torch.empty_like(out)
    other = x_ND if residual_ND is None else residual_ND
    if rows:
        pdl = dependent_launch.on(x_ND)
        _forward_kernel[(triton.cdiv(rows, config.rows),)](
            x_ND, other, weight_D, out, total, rstd, rows, size, x_ND.stride(0), other.stride(0), eps,
            residual_ND is not None, config.rows, triton.next_power_of_2(size), pdl, num_warps=config.warps,
            launch_pdl=pdl,
        )  # fmt: skip
    return out, total, rstd


def launch_backward(
    d_out_ND: Tensor, d_sum_ND: Tensor | None, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """(dx [N, D], dw [D]) by Triton."""
    rows, size = x_ND.shape
    if not rows:
        return x_ND.new_empty(0, size), torch.zeros_like(weight_D)
    programs = min(processors(x_ND.device) * config.per_processor, triton.cdiv(rows, config.rows))
    dx, partial = x_ND.new_empty(rows, size), x_ND.new_empty(programs, size, dtype=torch.float32)
    d_sum = d_out_ND if d_sum_ND is None else d_sum_ND
    _backward_kernel[(programs,)](
        d_out_ND, d_sum, x_ND, weight_D, rstd_N, dx, partial, rows, size,
        d_out_ND.stride(0), d_sum.stride(0), x_ND.stride(0), d_sum_ND is not None, config.rows,
        triton.next_power_of_2(size), config.stages, config.keep_weight, num_warps=config.warps,
    )  # fmt: skip
    return dx, sum_programs(partial, weight_D.dtype)


def _forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum, rstd [...]) on any device. Without a residual, don't use `sum`: it is x or out."""
    x_ND, residual_ND = _rows(x), None if residual is None else _rows(residual)
    if runs_triton(x):
        with torch.cuda.device_of(x):
            out, total, rstd = launch_forward(x_ND, weight, eps, residual_ND, forward_config(x.shape[-1]))
    else:
        total = x_ND if residual_ND is None else x_ND + residual_ND
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        out = weight * (wide * rstd[:, None]).to(x.dtype)
    return out.view(x.shape), total.view(x.shape), rstd.view(x.shape[:-1])


@torch.library.custom_op("qwen3f::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, _, rstd = _forward(x, weight, eps, None)
    return out, rstd


@torch.library.custom_op("qwen3f::rms_norm_add", mutates_args=())
def _norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, eps, residual)


@torch.library.custom_op("qwen3f::rms_norm_backward", mutates_args=())
def _norm_backward(
    d_out: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, and of the residual if there was one; gradient of weight)."""
    size = x.shape[-1]
    d_out_ND, x_ND, rstd_N = _rows(d_out), _rows(x), rstd.reshape(-1)
    d_sum_ND = None if d_sum is None else _rows(d_sum)
    if runs_triton(x):
        config = backward_config(size, x.element_size())
        with torch.cuda.device_of(x):
            dx, dw = launch_backward(d_out_ND, d_sum_ND, x_ND, weight, rstd_N, config)
    else:
        d_out_wide, normed = d_out_ND.to(rstd.dtype), x_ND.to(rstd.dtype) * rstd_N[:, None]
        m = d_out_wide * weight
        dx = rstd_N[:, None] * (m - normed * (m * normed).mean(-1, keepdim=True))
        dx = (dx if d_sum_ND is None else dx + d_sum_ND).to(x.dtype)
        dw = (d_out_wide * normed).sum(0).to(weight.dtype)
    return dx.view(x.shape), dw


def _rows(x: Tensor) -> Tensor:
    """[N, D] with D adjacent; a view if the rows of x have a constant stride."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@_norm.register_fake
def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _rstd_like(x)


@_norm_add.register_fake
def _norm_add_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)


@_norm_backward.register_fake
def _norm_backward_fake(
    d_out: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _save_add(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _gradients(ctx: Context, d_out: Tensor, d_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.qwen3f.rms_norm_backward(d_out, None, x, weight, rstd), None


def _gradients_add(ctx: Context, d_out: Tensor, d_sum: Tensor, d_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dw = torch.ops.qwen3f.rms_norm_backward(d_out, d_sum, x, weight, rstd)
    return dx, dx, dw, None


_norm.register_autograd(_gradients, setup_context=_save)
_norm_add.register_autograd(_gradients_add, setup_context=_save_add)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; rms_norm takes {', '.join(str(d) for d in _DTYPES)}")
    if x.dim() == 0 or not 0 < x.shape[-1] <= MAX_SIZE:
        raise ValueError(f"x must be [..., D] with 0 < D ≤ {MAX_SIZE}, got {tuple(x.shape)}")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} [{x.shape[-1]}], got {weight.dtype} {tuple(weight.shape)}")
    tensors = {"x": x, "weight": weight}
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual must be {x.dtype} {tuple(x.shape)}, got {residual.dtype} {tuple(residual.shape)}"
            )
        tensors["residual"] = residual
    backend.check_devices(**tensors)
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; pass {name}.contiguous()")
