"""RMSNorm, the gate and up products and SwiGLU in one launch, for decoding a few rows.

Each tile has rows of gate and up alternately, so that both numbers of a pair are in one thread. The norm needs no
separate pass: see kernels.row_product. A rerun is bit-identical.

B rows · D hidden · F intermediate size
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import row_product, swiglu
from kernels.backend import runs_triton, tl, triton


def reference(x_BD: Tensor, norm_D: Tensor | None, eps: float, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Norm, both products, SwiGLU, in plain torch."""
    normed = row_product.norm_reference(x_BD, norm_D, eps)
    return swiglu.reference(F.linear(normed, gate_FD), F.linear(normed, up_FD))


def norm_swiglu(x_BD: Tensor, norm_D: Tensor | None, eps: float, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """silu(gate h) · (up h) with h = rmsnorm(x)·g, [B, F]; no gradients.

    Args:
      x_BD, norm_D: [B, D] and [D] of one dtype, contiguous; norm None: x is normed already. float16, bfloat16 or
        float32 (float64 runs the formula).
      gate_FD, up_FD: as in torch's Linear, contiguous; they may be layers of a stack.
    Rounding: the norm as in kernels.row_product; gate, up and silu stay in float32, and the result is rounded once.
    Raises ValueError for arguments that do not fit.
    """
    row_product.check(x_BD, row_product.norm_of(x_BD, norm_D), {"gate": gate_FD, "up": up_FD})
    if gate_FD.shape != up_FD.shape:
        raise ValueError(f"up must be {tuple(gate_FD.shape)} like gate, got {tuple(up_FD.shape)}")
    return torch.ops.qwen3f.norm_swiglu(x_BD, norm_D, eps, gate_FD, up_FD)


@triton.jit
def _kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, rows, D, F, eps,
    HAS_NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile with BN/2 outputs: its weight rows 2i are gate's, 2i + 1 up's."""
    row_tiles = tl.cdiv(rows, BM)
    first = (tl.program_id(0) // row_tiles) * (BN // 2)
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    pair = tl.arange(0, BN)
    at = tl.minimum(first + pair // 2, F - 1).to(tl.int64) * D
    weight_N = tl.where(pair % 2 == 0, gate_ptr + at, up_ptr + at)
    product, square = row_product.row_product(
        x_ptr, norm_ptr, weight_N, row, rows, D, HAS_NORM, BM, BN, BK, STAGES, PRECISION, WHOLE, PDL
    )
    if HAS_NORM:
        product *= tl.rsqrt(square / D + eps)[:, None]
    gate, up = tl.split(tl.reshape(product, [BM, BN // 2, 2]))
    n = first + tl.arange(0, BN // 2)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    mask = (row < rows)[:, None] & (n < F)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * F + n[None, :], out, mask=mask)


@torch.library.custom_op("qwen3f::norm_swiglu", mutates_args=())
def _op(x: Tensor, norm: Tensor | None, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    if not runs_triton(x) or not len(x):
        return reference(x, norm, eps, gate, up)
    out = x.new_empty(len(x), len(gate))
    cut = row_product.config(len(x), 2 * len(gate), x.shape[1])
    tiles = triton.cdiv(len(x), cut.rows) * triton.cdiv(len(gate), cut.outputs // 2)
    with torch.cuda.device_of(x):
        _kernel[(tiles,)](
            row_product.normed(x, norm, eps, cut), norm, gate, up, out, *x.shape, len(gate), eps,
            HAS_NORM=row_product.norms(norm, cut),
            **row_product.options(x, cut),
        )  # fmt: skip
    return out


@_op.register_fake
def _op_fake(x: Tensor, norm: Tensor | None, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])
