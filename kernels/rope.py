"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of queries and keys in one launch.

A program rotates a tile of heads of q or k; each element is read and written once. The gradient is a rotation by the
opposite angle, with the same kernel. There are no sums, so a rerun is bit-identical.

B batch · T sequence · H query heads · K key heads · d head_dim · F = d/2 frequencies
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import runs_triton, tl, triton

MAX_HEAD_DIM = 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reference(q_BTHd: Tensor, k_BTKd: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> tuple[Tensor, Tensor]:
    """qwen3f.model.rope.apply_rope for q and k, in plain torch; works with torch.func."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    cos, sin = cos_BTF[:, :, None], sin_BTF[:, :, None]
    return turn(q_BTHd), turn(k_BTKd)


def rope(
    q_BTHd: Tensor, k_BTKd: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate dimension pairs (i, i + d/2) of every head of q and k by each token's angles.

    Computed in float32 and rounded once (the formula, used on CPUs and for float64, rounds each product).

    Args:
      q_BTHd, k_BTKd: bfloat16, float16, float32 or float64, d even and ≤ MAX_HEAD_DIM, adjacent in memory; any other
        strides, e.g. [B, H, T, d] transposed.
      cos_BTF, sin_BTF: of q's dtype, F adjacent; the batch dimension may be expanded (stride 0). Not differentiated.
        Any tables work, e.g. with YaRN's factor, or of several axes (`mrope_tables`).
      inplace: write into q and k, and return them. Only without gradients.
    Returns q and k rotated, contiguous unless in place. Gradients of any order in q and k.
    Raises ValueError for shapes, dtypes, devices or strides other than these.
    """
    check(q_BTHd, k_BTKd, cos_BTF, sin_BTF)
    if not inplace:
        return torch.ops.qwen3f.rope(q_BTHd, k_BTKd, cos_BTF, sin_BTF, False)
    for name, x in (("q", q_BTHd), ("k", k_BTKd)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name} requires a gradient: rope(inplace=True) records none, use inplace=False")
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(f"{name} is expanded (strides {x.stride()}): rope(inplace=True) would turn heads twice")
    torch.ops.qwen3f.rope_(q_BTHd, k_BTKd, cos_BTF, sin_BTF)
    return q_BTHd, k_BTKd


def mrope_tables(
    positions_3BT: Tensor, inv_freq_F: Tensor, sections: tuple[int, int, int], dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, F] of Qwen3-VL's interleaved MRoPE, in which frequencies alternate between the three axes.

    Frequency i uses the height if i % 3 = 1 and i < 3·sections[1], the width if i % 3 = 2 and i < 3·sections[2], and
    otherwise the time. Angles are at least float32.

    Args:
      positions_3BT: int64 positions in time, height and width. inv_freq_F: radians per position.
      sections: number of frequencies of each axis, e.g. (24, 20, 20); their sum is F. scale: factor of cos and sin.
    """
    size = inv_freq_F.shape[0]
    if len(sections) != 3 or sum(sections) != size or positions_3BT.shape[0] != 3:
        raise ValueError(
            f"sections must be three numbers of sum {size} and positions [3, B, T], "
            f"got {tuple(sections)} and {tuple(positions_3BT.shape)}"
        )
    axis = torch.zeros(size, dtype=torch.int64)
    for a in (1, 2):
        axis[a : 3 * sections[a] : 3] = a
    wide = torch.promote_types(torch.float32, inv_freq_F.dtype)
    positions_BTF = positions_3BT[axis.to(positions_3BT.device)].permute(1, 2, 0).to(wide)
    angles = positions_BTF * inv_freq_F
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Config(NamedTuple):
    """Heads per tile, warps per program; for programs that loop also stages, and programs per multiprocessor."""

    rows: int
    warps: int
    stages: int = 1
    per_processor: int = 1


def rope_config(half: int) -> Config:
    """2048 pairs per program, so that each thread has eight 16-byte loads in flight."""
    return Config(rows=max(1, 2048 // triton.next_power_of_2(half)), warps=4)


@triton.jit
def head_offset(row, T, stride_b, stride_t, stride_h, HEADS: tl.constexpr):
    """Offsets (int64) of heads in a [B, T, HEADS, d] tensor. row: their numbers, counted with HEADS fastest."""
    token = row // HEADS
    batch, time = (token // T).to(tl.int64), (token % T).to(tl.int64)
    return batch * stride_b + time * stride_t + (row % HEADS).to(tl.int64) * stride_h


@triton.jit
def table_offset(row, T, stride_b, stride_t, HEADS: tl.constexpr):
    """Offsets (int64) of those heads' angles in a [B, T, F] table."""
    token = row // HEADS
    return (token // T).to(tl.int64) * stride_b + (token % T).to(tl.int64) * stride_t


@triton.jit
def _rotate(
    x_ptr, out_ptr, cos_ptr, sin_ptr, block, rows, T, half, x_b, x_t, x_h, out_b, out_t, out_h, table_b, table_t,
    HEADS: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = block * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (col < half)
    at = head_offset(row, T, x_b, x_t, x_h, HEADS)[:, None] + col
    first = tl.load(x_ptr + at, mask=mask).to(tl.float32)
    second = tl.load(x_ptr + at + half, mask=mask).to(tl.float32)
    angle = table_offset(row, T, table_b, table_t, HEADS)[:, None] + col
    cos = tl.load(cos_ptr + angle, mask=mask).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask).to(tl.float32)
    if INVERSE:
        sin = -sin
    to = head_offset(row, T, out_b, out_t, out_h, HEADS)[:, None] + col
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + to, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_ptr + to + half, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, q_blocks, q_rows, k_rows, T, half,
    q_b, q_t, q_h, k_b, k_t, k_h, q_out_b, q_out_t, q_out_h, k_out_b, k_out_t, k_out_h, table_b, table_t,
    H: tl.constexpr, K: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < q_blocks:
        _rotate(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, block, q_rows, T, half,
            q_b, q_t, q_h, q_out_b, q_out_t, q_out_h, table_b, table_t, H, INVERSE, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, block - q_blocks, k_rows, T, half,
            k_b, k_t, k_h, k_out_b, k_out_t, k_out_h, table_b, table_t, K, INVERSE, ROWS, BLOCK,
        )  # fmt: skip


def launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, inverse: bool, config: Config
) -> None:
    """Rotate q into q_out and k into k_out by Triton. Input and output may be the same tensor."""
    _, T, H, d = q.shape
    q_rows, k_rows = (x.numel() // d for x in (q, k))
    if not q_rows + k_rows:
        return
    cos, sin = same_strides(cos, sin)
    q_blocks, k_blocks = triton.cdiv(q_rows, config.rows), triton.cdiv(k_rows, config.rows)
    with torch.cuda.device_of(q):
        _rope_kernel[(q_blocks + k_blocks,)](
            q, k, q_out, k_out, cos, sin, q_blocks, q_rows, k_rows, T, d // 2,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *cos.stride()[:2],
            H, k.shape[2], inverse, config.rows, triton.next_power_of_2(d // 2), num_warps=config.warps,
        )  # fmt: skip


def same_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def dense(x: Tensor) -> Tensor:
    """x with d adjacent; a copy if needed, because gradients may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("qwen3f::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if not runs_triton(q):
        return reference(q, k, cos, -sin if inverse else sin)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    launch(dense(q), dense(k), q_out, k_out, cos, sin, inverse, rope_config(q.shape[-1] // 2))
    return q_out, k_out


@torch.library.custom_op("qwen3f::rope_", mutates_args=("q", "k"))
def _rope_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if runs_triton(q):
        launch(q, k, q, k, cos, sin, False, rope_config(q.shape[-1] // 2))
        return
    for x, turned in zip((q, k), reference(q, k, cos, sin)):
        x.copy_(turned)


@_rope.register_fake
def _rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_rope_in_place.register_fake
def _rope_in_place_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.inverse = inputs[4]


def _gradients(ctx: Context, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *torch.ops.qwen3f.rope(dq, dk, cos, sin, not ctx.inverse), None, None, None


_rope.register_autograd(_gradients, setup_context=_save)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """ValueError unless shapes, dtypes, strides and devices of q, k and the tables fit together."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; it may be {', '.join(str(d) for d in DTYPES)}")
    if q.dim() != 4 or q.shape[-1] % 2 or not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q must be [B, T, H, d] with d even and ≤ {MAX_HEAD_DIM}, got {tuple(q.shape)}")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must be [B, T, K, d] with q's B, T, d, got {tuple(k.shape)} beside q {tuple(q.shape)}")
    table = (*q.shape[:2], q.shape[3] // 2)
    named = {"q": q, "k": k, "cos": cos, "sin": sin}
    for name, x in named.items():
        if name in ("cos", "sin") and x.shape != table:
            raise ValueError(f"{name} must be [B, T, d/2] = {table}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q {q.dtype}; they must be the same")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; pass {name}.contiguous()")
    backend.check_devices(**named)
