"""The product of a few rows with a large weight, within a Triton kernel: a loop that the kernels of decoding share.

With B rows such a product does 2·B operations per number of the weight. Below about 200 rows on an H100, loading the
weight limits the speed, so the loop keeps many loads in flight (Triton's pipelined loop). It has two forms:

- One row: products and sums in float32, without tensor cores, so nothing is padded to 16 rows. The row's RMSNorm needs
  no separate pass: the loop multiplies x by the norm's weight g and sums x², and the caller multiplies the result by
  1/√(mean x² + eps). Rounding: separate operators round x/√(…), and then its product with g, to the dtype of x. Here
  nothing is rounded before the result.
- More rows: a tensor-core tile. The norm is a separate kernel, because every tile would repeat its work; or x is normed
  already (kernels.residual_norm).

B rows · D input features, which are summed over · N outputs · BM, BN, BK rows, outputs and step of a tile
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dependent_launch, rmsnorm
from kernels.backend import check_devices, tl, triton

# Found by sweeps on an H200 (132 multiprocessors) with Qwen3-0.6B's shapes and 1, 64 and 256 rows, within a chain;
# stages, warps, and tiles of up to 64 rows by whole passes of Qwen3-0.6B, tiles of 64 rows of 8B too.
ROW_PROGRAMS = 264  # one row: target number of programs, two per multiprocessor
ROW_TILE = 1024  # one row: numbers of the weight per warp and step, four 16-byte loads per thread
ROW_WHOLE = 8192  # one row: the most bytes of the weight that a warp loads at once, 64 registers per thread
LEAST_ROWS = 16  # of a tile on tensor cores
ONE_TILE_ROWS = 64  # up to this many rows are in one tile
TILES = 128  # up to ONE_TILE_ROWS: target number of tiles, one per multiprocessor; more would read x from L2 more often
LEAST_TILES = 96  # above ONE_TILE_ROWS: the fewest tiles
MOST = 128  # the most rows, and the most outputs, of a tile
STAGES = 4  # steps in the pipeline: three are loaded while one is computed
LONG, LONG_STAGES = 2048, 6  # for sums over at least LONG numbers, more stages are faster


class Config(NamedTuple):
    """Rows, outputs and step of a tile (step: 2-byte numbers; half as many for float32), stages, warps."""

    rows: int
    outputs: int
    step: int
    stages: int
    warps: int


def config(B: int, N: int, D: int) -> Config:
    """The tiles for B rows, N outputs and sums over D numbers. `outputs` depends only on B and N."""
    if B == 1:
        outputs = _outputs(N, ROW_PROGRAMS, 4, 32)
        warps = 8 if triton.cdiv(N, outputs) <= ROW_PROGRAMS else 4
        return Config(1, outputs, ROW_TILE * warps // outputs, STAGES, warps)
    rows = max(LEAST_ROWS, triton.next_power_of_2(B))
    rows, outputs = (rows, _outputs(N, TILES, 16, MOST)) if rows <= ONE_TILE_ROWS else _tile(B, N)
    step = 128 if rows + outputs <= 96 else 64  # 16 to 32 KiB
    stages = LONG_STAGES if D >= LONG and outputs >= 32 else STAGES
    return Config(rows, outputs, step, stages, warps=2 if rows <= 32 else 4 if rows == 64 else 8)


def _tile(B: int, N: int) -> tuple[int, int]:
    """(rows, outputs) of the tile that reads the least per number of its result, among those that give at least
    LEAST_TILES tiles."""
    shapes = [
        (rows, outputs)
        for rows in (ONE_TILE_ROWS, MOST)
        for outputs in (16, 32, 64, MOST)
        if triton.cdiv(B, rows) * triton.cdiv(N, outputs) >= LEAST_TILES
    ]
    return min(shapes, key=lambda shape: 1 / shape[0] + 1 / shape[1], default=(ONE_TILE_ROWS, 16))


def _outputs(N: int, programs: int, least: int, most: int) -> int:
    """The widest tile, a power of two from `least` to `most`, that gives at least `programs` programs."""
    outputs = most
    while outputs > least and triton.cdiv(N, outputs) < programs:
        outputs //= 2
    return outputs


@triton.jit
def tile_product(
    x_ptr, weight_N, row, rows, D, first, last,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x Wᵀ float32 [BM, BN] over the numbers first … last − 1 of each row; arguments as row_product's. Waits for a
    dependent launch."""
    dependent_launch.wait(PDL)
    product = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_N[None, :] + k[:, None], mask=(k < last)[:, None], other=0.0)
        use = (row < rows)[:, None] & (k < last)[None, :]
        x = tl.load(x_ptr + (row.to(tl.int64) * D)[:, None] + k[None, :], mask=use, other=0.0)
        product = tl.dot(x, weight, product, input_precision=PRECISION)
    return product


