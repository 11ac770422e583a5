"""From the residual stream to the next token in two launches: final norm, head, and sampling of one token per row.

The first kernel writes the logits in float32, and for each tile of the vocabulary the greatest tempered logit (logit
divided by the temperature), its id, and the sum of exponentials. The second kernel, one program per row, uses these to
find the tile of the sampled token, and reads only the logits of that tile. There are no atomics, so a rerun is
bit-identical. Logits are float32, because bfloat16 would change logits of 16 and above by up to 0.06, which is visible
in log-probabilities.

B rows · D hidden · V vocabulary · BM, BN rows and ids of a tile
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dependent_launch, row_product
from kernels.backend import check_devices, runs_triton, tl, triton

_WARP_TILES = 512  # tiles of the vocabulary per warp of the second kernel; not tuned on a card


def reference(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, head_VD: Tensor, num_ids: int, inv_temperature_B: Tensor,
    uniform_B: Tensor, allowed_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As head_sample, in plain torch: (ids, logprob, logits, finite)."""
    wide = torch.promote_types(x_BD.dtype, torch.float32)
    logits = F.linear(row_product.norm_reference(x_BD, norm_D, eps).to(wide), head_VD.to(wide))
    real = logits[:, :num_ids]
    if allowed_V is None:
        finite = real.isfinite().all(-1)
    else:
        finite = (real.isfinite() | ~allowed_V[:num_ids]).all(-1)
        real = real.masked_fill(~allowed_V[:num_ids], float("-inf"))
    scale_B1 = torch.where(inv_temperature_B == 0, 1.0, inv_temperature_B)[:, None]
    tempered = real * scale_B1
    top_B1 = tempered.amax(-1, keepdim=True)
    probs = (tempered - top_B1).exp()  # unnormalised
    sums = probs.cumsum(-1, dtype=torch.float64)
    target = uniform_B.double() * sums[:, -1]
    drawn = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    possible = torch.where(probs > 0, torch.arange(num_ids, device=x_BD.device), 0).amax(-1)  # last id with probability
    ids = torch.where(inv_temperature_B == 0, real.argmax(-1), torch.minimum(drawn, possible))
    chosen = tempered.gather(1, ids[:, None]) - top_B1
    return ids, chosen[:, 0] - sums[:, -1].log().to(wide), logits, finite


