"""Grouped linear layers: rows are sorted by expert, and each expert's rows are multiplied by its own weight.

There is no capacity, no padding and no dropped row, so the work depends only on the number of rows. On a GPU the host
does not read the counts: a small kernel turns them into a list of row blocks, each of one expert. The list has a static
length, and programs without a block end at once. Blocks of one expert are adjacent, so that its weight stays in the L2
cache. On a CPU it is a loop with one product per expert. (torch.nn.functional.grouped_mm in torch 2.11 to 2.13 does not
support float64, or rows that are not a multiple of 16 bytes.)

The kernels accumulate in float32, round once, and add in a fixed order, so a rerun gives the same bits.

N rows · E experts · D input width · F output width
In kernels, y[rows, columns] = Σ_K a b: M × N tiles of y in steps of K; BM, BN, BK are the tile's sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import check_devices, runs_triton, tl, triton


def reference(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y[n] = weight[expert of row n] x[n], with a copy of the weight for every row; works with torch.func.grad."""
    experts = torch.arange(weight_EFD.shape[0], device=x_ND.device)
    expert_N = experts.repeat_interleave(counts_E.to(x_ND.device), output_size=x_ND.shape[0])
    return torch.einsum("nd,nfd->nf", x_ND, weight_EFD[expert_N])


