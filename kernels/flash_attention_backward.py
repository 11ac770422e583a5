"""FlashAttention-2's backward pass in Triton, in two kernels: one for dQ, one for dK and dV.

Every program writes its own tiles, so there are no atomics and a rerun is bit-identical. Therefore scores and their
gradients are computed twice: 7 tile products, where a kernel with atomics needs 5.

With P = exp(scale·QKᵀ − lse), dP = dO·Vᵀ and Δ = rowsum(dO·O) − dlse:  dS = P·(dP − Δ),  dV = Pᵀ·dO,
dQ = scale·dS·K,  dK = scale·dSᵀ·Q. dlse is the upstream gradient of the log-sum-exp (ring attention uses the
log-sum-exp to merge chunks).

B batch · H query heads · K key/value heads · T queries · S keys · d head_dim, padded to the power of two D
"""

from kernels.backend import tl, triton
from kernels.flash_attention_forward import key_tiles, row_bounds


@triton.jit
def rows_kernel(
    out, d_out, lse_ptr, d_lse_ptr, rows_ptr, scale, T, PADDED, H,
    HAS_DLSE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """rows [B, H, 2, PADDED]: −lse in units of unscaled scores, and −Δ. The products' accumulators start from them.

    Rows that see no key (lse −∞) and rows beyond T get −∞, which makes their probabilities 0. scale: scale · log2(e).
    """
    tiles = PADDED // BM
    start_m = tl.program_id(0) % tiles * BM
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    row = start_m + tl.arange(0, BM)
    o = out.load([b, h, start_m, 0]).reshape([BM, D]).to(tl.float32)
    do = d_out.load([b, h, start_m, 0]).reshape([BM, D]).to(tl.float32)
    delta = tl.sum(o * do, 1)
    head = head.to(tl.int64)
    if HAS_DLSE:
        delta -= tl.load(d_lse_ptr + head * T + row, mask=row < T, other=0.0)
    lse = tl.load(lse_ptr + head * T + row, mask=row < T, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * (1.4426950408889634 / scale))
    tl.store(rows_ptr + head * 2 * PADDED + row, -lse)
    tl.store(rows_ptr + head * 2 * PADDED + PADDED + row, -delta)


@triton.jit
def _walk_keys(
    dq, q, do, lse, delta, keys, values, b, h, begin, end, lo, hi, scale,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BN):
        start = tl.multiple_of(start, BN)
        k = keys.load([b, h, start, 0]).reshape([BN, D])
        v = values.load([b, h, start, 0]).reshape([BN, D])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        probs = tl.math.exp2(tl.minimum((scores + lse[:, None]) * scale, 0.0))  # never above 1, however huge the scores
        if MASKED:
            at = start + tl.arange(0, BN)
            seen = (at[None, :] >= lo[:, None]) & (at[None, :] < hi[:, None])
            probs = tl.where(seen, probs, 0.0)
        ds = (probs * (dp + delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_kernel(
    queries, keys, values, d_out, d_queries, rows_ptr, lo_ptr, hi_ptr, scale, T, PADDED, S, H,
    GROUP: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes d_queries. One program per tile of BM queries; it loops over the keys as the forward pass does."""
    tiles = tl.cdiv(T, BM)
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BM
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    row = start_m + tl.arange(0, BM)
    lo_ptr += b * T
    hi_ptr += b * T

    q = queries.load([b, h, start_m, 0]).reshape([BM, D])
    do = d_out.load([b, h, start_m, 0]).reshape([BM, D])
    rows_ptr += head.to(tl.int64) * 2 * PADDED
    lse, delta = tl.load(rows_ptr + row), tl.load(rows_ptr + PADDED + row)
    lo, hi = row_bounds(row, T, S, lo_ptr, hi_ptr, MASK)
    begin, full_from, full_to, end = key_tiles(start_m, T, S, lo_ptr, hi_ptr, MASK, BM, BN)

    dq = tl.zeros([BM, D], tl.float32)
    if MASK == 2:
        dq = _walk_keys(
            dq, q, do, lse, delta, keys, values, b, h // GROUP, begin, tl.minimum(full_from, end), lo, hi, scale,
            True, BN, D, PRECISION,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, do, lse, delta, keys, values, b, h // GROUP, full_from, full_to, lo, hi, scale, False, BN, D, PRECISION
    )
    dq = _walk_keys(
        dq, q, do, lse, delta, keys, values, b, h // GROUP, full_to, end, lo, hi, scale, True, BN, D, PRECISION
    )
    dq = dq * (scale * 0.6931471805599453)
    d_queries.store([b, h, start_m, 0], dq.to(d_queries.dtype).reshape([1, 1, BM, D]))


@triton.jit
def _walk_queries(
    dk, dv, k, v, queries, d_out, rows_ptr, b, h, begin, end, first, last, scale, PADDED,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv. Scores are kept transposed, keys first, so that no operand of a product is transposed."""
    for start in tl.range(begin, end, BM):
        start = tl.multiple_of(start, BM)
        q = queries.load([b, h, start, 0]).reshape([BM, D])
        do = d_out.load([b, h, start, 0]).reshape([BM, D])
        row = start + tl.arange(0, BM)
        scores = tl.broadcast_to(tl.load(rows_ptr + row)[None, :], [BN, BM])
        scores = tl.dot(k, q.T, scores, input_precision=PRECISION)
        probs = tl.math.exp2(tl.minimum(scores * scale, 0.0))  # never above 1, however huge the scores
        if MASKED:
            seen = (row[None, :] >= first[:, None]) & (row[None, :] < last[:, None])
            probs = tl.where(seen, probs, 0.0)
        dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.broadcast_to(tl.load(rows_ptr + PADDED + row)[None, :], [BN, BM])
        dp = tl.dot(v, do.T, dp, input_precision=PRECISION)
        ds = (probs * dp).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _column_bounds(column, T, S, first_ptr, last_ptr, MASK: tl.constexpr):
    """(first, last): only queries first … last−1 can see the key. Keys beyond S get the last key's bounds."""
    if MASK == 2:
        column = tl.minimum(column, S - 1)
        first, last = tl.load(first_ptr + column), tl.load(last_ptr + column)
    elif MASK == 1:
        first, last = column, column * 0 + T
    else:
        first, last = column * 0, column * 0 + T
    return first, last


@triton.jit
def key_kernel(
    queries, keys, values, d_out, d_keys, d_values, rows_ptr, first_ptr, last_ptr, scale, T, PADDED, S, K,
    GROUP: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes d_keys and d_values. One program per tile of BN keys; it loops over the queries of all heads that share
    them.

    Queries beyond T have probability 0 (rows_kernel), and keys beyond S are never stored, so neither needs a mask.
    """
    tiles = tl.cdiv(S, BN)
    start_n = tl.program_id(0) % tiles * BN
    b, kh = tl.program_id(0) // tiles // K, tl.program_id(0) // tiles % K
    first_ptr += b * S
    last_ptr += b * S

    first, last = _column_bounds(start_n + tl.arange(0, BN), T, S, first_ptr, last_ptr, MASK)
    top_first, top_last = _column_bounds(start_n, T, S, first_ptr, last_ptr, MASK)
    bottom_first, bottom_last = _column_bounds(start_n + BN - 1, T, S, first_ptr, last_ptr, MASK)
    begin = top_first // BM * BM
    full_from = (bottom_first + BM - 1) // BM * BM
    full_to = top_last // BM * BM if MASK == 2 else T
    full_to = tl.maximum(full_from, full_to)

    k = keys.load([b, kh, start_n, 0]).reshape([BN, D])
    v = values.load([b, kh, start_n, 0]).reshape([BN, D])
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for g in range(GROUP):
        h = kh * GROUP + g
        of_head = rows_ptr + (b * K * GROUP + h).to(tl.int64) * 2 * PADDED
        if MASK > 0:
            dk, dv = _walk_queries(
                dk, dv, k, v, queries, d_out, of_head, b, h, begin, tl.minimum(full_from, bottom_last), first, last,
                scale, PADDED, True, BM, BN, D, PRECISION,
            )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, queries, d_out, of_head, b, h, full_from, full_to, first, last,
            scale, PADDED, False, BM, BN, D, PRECISION,
        )  # fmt: skip
        if MASK == 2:
            dk, dv = _walk_queries(
                dk, dv, k, v, queries, d_out, of_head, b, h, full_to, bottom_last, first, last,
                scale, PADDED, True, BM, BN, D, PRECISION,
            )  # fmt: skip
    dk = dk * (scale * 0.6931471805599453)
    d_keys.store([b, kh, start_n, 0], dk.to(d_keys.dtype).reshape([1, 1, BN, D]))
    d_values.store([b, kh, start_n, 0], dv.to(d_values.dtype).reshape([1, 1, BN, D]))
