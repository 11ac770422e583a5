"""x + h Wᵀ in one launch, for decoding a few rows: the last product of attention or of the MLP, and the residual.

The output is narrow and the sums are long, so each sum is split over a program's warps (kernels.row_product) in a fixed
order. There are no atomics, so a rerun is bit-identical.

B rows · N input features, which are summed over · D hidden
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import row_product
from kernels.backend import check_devices, runs_triton, tl, triton


def reference(h_BN: Tensor, weight_DN: Tensor, x_BD: Tensor) -> Tensor:
    """x + h Wᵀ in plain torch."""
    return x_BD + F.linear(h_BN, weight_DN)


def linear_residual(h_BN: Tensor, weight_DN: Tensor, x_BD: Tensor) -> Tensor:
    """x + h Wᵀ, [B, D], a new tensor; no gradients.

    Args: all contiguous and of one dtype: float16, bfloat16 or float32 (float64 runs the formula). weight_DN: as in
      torch's Linear; it may be a layer of a stack.
    Product and sum are float32 and rounded once; the formula also rounds the product. Raises ValueError for arguments
    that do not fit.
    """
    check(h_BN, weight_DN, x_BD)
    return torch.ops.qwen3f.linear_residual(h_BN, weight_DN, x_BD)


def check(h_BN: Tensor, weight_DN: Tensor, x_BD: Tensor) -> None:
    """ValueError for arguments that do not fit linear_residual."""
    row_product.check(h_BN, {}, {"weight": weight_DN}, x_name="h")
    wanted = (len(h_BN), len(weight_DN))
    if x_BD.shape != wanted or x_BD.dtype != h_BN.dtype or not x_BD.is_contiguous():
        raise ValueError(
            f"the residual x must be contiguous {h_BN.dtype} {list(wanted)}, got {x_BD.dtype} {tuple(x_BD.shape)}"
        )
    check_devices(h=h_BN, x=x_BD)


@triton.jit
def _kernel(
    h_ptr, weight_ptr, x_ptr, out_ptr, rows, N, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BM)
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    d = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    weight_N = weight_ptr + tl.minimum(d, D - 1).to(tl.int64) * N
    product, _square = row_product.row_product(
        h_ptr, h_ptr, weight_N, row, rows, N, False, BM, BN, BK, STAGES, PRECISION, WHOLE, PDL
    )
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    out = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + product
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("qwen3f::linear_residual", mutates_args=())
def _op(h: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    if not runs_triton(h) or not len(h):
        return reference(h, weight, x)
    out = x.new_empty(x.shape)
    cut = row_product.config(*x.shape, h.shape[1])
    tiles = triton.cdiv(len(x), cut.rows) * triton.cdiv(x.shape[1], cut.outputs)
    with torch.cuda.device_of(h):
        _kernel[(tiles,)](h, weight, x, out, *h.shape, x.shape[1], **row_product.options(h, cut))
    return out


@_op.register_fake
def _op_fake(h: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