def grouped_linear(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """[N, F] in x's dtype: the first counts[0] rows of x times weight[0]ᵀ, the next counts[1] times weight[1]ᵀ, …

    Args:
      x_ND, weight_EFD: one floating dtype and device; gradients of any order in both.
      counts_E: int64, the number of rows of each expert, with sum N, on the same device. On a CPU the sum is checked.
        On a GPU a check would wait for the device; there, rows beyond the sum are not written.
    Raises ValueError for shapes, dtypes, devices or counts that do not fit together.
    """
    _check(x_ND, weight_EFD, counts_E)
    return torch.ops.qwen3f.grouped_linear(x_ND, weight_EFD, counts_E)


class Tile(NamedTuple):
    """The tiles of one product.

    m, n, k: BM, BN, BK. warps, stages: of a program. per_sm: programs per multiprocessor, each of which loops over many
    tiles; 0: one program per tile. flat: such a loop loads the next tile's first operands while it writes the current
    tile. tma: load operands with a suitable layout through the copy engine (TMA). pieces: log2 of the number of parts
    in which a long epilogue is computed.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    per_sm: int = 0
    flat: bool = False
    tma: bool = True
    pieces: int = 0


_TILES = {  # 2-byte types
    "linear": Tile(128, 256, 64, 8, 3, per_sm=1, flat=True),
    "linear2": Tile(128, 256, 32, 8, 4, tma=False),
    "outer": Tile(256, 128, 64, 8, 3),
    "up": Tile(128, 128, 64, 8, 4),
    "activation": Tile(128, 256, 64, 8, 4, pieces=3),
}
_WIDE_TILE = Tile(64, 64, 32, 4, 2, tma=False, pieces=1)  # float32, without tensor cores


def tile_of(kind: str, dtype: torch.dtype) -> Tile:
    """The tile of one of the products: "linear", "linear2" (the sum of two), "outer", "up", "activation"."""
    return _TILES[kind] if dtype.itemsize == 2 else _WIDE_TILE


class Schedule(NamedTuple):
    """tiles: int32 [T, 3]: each block's expert, first row, end of the expert's rows. count: int32 [1], blocks."""

    tiles: Tensor
    count: Tensor


def schedule(offsets_E1: Tensor, rows: int, block: int) -> Schedule:
    """The row blocks of all experts, computed on the device. offsets: int32 [E + 1], each expert's first row."""
    experts = len(offsets_E1) - 1
    length = triton.cdiv(rows, block) + experts
    tiles, count = offsets_E1.new_empty(length, 3), offsets_E1.new_empty(1)
    _schedule_kernel[(triton.cdiv(length, 64),)](
        offsets_E1, tiles, count, experts, length, block, triton.next_power_of_2(experts), BLOCK=64, num_warps=4
    )
    return Schedule(tiles, count)


@triton.jit(do_not_specialize=("length",))  # it depends on the number of rows, see moe_dispatch
def _schedule_kernel(
    offsets, tiles, count, experts, length, BM: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    e = tl.arange(0, EXPERTS)
    first = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    need = tl.maximum(end - first + BM - 1, 0) // BM
    upto = tl.cumsum(need)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((upto[None, :] <= t[:, None]).to(tl.int32), 1)
    mine = e[None, :] == expert[:, None]
    row = first[None, :] + (t[:, None] - (upto - need)[None, :]) * BM
    at = tiles + t * 3
    tl.store(at, expert, mask=t < length)
    tl.store(at + 1, tl.sum(tl.where(mine, row, 0), 1), mask=t < length)
    tl.store(at + 2, tl.sum(tl.where(mine, end[None, :], 0), 1), mask=t < length)
    if tl.program_id(0) == 0:
        tl.store(count, tl.sum(need))


@triton.jit
def weight_tile(
    w, expert, n0, k0, N, K, stride_e, stride_n, stride_k,
    TMA: tl.constexpr, K_INNER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A tile [BK, BN] of an expert's weight. With TMA, w is a descriptor of [E·N, K] (K_INNER) or [E·K, N]."""
    if TMA:
        if K_INNER:
            tile = w.load([expert * N + n0, k0]).T
        else:
            tile = w.load([expert * K + k0, n0])
    else:
        n = n0 + tl.arange(0, BN)
        k = k0 + tl.arange(0, BK)
        at = w + expert.to(tl.int64) * stride_e + n[None, :] * stride_n + k[:, None] * stride_k
        tile = tl.load(at, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
    return tile


@triton.jit
def _linear_kernel(
    a, b, a2, b2, y, tiles, count, N, K, stride_e, stride_n, stride_k,
    PARTS: tl.constexpr, TMA: tl.constexpr, K_INNER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for pid in tl.range(tl.program_id(0), tl.load(count) * blocks, stride(PROGRAMS), flatten=FLAT):
        tile = pid // blocks
        n0 = pid % blocks * BN
        expert = tl.load(tiles + tile * 3)
        first = tl.load(tiles + tile * 3 + 1)
        end = tl.load(tiles + tile * 3 + 2)
        rows = first + tl.arange(0, BM)
        k = tl.arange(0, BK)
        at = tl.minimum(rows, end - 1).to(tl.int64)[:, None] * K + k[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, steps * PARTS):
            a_now = a
            b_now = b
            k0 = step * BK
            if PARTS == 2:  # noqa: SIM102 (one is the compiler's)
                if step >= steps:  # the second product follows the first; two per step would wait for each other
                    a_now = a2
                    b_now = b2
                    k0 -= steps * BK
            if TMA:
                a_tile = a_now.load([first, k0])
            else:
                a_tile = tl.load(a_now + at + k0, mask=k[None, :] < K - k0, other=0.0)
            b_tile = weight_tile(b_now, expert, n0, k0, N, K, stride_e, stride_n, stride_k, TMA, K_INNER, BN, BK)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        n = n0 + tl.arange(0, BN)
        out = y + rows.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[:, None] < end) & (n[None, :] < N))


@triton.jit
def _outer_kernel(
    a, b, order, y, offsets, M, N, stride_e, stride_m, stride_n,
    TOP_K: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    blocks_m = tl.cdiv(M, BM)
    blocks = blocks_m * tl.cdiv(N, BN)
    expert = tl.program_id(0) // blocks
    m0 = tl.program_id(0) % blocks % blocks_m * BM
    n0 = tl.program_id(0) % blocks // blocks_m * BN
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    row_b = first + k
    if TOP_K > 0:
        row_b = tl.load(order + row_b, mask=row_b < end, other=0) // TOP_K
    for start in range(first, end, BK):
        rows = start + k
        if TMA:
            a_tile = a.load([start, m0])
        else:
            at = rows.to(tl.int64)[:, None] * M + m[None, :]
            a_tile = tl.load(a + at, mask=(rows[:, None] < end) & (m[None, :] < M), other=0.0)
        at = row_b.to(tl.int64)[:, None] * N + n[None, :]
        b_tile = tl.load(b + at, mask=(rows[:, None] < end) & (n[None, :] < N), other=0.0)
        row_b = rows + BK
        if TOP_K > 0:  # load the order one step ahead, so that the row's load does not wait for it
            row_b = tl.load(order + row_b, mask=row_b < end, other=0) // TOP_K
        acc = tl.dot(a_tile.T, b_tile, acc, input_precision="ieee")
    out = y + expert.to(tl.int64) * stride_e + m[:, None] * stride_m + n[None, :] * stride_n
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def launch_linear(
    a: Tensor, weight_EFD: Tensor, plan: Schedule, tile: Tile, second: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """y = a weight[expert]ᵀ for rows sorted by expert; with second = (a2, weight2), the sum of both products."""
    a2, weight2 = second or (a, weight_EFD)
    columns, width = weight_EFD.shape[1:]
    k_inner = weight_EFD.stride(2) == 1
    weight_EFD, weight2 = (w if w.stride() == weight_EFD.stride() else w.contiguous() for w in (weight_EFD, weight2))
    y = a.new_empty(a.shape[0], columns)
    tma = tile.tma and all(tiled(x) for x in (a, a2)) and all(tiled(w) or tiled(w.mT) for w in (weight_EFD, weight2))
    tma = tma and (k_inner or width % tile.k == 0)  # else a tile would read rows of the next expert
    operands = (a, weight_EFD, a2, weight2)
    if tma:
        operands = [describe(x, tile.m, tile.k) if x.dim() == 2 else describe_weight(x, tile) for x in operands]
    blocks = len(plan.tiles) * triton.cdiv(columns, tile.n)
    grid, step = programs(a, tile, blocks)
    _linear_kernel[(grid,)](
        *operands, y, *plan, columns, width, *weight_EFD.stride(),
        PARTS=2 if second else 1, TMA=tma, K_INNER=k_inner, BM=tile.m, BN=tile.n, BK=tile.k,
        PROGRAMS=step, FLAT=tile.flat, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def launch_outer(
    a_RM: Tensor,
    b: Tensor,
    offsets_E1: Tensor,
    tile: Tile,
    order_R: Tensor | None = None,
    top_k: int = 0,
    swap: bool = False,
) -> Tensor:
    """aᵀ b over each expert's rows, [E, M, N], or [E, N, M] if `swap`. With order, row r of b is b[order[r] // top_k].

    An expert's last block may include rows of a that belong to the next expert; they are multiplied by zeros. So a NaN
    in them reaches this expert too.
    """
    experts, rows, columns = len(offsets_E1) - 1, a_RM.shape[1], b.shape[1]
    y = a_RM.new_empty((experts, columns, rows) if swap else (experts, rows, columns))
    tma = tile.tma and tiled(a_RM)
    _outer_kernel[(experts * triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)](
        describe(a_RM, tile.k, tile.m) if tma else a_RM, b, order_R, y, offsets_E1, rows, columns,
        *(y.mT if swap else y).stride(),
        TOP_K=top_k, TMA=tma, BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def programs(x: Tensor, tile: Tile, blocks: int) -> tuple[int, int]:
    """(number of programs for `blocks` tiles, the kernels' constant PROGRAMS).

    PROGRAMS is a compile-time constant, so it must not depend on the number of rows, which changes with every call
    under expert parallelism.
    """
    if not tile.per_sm:
        return blocks, 0
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(blocks, processors * tile.per_sm), processors * tile.per_sm


@triton.jit
def stride(PROGRAMS: tl.constexpr):
    """The distance from one tile of a program to its next one. PROGRAMS is 0 if every program has at most one tile."""
    if PROGRAMS == 0:
        return tl.num_programs(0)
    else:
        return PROGRAMS


def tiled(x: Tensor) -> bool:
    """Whether the copy engine can read x: contiguous, with every row at a multiple of 16 bytes."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0


def describe(x: Tensor, rows: int, columns: int) -> object:
    """A TMA descriptor for loads of blocks [rows, columns] of a matrix; elements beyond its edges are read as 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def describe_weight(weight_EFD: Tensor, tile: Tile) -> object:
    """A TMA descriptor of the experts' weight, or of a transposed view of it, for weight_tile."""
    if weight_EFD.stride(2) == 1:
        return describe(weight_EFD.flatten(0, 1), tile.n, tile.k)
    return describe(weight_EFD.mT.flatten(0, 1), tile.k, tile.n)


@torch.library.custom_op("qwen3f::grouped_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if not x.numel() or not weight.numel():
        return x.new_zeros(x.shape[0], weight.shape[1])
    if runs_triton(x):
        tile = tile_of("linear", x.dtype)
        plan = schedule(offsets_of(counts, x.shape[0]), x.shape[0], tile.m)
        return launch_linear(x.contiguous(), weight, plan, tile)
    return linear_formula(x, weight, counts)


@torch.library.custom_op("qwen3f::grouped_outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """[E, A, B] from a [N, A] and b [N, B]: aᵀb over each expert's rows; zeros where there are none."""
    if not a.numel() or not b.numel():
        return a.new_zeros(counts.shape[0], a.shape[1], b.shape[1])
    if runs_triton(a):
        return launch_outer(a.contiguous(), b.contiguous(), offsets_of(counts, a.shape[0]), tile_of("outer", a.dtype))
    return outer_formula(a, b, counts)


def linear_formula(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """grouped_linear as a loop over experts. If the counts are on a GPU, it waits for the device."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in _slices(counts, x.shape[0]):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
    return out


def outer_formula(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """The gradient of grouped_linear in its weight, aᵀb of each expert's rows, as a loop."""
    out = a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
    for expert, rows in _slices(counts, a.shape[0]):
        torch.mm(a[rows].t(), b[rows], out=out[expert])
    return out


def offsets_of(counts_E: Tensor, rows: int) -> Tensor:
    """int32 [E + 1]: each expert's first row, clamped to the number of rows in case counts are wrong."""
    return torch.nn.functional.pad(counts_E.cumsum(0), (1, 0)).clamp(0, rows).to(torch.int32)


@_linear.register_fake
def _linear_fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _outer_fake(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    dx = torch.ops.qwen3f.grouped_linear(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dw = torch.ops.qwen3f.grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _outer_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, counts = ctx.saved_tensors
    da = torch.ops.qwen3f.grouped_linear(b, grad, counts) if ctx.needs_input_grad[0] else None
    db = torch.ops.qwen3f.grouped_linear(a, grad.transpose(1, 2), counts) if ctx.needs_input_grad[1] else None
    return da, db, None


_linear.register_autograd(_linear_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)

GROUPED_LINEAR = torch.ops.qwen3f.grouped_linear.default


def _slices(counts: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    sizes = counts.tolist()
    if min(sizes) < 0 or sum(sizes) != rows:
        raise ValueError(f"counts must be rows of each expert and sum to {rows}, got {sizes}")
    start = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(start, start + size)
        start += size


def _check(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [N, D] and weight [E, F, D], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, got {x.dtype}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int64:
        raise ValueError(f"counts must be int64 [{weight.shape[0]}], got {counts.dtype} {tuple(counts.shape)}")
    check_devices(x=x, counts=counts)
