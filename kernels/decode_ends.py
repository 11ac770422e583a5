"""The first and the last step of a decoding pass, a kernel each: what the layers read, and what the host reads.

As separate operators they take about ten kernels. Each of those takes a microsecond or more, however little it does.

B rows · D hidden · F = d/2 frequencies · V vocabulary
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dependent_launch
from kernels.backend import check_devices, runs_triton, tl, triton

_BLOCK = 1024


def fed(tokens_B: Tensor, last: Tensor) -> Tensor:
    """The token ids to feed: tokens, where −1 − i stands for last[i]."""
    return torch.where(tokens_B >= 0, tokens_B, last[(-1 - tokens_B).clamp(min=0)])


class Start(NamedTuple):
    """x_BD: embeddings. cos_BF, sin_BF: of the rows' rotary positions. lengths_B: int32, the positions."""

    x_BD: Tensor
    cos_BF: Tensor
    sin_BF: Tensor
    lengths_B: Tensor


def start_reference(
    tokens_B: Tensor, last: Tensor, positions_B: Tensor, rotary_B: Tensor, embed_VD: Tensor, cos: Tensor, sin: Tensor
) -> Start:
    """As `start`, in plain torch."""
    return Start(F.embedding(fed(tokens_B, last), embed_VD), cos[rotary_B], sin[rotary_B], positions_B.to(torch.int32))


def start(
    tokens_B: Tensor, last: Tensor, positions_B: Tensor, rotary_B: Tensor, embed_VD: Tensor, cos: Tensor, sin: Tensor
) -> Start:
    """What the layers of a pass read; no gradients.

    Args:
      tokens_B: int64 [B], ids below V, or references to `last`; see fed.
      last: int64, ids that the pass before has drawn.
      positions_B, rotary_B: int64 [B], each token's place in its row, and the place in the tables of angles.
      embed_VD: [V, D]. cos, sin: [rotary positions, F].
    All contiguous. Raises ValueError for arguments that do not fit.
    """
    numbers = {"tokens": tokens_B, "last": last, "positions": positions_B, "rotary": rotary_B}
    _check({**numbers, "embed": embed_VD, "cos": cos, "sin": sin})
    for name in ("positions", "rotary"):
        if numbers[name].shape != tokens_B.shape:
            raise ValueError(f"{name} must be [{len(tokens_B)}] like tokens, got {tuple(numbers[name].shape)}")
    return Start(*torch.ops.qwen3f.decode_start(*numbers.values(), embed_VD, cos, sin))


def pack(ids_B: Tensor, log_probs_B: Tensor, finite_B: Tensor) -> Tensor:
    """float64 [3, B]: ids, log_probs and finite in one tensor, for one copy to the host."""
    _check({"ids": ids_B, "log_probs": log_probs_B, "finite": finite_B})
    return torch.ops.qwen3f.decode_pack(ids_B, log_probs_B, finite_B)


def _check(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()} of {tuple(x.shape)}")
    check_devices(**tensors)


@triton.jit
def _start_kernel(
    tokens_ptr, last_ptr, positions_ptr, rotary_ptr, embed_ptr, cos_table_ptr, sin_table_ptr, x_ptr, cos_ptr, sin_ptr,
    lengths_ptr, D, F, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, BLOCK numbers of D; the first program of a row also has the angles."""
    row, block = tl.program_id(0), tl.program_id(1)
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    token = tl.load(tokens_ptr + row)
    drawn = tl.load(last_ptr + tl.maximum(-1 - token, 0), mask=token < 0, other=0)
    token = tl.where(token < 0, drawn, token)
    d = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(embed_ptr + token.to(tl.int64) * D + d, mask=d < D, other=0.0)
    tl.store(x_ptr + row.to(tl.int64) * D + d, x, mask=d < D)
    if block == 0:
        place = tl.load(rotary_ptr + row)
        for at in range(0, F, BLOCK):
            f = at + tl.arange(0, BLOCK)
            from_place, to = place.to(tl.int64) * F + f, row.to(tl.int64) * F + f
            tl.store(cos_ptr + to, tl.load(cos_table_ptr + from_place, mask=f < F, other=0.0), mask=f < F)
            tl.store(sin_ptr + to, tl.load(sin_table_ptr + from_place, mask=f < F, other=0.0), mask=f < F)
        tl.store(lengths_ptr + row, tl.load(positions_ptr + row).to(tl.int32))


@triton.jit
def _pack_kernel(ids_ptr, log_probs_ptr, finite_ptr, out_ptr, rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    tl.store(out_ptr + row, tl.load(ids_ptr + row, mask=inside, other=0).to(tl.float64), mask=inside)
    tl.store(out_ptr + rows + row, tl.load(log_probs_ptr + row, mask=inside, other=0.0).to(tl.float64), mask=inside)
    tl.store(out_ptr + 2 * rows + row, tl.load(finite_ptr + row, mask=inside, other=0).to(tl.float64), mask=inside)


@torch.library.custom_op("qwen3f::decode_start", mutates_args=())
def _start_op(
    tokens: Tensor, last: Tensor, positions: Tensor, rotary: Tensor, embed: Tensor, cos_table: Tensor, sin_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_triton(embed) or not len(tokens):
        return tuple(start_reference(tokens, last, positions, rotary, embed, cos_table, sin_table))
    (B,), D, f = tokens.shape, embed.shape[1], cos_table.shape[1]
    x, cos, sin, lengths = _start_fake(tokens, last, positions, rotary, embed, cos_table, sin_table)
    pdl = dependent_launch.on(embed)
    with torch.cuda.device_of(embed):
        _start_kernel[(B, triton.cdiv(D, _BLOCK))](
            tokens, last, positions, rotary, embed, cos_table, sin_table, x, cos, sin, lengths, D, f, BLOCK=_BLOCK,
            PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
    return x, cos, sin, lengths


@_start_op.register_fake
def _start_fake(
    tokens: Tensor, last: Tensor, positions: Tensor, rotary: Tensor, embed: Tensor, cos_table: Tensor, sin_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B = tokens.shape[0]
    return (
        embed.new_empty(B, embed.shape[1]),
        cos_table.new_empty(B, cos_table.shape[1]),
        sin_table.new_empty(B, sin_table.shape[1]),
        positions.new_empty(B, dtype=torch.int32),
    )


@torch.library.custom_op("qwen3f::decode_pack", mutates_args=())
def _pack_op(ids: Tensor, log_probs: Tensor, finite: Tensor) -> Tensor:
    if not runs_triton(log_probs) or not len(ids):
        return torch.stack([ids.double(), log_probs.double(), finite.double()])
    out, pdl = _pack_fake(ids, log_probs, finite), dependent_launch.on(log_probs)
    with torch.cuda.device_of(log_probs):
        _pack_kernel[(triton.cdiv(len(ids), 256),)](
            ids, log_probs, finite.view(torch.int8), out, len(ids), BLOCK=256, PDL=pdl, launch_pdl=pdl
        )
    return out


@_pack_op.register_fake
def _pack_fake(ids: Tensor, log_probs: Tensor, finite: Tensor) -> Tensor:
    return log_probs.new_empty(3, ids.shape[0], dtype=torch.float64)