def head_sample(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, head_VD: Tensor, num_ids: int, inv_temperature_B: Tensor,
    uniform_B: Tensor, allowed_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids int64 [B], logprob float32 [B], logits float32 [B, V], finite bool [B]) of each row's next token.

    The logits are head · (rmsnorm(x)·g), float32 from the product on; the norm is rounded as in kernels.row_product.
    The token is drawn from softmax(logits · inv_temperature) over the ids below num_ids: it is the first id, in the
    order of the vocabulary, whose cumulative probability exceeds uniform[b]. So a row's token depends only on its
    logits and its uniform number. A token of probability 0 is never drawn.

    Args:
      x_BD, norm_D: [B, D] and [D] of one dtype, contiguous; norm None: x is normed already. float16, bfloat16 or
        float32 (float64 runs the formula, and logits and logprob are float64).
      head_VD: [V, D], contiguous; for a tied head the embedding.
      num_ids: 1 … V; ids from num_ids on are padding: their logits are returned, but they have no probability.
      inv_temperature_B: float32 [B], 1/temperature, at least 0. 0 takes the greatest logit (of equal ones the lowest
        id).
      uniform_B: float32 or float64 [B] in [0, 1).
      allowed_V: bool [V], contiguous; None: all. An id that is not allowed is as padding. One below num_ids must be.
    Returns logprob: of the chosen token under the distribution that it was drawn from; with inv_temperature 0 under
      softmax(logits). finite: whether all logits of allowed ids below num_ids are finite. If not, id and logprob are
      meaningless, but the id is below num_ids.
    Raises ValueError for arguments that do not fit.
    """
    row_product.check(x_BD, row_product.norm_of(x_BD, norm_D), {"head": head_VD})
    if not 1 <= num_ids <= len(head_VD):
        raise ValueError(f"num_ids must be 1 … {len(head_VD)}, got {num_ids}")
    for name, x, dtypes in (
        ("inv_temperature", inv_temperature_B, (torch.float32,)),
        ("uniform", uniform_B, (torch.float32, torch.float64)),
    ):
        if x.shape != x_BD.shape[:1] or x.dtype not in dtypes or not x.is_contiguous():
            words = " or ".join(str(d) for d in dtypes)
            raise ValueError(f"{name} must be contiguous {words} [{len(x_BD)}], got {x.dtype} {tuple(x.shape)}")
        check_devices(**{"x": x_BD, name: x})
    check_allowed(allowed_V, head_VD)
    return torch.ops.qwen3f.head_sample(x_BD, norm_D, eps, head_VD, num_ids, inv_temperature_B, uniform_B, allowed_V)


def check_allowed(allowed_V: Tensor | None, head_VD: Tensor) -> None:
    """ValueError for a mask of ids that does not fit the head."""
    if allowed_V is None:
        return
    if allowed_V.shape != head_VD.shape[:1] or allowed_V.dtype != torch.bool or not allowed_V.is_contiguous():
        raise ValueError(
            f"allowed must be contiguous bool [{len(head_VD)}], got {allowed_V.dtype} {tuple(allowed_V.shape)}"
        )
    check_devices(head=head_VD, allowed=allowed_V)


@triton.jit
def _scale(inv_temperature_ptr, row, rows):
    inv_temperature = tl.load(inv_temperature_ptr + row, mask=row < rows, other=1.0)
    return tl.where(inv_temperature == 0, 1.0, inv_temperature)


@triton.jit
def _real(allowed_ptr, n, num_ids, MASKED: tl.constexpr):
    """Which ids n can be drawn."""
    if MASKED:
        return tl.load(allowed_ptr + n, mask=n < num_ids, other=0) != 0
    return n < num_ids


@triton.jit
def _logits_kernel(
    x_ptr, norm_ptr, head_ptr, inv_temperature_ptr, allowed_ptr, logits_ptr, top_ptr, total_ptr, place_ptr,
    rows, D, V, num_ids, eps,
    MASKED: tl.constexpr, HAS_NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of logits; for each of its rows the greatest tempered logit, Σ exp(tempered − greatest), and the id of
    the greatest, or −1 if a logit is not finite.
    """
    row_tiles, blocks = tl.cdiv(rows, BM), tl.cdiv(V, BN)
    block = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    weight_N = head_ptr + tl.minimum(n, V - 1).to(tl.int64) * D
    product, square = row_product.row_product(
        x_ptr, norm_ptr, weight_N, row, rows, D, HAS_NORM, BM, BN, BK, STAGES, PRECISION, WHOLE, PDL
    )
    logits = product * tl.rsqrt(square / D + eps)[:, None] if HAS_NORM else product
    mask = (row < rows)[:, None] & (n < V)[None, :]
    tl.store(logits_ptr + row.to(tl.int64)[:, None] * V + n[None, :], logits, mask=mask)

    real = _real(allowed_ptr, n, num_ids, MASKED)[None, :]
    good = real & (tl.abs(logits) < float("inf"))
    tempered = tl.where(good, logits * _scale(inv_temperature_ptr, row, rows)[:, None], float("-inf"))
    top, place = tl.max(tempered, axis=1, return_indices=True)
    shift = tl.where(top == float("-inf"), 0.0, top)  # −∞: no id of the tile can be drawn
    total = tl.sum(tl.exp(tempered - shift[:, None]), axis=1)
    wrong = tl.sum(tl.where(good, 0, tl.where(real, 1, 0)), axis=1)
    at = row.to(tl.int64) * blocks + block
    tl.store(top_ptr + at, top, mask=row < rows)
    tl.store(total_ptr + at, total, mask=row < rows)
    tl.store(place_ptr + at, tl.where(wrong > 0, -1, block * BN + place), mask=row < rows)