@triton.jit
def row_product(
    x_ptr, norm_ptr, weight_N, row, rows, D,
    HAS_NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(x·g Wᵀ float32 [BM, BN], Σx² [BM]) of BM rows and BN rows of weights; without HAS_NORM (x Wᵀ, 0). HAS_NORM: only
    with one row.

    x_ptr: contiguous [rows, D]. norm_ptr: g [D]. weight_N: pointers [BN] to rows of D adjacent numbers. row: [BM] row
    numbers; rows from `rows` on give 0. WHOLE, for one row: above 0, all weights are loaded at once, WHOLE numbers per
    row, before the wait of a dependent launch; 0: in steps of BK, after the wait.
    """
    if BM == 1:
        x_row = x_ptr + tl.sum(row.to(tl.int64), 0) * D
        square = tl.zeros([1], tl.float32)
        if WHOLE > 0:
            k = tl.arange(0, WHOLE)
            weight = tl.load(weight_N[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
            dependent_launch.wait(PDL)
            dependent_launch.release(PDL)  # so the next kernel starts to load its weights while this one waits for x
            x = tl.load(x_row + k, mask=k < D, other=0.0).to(tl.float32)
            if HAS_NORM:
                square += tl.sum(x * x, axis=0)
                x *= tl.load(norm_ptr + k, mask=k < D, other=0.0).to(tl.float32)
            product = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        else:
            dependent_launch.wait(PDL)
            acc = tl.zeros([BN, BK], tl.float32)
            squares = tl.zeros([BK], tl.float32)
            for start in tl.range(0, D, BK, num_stages=STAGES):
                k = start + tl.arange(0, BK)
                weight = tl.load(weight_N[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
                x = tl.load(x_row + k, mask=k < D, other=0.0).to(tl.float32)
                if HAS_NORM:
                    squares += x * x
                    x *= tl.load(norm_ptr + k, mask=k < D, other=0.0).to(tl.float32)
                acc += weight.to(tl.float32) * x[None, :]
            product = tl.sum(acc, axis=1)
            square += tl.sum(squares, axis=0)
        product = product[None, :]
    else:
        product = tile_product(x_ptr, weight_N, row, rows, D, 0, D, BM, BN, BK, STAGES, PRECISION, PDL)
        square = tl.zeros([BM], tl.float32)
    dependent_launch.release(PDL)
    return product, square


def norm_of(x_BD: Tensor, norm_D: Tensor | None) -> dict[str, tuple[Tensor, int]]:
    """`check`'s vectors for a kernel with a norm; none if x is normed already."""
    return {} if norm_D is None else {"norm": (norm_D, x_BD.shape[-1])}


def norm_reference(x_BD: Tensor, norm_D: Tensor | None, eps: float) -> Tensor:
    """The norm in plain torch; x itself without one."""
    return x_BD if norm_D is None else rmsnorm.reference(x_BD, norm_D, eps)


def norms(norm_D: Tensor | None, cut: Config) -> bool:
    """Whether the product's loop applies the norm."""
    return norm_D is not None and cut.rows == 1


def normed(x_BD: Tensor, norm_D: Tensor | None, eps: float, cut: Config) -> Tensor:
    """The input for a kernel with a norm: x, or rmsnorm(x)·g if there is a norm that the kernel's loop does not
    apply."""
    return x_BD if norm_D is None or norms(norm_D, cut) else rmsnorm.rms_norm(x_BD, norm_D, eps)


def options(x: Tensor, cut: Config) -> dict[str, object]:
    """The constants and options for the launch of a kernel that uses `row_product`."""
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    pdl, size = dependent_launch.on(x), x.element_size()
    whole = triton.next_power_of_2(x.shape[1])
    if cut.rows > 1 or whole * cut.outputs * size > ROW_WHOLE * cut.warps:
        whole = 0
    return dict(
        BM=cut.rows, BN=cut.outputs, BK=cut.step * 2 // size, STAGES=cut.stages, WHOLE=whole,
        PRECISION=precision, PDL=pdl, num_warps=cut.warps, launch_pdl=pdl,
    )  # fmt: skip


def check(x_BD: Tensor, vectors: dict[str, tuple[Tensor, int]], weights: dict[str, Tensor], x_name: str = "x") -> None:
    """ValueError, with the argument's name, unless x is [B, D], `vectors` have their lengths and `weights` are [N, D].

    All must be contiguous, of x's dtype, and on one device.
    """
    if x_BD.dim() != 2 or not x_BD.is_floating_point() or not x_BD.is_contiguous() or not x_BD.shape[1]:
        raise ValueError(
            f"{x_name} must be contiguous, floating, [B, D] with D > 0; got {x_BD.dtype} {tuple(x_BD.shape)}"
        )
    for name, (vector, size) in vectors.items():
        if vector.shape != (size,) or vector.dtype != x_BD.dtype or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x_BD.dtype} [{size}], got {vector.dtype} {tuple(vector.shape)}"
            )
        check_devices(**{x_name: x_BD, name: vector})
    for name, weight in weights.items():
        fits = weight.dim() == 2 and weight.shape[1] == x_BD.shape[1] and weight.shape[0]
        if not fits or weight.dtype != x_BD.dtype or not weight.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x_BD.dtype} [outputs, {x_BD.shape[1]}], got {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        check_devices(**{x_name: x_BD, name: weight})
