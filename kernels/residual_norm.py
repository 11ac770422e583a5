"""x + h Wᵀ and the RMSNorm of the sum, for decoding more than one row.

The output is narrow and the sums are long, so there are too few tiles to fill a card. So each sum is cut into parts, a
program for each. A second kernel, with a program for each row, adds the row's parts to x in a fixed order and
normalises the sum for the product that follows. No atomics, so a rerun is bit-identical.

B rows · N input features, which are summed over · D hidden · S parts of a sum
"""

import torch
from torch import Tensor

from kernels import dependent_launch, linear_residual, rmsnorm, row_product
from kernels.backend import runs_triton, tl, triton

# By whole passes of Qwen3-0.6B with 8 to 256 rows on an H200: more parts are slower, other tiles no faster.
PROGRAMS = 128  # the most programs of the product, one per multiprocessor
LEAST = 128  # the fewest numbers of a part
OUTPUTS, STEP, STAGES = 64, 128, 4  # outputs of a tile; 2-byte numbers of a step; steps in the pipeline


def reference(h_BN: Tensor, weight_DN: Tensor, x_BD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As residual_norm, in plain torch."""
    out = linear_residual.reference(h_BN, weight_DN, x_BD)
    return out, rmsnorm.reference(out, norm_D, eps)


def residual_norm(h_BN: Tensor, weight_DN: Tensor, x_BD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + h Wᵀ, rmsnorm(x + h Wᵀ)·g), both [B, D]; no gradients.

    Args: all contiguous and of one dtype: float16, bfloat16 or float32 (float64 runs the formula). weight_DN: as in
      torch's Linear; it may be a layer of a stack. norm_D: g.
    The product and the sum are float32 and rounded once; the norm rounds as kernels.rmsnorm. Raises ValueError for
    arguments that do not fit.
    """
    linear_residual.check(h_BN, weight_DN, x_BD)
    row_product.check(x_BD, row_product.norm_of(x_BD, norm_D), {})
    return torch.ops.qwen3f.residual_norm(h_BN, weight_DN, x_BD, norm_D, eps)


def parts_of(B: int, D: int, N: int, rows: int) -> tuple[int, int]:
    """(numbers of a part, parts): as many parts as PROGRAMS allows. A part has a multiple of LEAST numbers, the last
    one may have fewer."""
    tiles = triton.cdiv(B, rows) * triton.cdiv(D, OUTPUTS)
    parts = max(1, PROGRAMS // tiles)
    part = triton.cdiv(triton.cdiv(N, parts), LEAST) * LEAST
    return part, triton.cdiv(N, part)


@triton.jit
def _product_kernel(
    h_ptr, weight_ptr, parts_ptr, rows, N, D, part,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one part: h Wᵀ over at most `part` of the N numbers, float32."""
    row_tiles = tl.cdiv(rows, BM)
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    d = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, N)
    weight_N = weight_ptr + tl.minimum(d, D - 1).to(tl.int64) * N
    product = row_product.tile_product(h_ptr, weight_N, row, rows, N, first, last, BM, BN, BK, STAGES, PRECISION, PDL)
    dependent_launch.release(PDL)
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * D + d[None, :]
    tl.store(parts_ptr + at, product, mask=(row < rows)[:, None] & (d < D)[None, :])


@triton.jit
def _sum_kernel(
    x_ptr, parts_ptr, norm_ptr, out_ptr, normed_ptr, rows, D, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: x and its parts, added in order, and the norm of the sum."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    norm = tl.load(norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0)
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (s * rows + row) * D + d, mask=inside, other=0.0)
    out = (x.to(tl.float32) + total).to(x.dtype)
    tl.store(out_ptr + row * D + d, out, mask=inside)
    wide = out.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    normed = (wide * rstd).to(x.dtype).to(tl.float32) * norm
    tl.store(normed_ptr + row * D + d, normed.to(x.dtype), mask=inside)


@torch.library.custom_op("qwen3f::residual_norm", mutates_args=())
def _op(h: Tensor, weight: Tensor, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not runs_triton(h) or not len(h):
        return reference(h, weight, x, norm, eps)
    (B, D), N, size = x.shape, h.shape[1], h.element_size()
    rows = min(128, max(row_product.LEAST_ROWS, triton.next_power_of_2(B)))
    part, parts = parts_of(B, D, N, rows)
    sums, out, normed = x.new_empty(parts, B, D, dtype=torch.float32), torch.empty_like(x), torch.empty_like(x)
    pdl, block = dependent_launch.on(h), triton.next_power_of_2(D)
    with torch.cuda.device_of(h):
        _product_kernel[(triton.cdiv(B, rows) * triton.cdiv(D, OUTPUTS), parts)](
            h, weight, sums, B, N, D, part, BM=rows, BN=OUTPUTS, BK=STEP * 2 // size, STAGES=STAGES,
            PRECISION="ieee" if h.dtype == torch.float32 else "tf32", PDL=pdl,
            num_warps=4 if rows <= 64 else 8, launch_pdl=pdl,
        )  # fmt: skip
        _sum_kernel[(B,)](
            x, sums, norm, out, normed, B, D, eps, PARTS=parts, BLOCK=block, PDL=pdl,
            num_warps=min(8, max(1, block // 256)), launch_pdl=pdl,
        )  # fmt: skip
    return out, normed


@_op.register_fake
def _op_fake(h: Tensor, weight: Tensor, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
