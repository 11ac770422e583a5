"""FlashAttention-2's forward pass in Triton (Dao 2023, arXiv:2307.08691).

One program takes BM queries of one head and loops over the key tiles that they can see. Tiles at both ends of the range
are masked, tiles in between are not. Scores are scaled by log2(e), so that the exponential is one instruction (exp2).

B batch · H query heads · K key/value heads · T queries · S keys · d head_dim, padded to the power of two D
"""

from kernels.backend import tl, triton

FULL, CAUSAL, RANGES = 0, 1, 2  # the keys that a query sees: all, those up to itself, or lo … hi−1


@triton.jit
def row_bounds(rows, T, S, lo_ptr, hi_ptr, MASK: tl.constexpr):
    """lo and hi of the rows; rows beyond T get the last row's."""
    if MASK == 2:
        rows = tl.minimum(rows, T - 1)
        lo, hi = tl.load(lo_ptr + rows), tl.load(hi_ptr + rows)
    elif MASK == 1:
        lo, hi = rows * 0, tl.minimum(rows + 1, S)
    else:
        lo, hi = rows * 0, rows * 0 + S
    return lo, hi


@triton.jit
def key_tiles(start_m, T, S, lo_ptr, hi_ptr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(begin, full_from, full_to, end) of a query tile's keys. Key tiles from full_from to full_to need no mask; those
    before and after do."""
    top_lo, top_hi = row_bounds(start_m, T, S, lo_ptr, hi_ptr, MASK)
    bottom_lo, bottom_hi = row_bounds(tl.minimum(start_m + BM, T) - 1, T, S, lo_ptr, hi_ptr, MASK)
    begin = top_lo // BN * BN
    full_from = (bottom_lo + BN - 1) // BN * BN
    full_to = tl.maximum(full_from, top_hi // BN * BN)
    return begin, full_from, full_to, bottom_hi


@triton.jit
def _walk(
    acc, total, top, q, keys, values, b, h, begin, end, lo, hi, scale,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles begin … end."""
    for start in tl.range(begin, end, BN):
        start = tl.multiple_of(start, BN)
        k = keys.load([b, h, start, 0]).reshape([BN, D])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            at = start + tl.arange(0, BN)
            seen = (at[None, :] >= lo[:, None]) & (at[None, :] < hi[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        probs = tl.math.exp2(scores * scale - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        acc = acc * shrink[:, None]
        v = values.load([b, h, start, 0]).reshape([BN, D])
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def forward_kernel(
    queries, keys, values, out, lse_ptr, lo_ptr, hi_ptr, scale, T, S, H,
    GROUP: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """queries, keys, values, out: descriptors [B, heads, positions, d]; elements outside are read as 0, not written.

    scale: scale of the scores · log2(e). Last tiles run first, because under a causal mask they take longest.
    """
    tiles = tl.cdiv(T, BM)
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BM
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    row = start_m + tl.arange(0, BM)
    lo_ptr += b * T
    hi_ptr += b * T

    q = queries.load([b, h, start_m, 0]).reshape([BM, D])
    lo, hi = row_bounds(row, T, S, lo_ptr, hi_ptr, MASK)
    begin, full_from, full_to, end = key_tiles(start_m, T, S, lo_ptr, hi_ptr, MASK, BM, BN)

    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)  # finite, so that a row that sees no key gives no NaN
    if MASK == 2:
        acc, total, top = _walk(
            acc, total, top, q, keys, values, b, h // GROUP, begin, tl.minimum(full_from, end), lo, hi, scale,
            True, BN, D, PRECISION,
        )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, q, keys, values, b, h // GROUP, full_from, full_to, lo, hi, scale, False, BN, D, PRECISION
    )
    acc, total, top = _walk(
        acc, total, top, q, keys, values, b, h // GROUP, full_to, end, lo, hi, scale, True, BN, D, PRECISION
    )

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    out.store([b, h, start_m, 0], acc.to(out.dtype).reshape([1, 1, BM, D]))
    lse = tl.where(some, (top + tl.math.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + head.to(tl.int64) * T + row, lse, mask=row < T)