@triton.jit
def _first(possible, fits, index, none):
    """The first index that is possible and fits; if none fits (because sums round), the last possible one; else 0."""
    first = tl.min(tl.where(possible & fits, index, none), axis=0)
    last = tl.max(tl.where(possible, index, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit
def _choose_kernel(
    logits_ptr, top_ptr, total_ptr, place_ptr, inv_temperature_ptr, uniform_ptr, allowed_ptr, id_ptr, logprob_ptr,
    finite_ptr, V, num_ids, blocks, stride, shard,
    MASKED: tl.constexpr, SHARDS: tl.constexpr, BN: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: finds the tile, then the id within it. Sums are float64, so that small probabilities are not lost.

    For a vocabulary that is cut into SHARDS (kernels.head_shards), V, num_ids, blocks, logits and places are those of
    one shard; the tiles' sums are those of all shards, `stride` numbers apart. If another shard than `shard` has the
    id, 0 is written.
    """
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    row = tl.program_id(0)
    scale = _scale(inv_temperature_ptr, row, row + 1)
    block = tl.arange(0, PADDED)
    at = row.to(tl.int64) * blocks + block
    if SHARDS > 1:
        at += (block // blocks).to(tl.int64) * (stride - blocks)
    known = block < SHARDS * blocks
    tops = tl.load(top_ptr + at, mask=known, other=float("-inf"))
    totals = tl.load(total_ptr + at, mask=known, other=0.0)
    places = tl.load(place_ptr + at, mask=known, other=0)
    top = tl.max(tops, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no logit is finite
    weights = totals * tl.exp(tops - top)
    total = tl.sum(weights, axis=0)

    wide = weights.to(tl.float64)
    sums = tl.cumsum(wide, axis=0)
    target = tl.load(uniform_ptr + row).to(tl.float64) * tl.max(sums, axis=0)
    drawn_block = _first(weights > 0, sums > target, block, PADDED)
    rest = target - tl.sum(tl.where(block < drawn_block, wide, 0.0), axis=0)
    block_top = tl.sum(tl.where(block == drawn_block, tops, 0.0), axis=0)
    rest = rest / tl.exp(block_top - top).to(tl.float64)
    inner = tl.arange(0, BN)
    own_block = drawn_block % blocks if SHARDS > 1 else drawn_block
    n = own_block * BN + inner
    logits_ptr += row.to(tl.int64) * V
    real = _real(allowed_ptr, n, num_ids, MASKED)
    tempered = tl.load(logits_ptr + n, mask=real, other=float("-inf")) * scale
    probs = tl.exp(tempered - block_top)
    drawn = own_block * BN + _first(probs > 0, tl.cumsum(probs.to(tl.float64), axis=0) > rest, inner, BN)

    best_block = tl.min(tl.where(tops == top, block, PADDED), axis=0)
    best = tl.sum(tl.where(block == best_block, places, 0), axis=0).to(tl.int32)
    greedy = tl.load(inv_temperature_ptr + row) == 0
    chosen = tl.where(greedy, best, drawn)
    chosen = tl.minimum(tl.maximum(chosen, 0), num_ids - 1)  # a row that is not finite may have led to any number
    finite = tl.min(places, axis=0) >= 0
    if SHARDS > 1:
        mine = tl.where(greedy, best_block, drawn_block) // blocks == shard
        logprob = tl.load(logits_ptr + chosen, mask=mine, other=0.0) * scale - top - tl.log(total)
        chosen = tl.where(mine, chosen + shard * V, 0)
        logprob = tl.where(mine, logprob, 0.0)
        finite = finite & mine
    else:
        logprob = tl.load(logits_ptr + chosen) * scale - top - tl.log(total)
    tl.store(id_ptr + row, chosen.to(tl.int64))
    tl.store(logprob_ptr + row, logprob)
    tl.store(finite_ptr + row, finite.to(tl.int8))


@torch.library.custom_op("qwen3f::head_sample", mutates_args=())
def _op(
    x: Tensor, norm: Tensor | None, eps: float, head: Tensor, num_ids: int, inv_temperature: Tensor, uniform: Tensor,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not runs_triton(x) or not len(x):
        return reference(x, norm, eps, head, num_ids, inv_temperature, uniform, allowed)
    (B, D), V = x.shape, len(head)
    cut = row_product.config(B, V, D)
    blocks = triton.cdiv(V, cut.outputs)
    ids, logprob, logits, finite = _op_fake(x, norm, eps, head, num_ids, inv_temperature, uniform, allowed)
    tops, totals = (x.new_empty(B, blocks, dtype=torch.float32) for _ in range(2))
    places = x.new_empty(B, blocks, dtype=torch.int32)
    padded, mask = triton.next_power_of_2(blocks), as_bytes(allowed)
    with torch.cuda.device_of(x):
        _logits_kernel[(triton.cdiv(B, cut.rows) * blocks,)](
            row_product.normed(x, norm, eps, cut), norm, head, inv_temperature, mask, logits, tops, totals, places, B,
            D, V, num_ids, eps, MASKED=mask is not None, HAS_NORM=row_product.norms(norm, cut),
            **row_product.options(x, cut),
        )  # fmt: skip
        _choose_kernel[(B,)](
            logits, tops, totals, places, inv_temperature, uniform, mask, ids, logprob, as_bytes(finite), V, num_ids,
            blocks, 0, 0, MASKED=mask is not None, SHARDS=1, BN=cut.outputs, PADDED=padded, PDL=dependent_launch.on(x),
            num_warps=max(4, min(16, padded // _WARP_TILES)), launch_pdl=dependent_launch.on(x),
        )  # fmt: skip
    return ids, logprob, logits, finite


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """The same memory as int8, which Triton can load and store."""
    return None if mask is None else mask.view(torch.int8)


@_op.register_fake
def _op_fake(
    x: Tensor, norm: Tensor | None, eps: float, head: Tensor, num_ids: int, inv_temperature: Tensor, uniform: Tensor,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(B, dtype=torch.int64),
        x.new_empty(B, dtype=wide),
        x.new_empty(B, head.shape[0], dtype=wide),
        x.new_empty(B, dtype=torch.bool),
    )
