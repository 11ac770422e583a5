"""RMSNorm and up to three matrix products in one launch, for decoding: q, k and v of a few rows.

The norm needs no separate pass; its rounding differs from that of separate operators: see kernels.row_product. There
are no atomics, and the tiles follow from the shapes, so a rerun is bit-identical.

B rows · D hidden · N outputs of a weight
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import row_product
from kernels.backend import runs_triton, tl, triton


def reference(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Norm, then each product, in plain torch."""
    normed = row_product.norm_reference(x_BD, norm_D, eps)
    return torch.cat([F.linear(normed, w, b) for w, b in zip(weights, biases or [None] * len(weights))], -1)


def norm_linear(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None = None,
) -> Tensor:  # fmt: skip
    """[B, ΣN] of rmsnorm(x)·g times each weight (plus its bias), side by side; no gradients.

    Args:
      x_BD, norm_D: [B, D] and [D] of one dtype, contiguous; norm None: x is normed already. float16, bfloat16 or
        float32 (float64 runs the formula).
      weights: one to three [N, D] as in torch's Linear, contiguous; they may be layers of a stack.
      biases: one [N] for each, or None.
    Sums in float32, rounded once at the end. Raises ValueError for arguments that do not fit.
    """
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"weights must be one to three, got {len(weights)}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases must be one for each of {len(weights)} weights, got {len(biases)}")
    row_product.check(x_BD, row_product.norm_of(x_BD, norm_D), {f"weights[{i}]": w for i, w in enumerate(weights)})
    row_product.check(x_BD, {f"biases[{i}]": (b, len(w)) for i, (w, b) in enumerate(zip(weights, biases or ()))}, {})
    return torch.ops.qwen3f.norm_linear(x_BD, norm_D, eps, list(weights), list(biases or ()))


@triton.jit
def _kernel(
    x_ptr, norm_ptr, first_ptr, second_ptr, third_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr, out_ptr,
    rows, D, first_N, second_N, third_N, eps,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile. Tiles are ordered by weight; those with the same outputs are adjacent, to share weights in L2."""
    row_tiles = tl.cdiv(rows, BM)
    block = tl.program_id(0) // row_tiles
    weight_ptr, bias_ptr, N, offset = first_ptr, first_bias_ptr, first_N, 0
    first_blocks = tl.cdiv(first_N, BN)
    second_blocks = first_blocks + tl.cdiv(second_N, BN)
    if block >= second_blocks:
        weight_ptr, bias_ptr, N, offset = third_ptr, third_bias_ptr, third_N, first_N + second_N
        block -= second_blocks
    elif block >= first_blocks:
        weight_ptr, bias_ptr, N, offset = second_ptr, second_bias_ptr, second_N, first_N
        block -= first_blocks
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    weight_N = weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * D
    product, square = row_product.row_product(
        x_ptr, norm_ptr, weight_N, row, rows, D, HAS_NORM, BM, BN, BK, STAGES, PRECISION, WHOLE, PDL
    )
    out = product * tl.rsqrt(square / D + eps)[:, None] if HAS_NORM else product
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * (first_N + second_N + third_N) + (offset + n)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (n < N)[None, :])


@torch.library.custom_op("qwen3f::norm_linear", mutates_args=())
def _op(x: Tensor, norm: Tensor | None, eps: float, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    if not runs_triton(x) or not len(x):
        return reference(x, norm, eps, tuple(weights), tuple(biases) or None)
    sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
    given = [*weights, *weights[:1] * (3 - len(weights))]
    added = [*biases, *biases[:1] * (3 - len(biases))] if biases else [x] * 3
    out = x.new_empty(len(x), sum(sizes))
    cut = row_product.config(len(x), sum(sizes), x.shape[1])
    tiles = triton.cdiv(len(x), cut.rows) * sum(triton.cdiv(n, cut.outputs) for n in sizes)
    with torch.cuda.device_of(x):
        _kernel[(tiles,)](
            row_product.normed(x, norm, eps, cut), norm, *given, *added, out, *x.shape, *sizes, eps,
            HAS_BIAS=len(biases) > 0, HAS_NORM=row_product.norms(norm, cut),
            **row_product.options(x, cut),
        )  # fmt: skip
    return out


@_op.register_fake
def _op_fake(x: Tensor, norm: Tensor | None, eps: float, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
