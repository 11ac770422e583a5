"""Softmax of rows of logits in Triton: statistics of the rows, and the gradient, which overwrites the logits.

There is one program per row. Each of its threads keeps a running maximum and sum (online softmax, Milakov & Gimelshein,
arXiv:1805.02867); they are merged once at the end, so that no barrier interrupts the loads. The row is read a second
time for the gradient, backward, because its end is then still in the L2 cache.

Sums are float32; the same input gives the same bits. Offsets are int64; rows may have any stride, columns must be
contiguous.

N rows (tokens) · V columns (a vocabulary, or one shard of it)
"""

import dataclasses

import torch
from torch import Tensor

from kernels.backend import tl, triton

IGNORE = -100  # the kernel repeats this number, because kernels can't read plain globals


@dataclasses.dataclass(frozen=True)
class Launch:
    """block: columns per step, a power of two ≥ 8. warps: per program. stages: blocks in flight plus one."""

    block: int
    warps: int
    stages: int


def launch_for(vocabulary: int) -> Launch:
    """The fastest on an H100 at V 151,936: two programs per multiprocessor, whose rows about fit into the L2 cache."""
    block = min(max(triton.next_power_of_2(vocabulary), 512), 16384)
    return Launch(block, warps=block // 512, stages=1)


def statistics(logits_NV: Tensor, targets_N: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    """(log Σ exp, the target's logit) of each row, float32; logit 0 for a target outside [vocab_start, +V)."""
    lse_N, target_N = (torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    _run(_statistics_kernel, logits_NV, targets_N, vocab_start, lse_N, target_N)
    return lse_N, target_N


def gradient_(
    logits_NV: Tensor, targets_N: Tensor, vocab_start: int, lse_N: Tensor, d_lse_N: Tensor, d_target_N: Tensor
) -> None:
    """Overwrite logits with d_lse · exp(logits − lse) + d_target · [column is the target], rounded to their dtype.

    A row with d_lse = d_target = 0 becomes exactly 0, whatever its logits.
    """
    _run(_gradient_kernel, logits_NV, targets_N, vocab_start, lse_N, d_lse_N, d_target_N)


def loss_and_gradient_(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float) -> Tensor:
    """loss_N = weight · (nll + z_loss · lse²) in float32; logits are overwritten with its gradient in their dtype.

    A row with target IGNORE or weight 0 has loss and gradient exactly 0, whatever its logits. Any other target outside
    of [0, V) gives loss NaN.
    """
    loss_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    _run(_loss_and_gradient_kernel, logits_NV, targets_N, weights_N, loss_N, z_loss)
    return loss_N


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a float32 scalar on the device, in float32. Reads and writes nothing if factor is 1.

    It increases x's autograd version, so that a second backward pass raises an error instead of scaling again.
    """
    block = 4096
    if x.numel():
        with torch.cuda.device_of(x):
            _scale_kernel[(triton.cdiv(x.numel(), block),)](x, factor, x.numel(), BLOCK=block, num_warps=8)
    torch.autograd.graph.increment_version(x)


def _run(kernel: object, logits_NV: Tensor, *args: Tensor | float) -> None:
    rows, vocabulary = logits_NV.shape
    if rows == 0:
        return
    config = launch_for(vocabulary)
    args = [x.contiguous() if isinstance(x, Tensor) else x for x in args]
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        kernel[(rows,)](
            logits_NV,
            logits_NV.stride(0),
            vocabulary,
            *args,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )


@triton.jit
def _columns(BLOCK: tl.constexpr):
    """Column numbers as [BLOCK / 8, 8], so that each thread has eight adjacent columns, 16 bytes of bfloat16."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _maximum_and_sum(row_ptr, vocabulary, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(max x, Σ exp(x − max)) of a row."""
    columns = _columns(BLOCK)
    # The lowest float instead of −inf, because −inf − (−inf) is NaN; it remains for threads without a column.
    top = tl.full([BLOCK // 8], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK // 8], tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        mask = start + columns < vocabulary
        x = tl.load(row_ptr + start + columns, mask, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
    of_row = tl.max(top, 0)
    return of_row, tl.sum(total * tl.exp(top - of_row), 0)


@triton.jit
def _write_gradient(row_ptr, vocabulary, target, shift, of_exp, of_target, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """x ← of_exp · exp(x − shift) + of_target · [column == target], from the row's end to its start."""
    columns = _columns(BLOCK)
    blocks = tl.cdiv(vocabulary, BLOCK)
    for i in tl.range(0, blocks, num_stages=STAGES):
        here = (blocks - 1 - i) * BLOCK + columns
        mask = here < vocabulary
        x = tl.load(row_ptr + here, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gradient = of_exp * tl.exp(x - shift) + tl.where(here == target, of_target, 0.0)
        tl.store(row_ptr + here, gradient.to(row_ptr.dtype.element_ty), mask, eviction_policy="evict_first")


@triton.jit
def _write_zeros(row_ptr, vocabulary, BLOCK: tl.constexpr):
    columns = _columns(BLOCK)
    zeros = tl.zeros([BLOCK // 8, 8], row_ptr.dtype.element_ty)
    for start in range(0, vocabulary, BLOCK):
        tl.store(row_ptr + start + columns, zeros, start + columns < vocabulary)


@triton.jit
def _statistics_kernel(
    logits_ptr,
    stride,
    vocabulary,
    targets_ptr,
    vocab_start,
    lse_ptr,
    target_ptr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row) - vocab_start
    here = (target >= 0) & (target < vocabulary)
    tl.store(target_ptr + row, tl.load(row_ptr + target, here, other=0.0).to(tl.float32))
    top, total = _maximum_and_sum(row_ptr, vocabulary, BLOCK, STAGES)
    tl.store(lse_ptr + row, top + tl.log(total))


@triton.jit
def _gradient_kernel(
    logits_ptr,
    stride,
    vocabulary,
    targets_ptr,
    vocab_start,
    lse_ptr,
    d_lse_ptr,
    d_target_ptr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    d_lse, d_target = tl.load(d_lse_ptr + row), tl.load(d_target_ptr + row)
    if (d_lse == 0) & (d_target == 0):
        _write_zeros(row_ptr, vocabulary, BLOCK)
    else:
        target = tl.load(targets_ptr + row) - vocab_start
        _write_gradient(row_ptr, vocabulary, target, tl.load(lse_ptr + row), d_lse, d_target, BLOCK, STAGES)


@triton.jit
def _loss_and_gradient_kernel(
    logits_ptr,
    stride,
    vocabulary,
    targets_ptr,
    weights_ptr,
    loss_ptr,
    z_loss,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    if (target == -100) | (weight == 0):
        tl.store(loss_ptr + row, 0.0)
        _write_zeros(row_ptr, vocabulary, BLOCK)
    else:
        # read before the row is overwritten; the reduction below makes all threads wait for this read
        known = (target >= 0) & (target < vocabulary)
        of_target = tl.load(row_ptr + target, known, other=float("nan")).to(tl.float32)
        top, total = _maximum_and_sum(row_ptr, vocabulary, BLOCK, STAGES)
        log_total = tl.log(total)
        lse = top + log_total
        # (top − of_target) first, because that is exact when both are huge
        tl.store(loss_ptr + row, weight * ((top - of_target) + log_total + z_loss * lse * lse))
        of_exp = weight * (1.0 + 2.0 * z_loss * lse) / total
        _write_gradient(row_ptr, vocabulary, target, top, of_exp, -weight, BLOCK, STAGES)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, offsets < size).to(tl.float32)
        tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), offsets < size)
