"""Attention of one new token per row over a paged KV cache: norm and rotation of q and k, the write to the cache, and
flash-decoding.

A program takes the blocks s, s + S, s + 2S, … of one row and one key/value head, for all G query heads that share it.
So a row of any length is spread evenly over the S splits. S follows from the shapes alone, so one CUDA graph works for
all lengths. The program whose blocks contain the new position has the new key and value in registers: it attends to
them there, and writes them to their page, from which no other program reads them. With more than one split a second
kernel merges them by log-sum-exp (Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference"). There
are no atomics, so a rerun is bit-identical. Pages: Kwon et al. 2023, arXiv:2309.06180.

B rows · H query heads · K key/value heads · G = H/K · d head_dim · F = d/2 frequencies · P pages per row · PAGE tokens
per page · S splits
"""

import math

import torch
from torch import Tensor

from kernels import dependent_launch, qk_norm_rope, rope
from kernels.backend import check_devices, runs_triton, tl, triton

# Found by sweeps on an H200 with Qwen3-0.6B's heads, 1 to 256 rows of 128 and 1,024 tokens. In a program of one warp, a
# maximum or sum needs no wait for other warps; many small programs hide each other's waits for memory.
_BLOCK = 16  # tokens per step: 4 KiB of keys and 4 KiB of values at d = 128 in bfloat16
_STAGES = 3  # two steps are loaded while one is computed: 16 KiB, fourteen programs per multiprocessor
_WARP_NUMBERS = 2048  # numbers of the output per warp, 64 registers per thread
_PROGRAMS = 512  # about four for each of 132 multiprocessors
_MERGE_WARPS = 4
MAX_GROUP = 64  # limit for the query heads per key/value head, which one program holds


def reference(
    qkv: Tensor, q_norm_d: Tensor | None, k_norm_d: Tensor | None, eps: float, cos_BF: Tensor, sin_BF: Tensor,
    k_pages: Tensor, v_pages: Tensor, table_BP: Tensor, lengths_B: Tensor,
) -> Tensor:  # fmt: skip
    """As paged_attention, in plain torch: gathers the rows' pages, and has all scores in memory. Writes the pages."""
    (B, _), (_, K, PAGE, d) = qkv.shape, k_pages.shape
    G = qkv.shape[1] // (K * d) - 2
    q_B1Hd, k_B1Kd, v_B1Kd = qkv.view(B, 1, -1, d).split((G * K, K, K), dim=2)
    tables = cos_BF[:, None], sin_BF[:, None]
    if q_norm_d is None:
        q_B1Hd, k_B1Kd = rope.reference(q_B1Hd, k_B1Kd, *tables)
    else:
        q_B1Hd, k_B1Kd = qk_norm_rope.reference(q_B1Hd, k_B1Kd, q_norm_d, k_norm_d, *tables, eps)
    lengths_B1 = lengths_B[:, None].long()
    page_B = table_BP.gather(1, lengths_B1 // PAGE)[:, 0].long()
    k_pages[page_B, :, lengths_B1[:, 0] % PAGE] = k_B1Kd[:, 0]
    v_pages[page_B, :, lengths_B1[:, 0] % PAGE] = v_B1Kd[:, 0]

    used = int(lengths_B.max()) // PAGE + 1  # pages
    inside = torch.arange(used, device=qkv.device) <= lengths_B1 // PAGE
    table = table_BP[:, :used].long().masked_fill(~inside, 0)
    k, v = (pages[table].transpose(2, 1).flatten(2, 3) for pages in (k_pages, v_pages))  # [B, K, positions, d]
    seen = (torch.arange(used * PAGE, device=qkv.device) <= lengths_B1)[:, None, :, None]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = q_B1Hd.reshape(B, K, G, d).to(wide), k.to(wide), v.to(wide).masked_fill(~seen, 0.0)
    scores = (q @ k.mT * d**-0.5).masked_fill(~seen.mT, float("-inf"))
    return (scores.softmax(-1) @ v).reshape(B, -1).to(qkv.dtype)


def paged_attention(
    qkv: Tensor, q_norm_d: Tensor | None, k_norm_d: Tensor | None, eps: float, cos_BF: Tensor, sin_BF: Tensor,
    k_pages: Tensor, v_pages: Tensor, table_BP: Tensor, lengths_B: Tensor,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ/√d) v of each row's new token over positions 0 … lengths[b], its own included; [B, H·d].

    Writes the new key and value into page table[b, lengths[b] // PAGE] at index lengths[b] % PAGE. Queries and keys are
    rounded as in kernels.qk_norm_rope; scores, softmax and sums are float32, cached tokens' probabilities qkv's dtype.

    Args:
      qkv: [B, (H + 2K)·d], contiguous: a row's query heads, key heads, value heads. float16, bfloat16 or float32
        (float64 runs the formula).
      q_norm_d, k_norm_d: [d], weights of the heads' RMSNorm with `eps`; both None for a model without.
      cos_BF, sin_BF: [B, d/2], of each row's new position, as from qwen3f.model.rope.rope_tables.
      k_pages, v_pages: [pages, K, PAGE, d], contiguous (may be one layer of a stack), written in place; PAGE a power of
        two, d a power of two from 16 to 256.
      table_BP: int32 [B, P], contiguous; entries after index lengths[b] // PAGE are never used.
      lengths_B: int32 [B], tokens in the cache before this one, each below P·PAGE (not checked, because that would wait
        for the device). Slots from lengths[b] on may have any values.
    Idle rows have table 0 and length 0: any number of them may write to page 0 at the same time, and each attends only
    to itself. Two other rows must not write into one page. Raises ValueError for arguments that do not fit.
    """
    _check(qkv, k_pages, v_pages, table_BP, lengths_B)
    _check_vectors(qkv, q_norm_d, k_norm_d, cos_BF, sin_BF, k_pages.shape[-1])
    return torch.ops.qwen3f.paged_attention(
        qkv, q_norm_d, k_norm_d, eps, cos_BF, sin_BF, k_pages, v_pages, table_BP, lengths_B
    )


@triton.jit
def _rotated(x_ptr, partner_ptr, weight_ptr, column, cos, sin, eps, mask, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads [R, d], normalised and rotated, rounded as in kernels.qk_norm_rope; returned as float32.

    Each column is loaded together with its partner, d/2 away, because columns of a tile can't be swapped.
    """
    x = tl.load(x_ptr, mask=mask, other=0.0)
    dtype = x.dtype
    other = tl.load(partner_ptr, mask=mask, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / (2 * HALF) + eps)[:, None]
        weight = tl.load(weight_ptr + column).to(tl.float32)[None, :]
        other_weight = tl.load(weight_ptr + (column + HALF) % (2 * HALF)).to(tl.float32)[None, :]
        x = ((x * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        other = ((other * rstd).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
    turned = x * cos + tl.where(column < HALF, -other, other) * sin
    return turned.to(dtype).to(tl.float32)


@triton.jit
def _split_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr,
    eps, scale, K, P,
    HAS_NORM: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one row and key/value head, with R ≥ G query rows. Writes the output; with several splits, this
    split's output and log2-sum-exp2.

    A split without blocks writes nothing, and the merge ignores it.
    """
    b, kh, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    row, column = tl.arange(0, R), tl.arange(0, D)
    dtype = k_ptr.dtype.element_ty
    # Loads that do not depend on the previous kernel, so they come before the wait. Page numbers are loaded one step
    # ahead: in the same step, the load of the keys would have to wait for the load of their page number.
    length = tl.load(lengths_ptr + b)
    at = split * BLOCK + tl.arange(0, BLOCK)
    page_at = tl.load(table_ptr + b * P + tl.minimum(at // PAGE, P - 1))
    later = at + SPLITS * BLOCK
    next_page_at = tl.load(table_ptr + b * P + tl.minimum(later // PAGE, P - 1))
    cos = tl.load(cos_ptr + b * (D // 2) + column % (D // 2)).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + b * (D // 2) + column % (D // 2)).to(tl.float32)[None, :]
    use = at < length
    place = (((page_at.to(tl.int64) * K + kh) * PAGE + at % PAGE) * D)[:, None] + column[None, :]
    k = tl.load(k_ptr + place, mask=use[:, None], other=0.0)
    v = tl.load(v_ptr + place, mask=use[:, None], other=0.0)
    dependent_launch.wait(PDL)
    last = length // BLOCK
    if split > last:
        return

    inside = (row < GROUP)[:, None]
    qkv_ptr += b.to(tl.int64) * (GROUP + 2) * K * D
    partner = (column + D // 2) % D
    q_ptr = qkv_ptr + (kh * GROUP + row)[:, None] * D
    q = _rotated(
        q_ptr + column[None, :], q_ptr + partner[None, :], q_norm_ptr, column, cos, sin, eps, inside, D // 2, HAS_NORM
    )
    owner = split == last % SPLITS
    one = tl.arange(0, 1)[:, None]
    new_ptr = qkv_ptr + (GROUP * K + kh) * D + one
    k_new = _rotated(
        new_ptr + column[None, :], new_ptr + partner[None, :], k_norm_ptr, column, cos, sin, eps, one == 0, D // 2,
        HAS_NORM,
    )  # fmt: skip
    v_new = tl.load(new_ptr + K * D + column[None, :])

    top = tl.where(owner, tl.sum(q * k_new, axis=1) * scale, -1e30)
    total = tl.where(owner, tl.full([R], 1.0, tl.float32), 0.0)
    acc = tl.where(owner, tl.zeros([R, D], tl.float32) + v_new.to(tl.float32), 0.0)
    q = q.to(dtype)
    top, total, acc = _seen(q, k, v, use, top, total, acc, scale, PRECISION)
    page_at = next_page_at
    for start in tl.range((split + SPLITS) * BLOCK, length, SPLITS * BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        use = at < length
        place = (((page_at.to(tl.int64) * K + kh) * PAGE + at % PAGE) * D)[:, None] + column[None, :]
        k = tl.load(k_ptr + place, mask=use[:, None], other=0.0)
        v = tl.load(v_ptr + place, mask=use[:, None], other=0.0)
        later = at + SPLITS * BLOCK
        page_at = tl.load(table_ptr + b * P + later // PAGE, mask=later < length, other=0)
        top, total, acc = _seen(q, k, v, use, top, total, acc, scale, PRECISION)

    dependent_launch.release(PDL)
    if owner:
        page = tl.load(table_ptr + b * P + length // PAGE).to(tl.int64)
        to = ((page * K + kh) * PAGE + length % PAGE) * D + column[None, :]
        tl.store(k_ptr + to, k_new.to(dtype))
        tl.store(v_ptr + to, v_new)
    acc = acc / total[:, None]
    part = ((tl.program_id(0).to(tl.int64) * SPLITS + split) * GROUP + row)[:, None] * D + column[None, :]
    tl.store(out_ptr + part, acc.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        lse_at = (tl.program_id(0) * SPLITS + split) * GROUP + row
        tl.store(lse_ptr + lse_at, top + tl.math.log2(total), mask=row < GROUP)


@triton.jit
def _seen(q, k, v, use, top, total, acc, scale, PRECISION: tl.constexpr):
    """Add a block of keys and values [BLOCK, d] to the running maximum [R], sum [R] and output [R, d]."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
    scores = tl.where(use[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    probs = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, lengths_ptr, out_ptr, K,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One query head of one row: the mean of its splits' outputs, weighted by their sums of exponentials."""
    head, g = tl.program_id(0), tl.program_id(1)
    column, split = tl.arange(0, D), tl.arange(0, PADDED)
    length = tl.load(lengths_ptr + head // K)
    dependent_launch.wait(PDL)
    dependent_launch.release(PDL)
    place = (head * SPLITS + split) * GROUP + g
    # load all splits, written or not: a load that first waits for the length would start a microsecond later
    lse = tl.load(lse_ptr + place, mask=split < SPLITS, other=0.0)
    parts = tl.load(
        partial_ptr + place.to(tl.int64)[:, None] * D + column[None, :], mask=(split < SPLITS)[:, None], other=0.0
    )
    use = (split < SPLITS) & (split <= length // BLOCK)
    lse = tl.where(use, lse, float("-inf"))
    weight = tl.math.exp2(lse - tl.max(lse, 0))
    out = tl.sum(tl.where(use[:, None], parts, 0.0) * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + (head * GROUP + g).to(tl.int64) * D + column, out.to(out_ptr.dtype.element_ty))


def splits_of(rows: int, kv_heads: int, pages: int, page: int) -> int:
    """The number of splits per row: enough programs to fill the card, but not more splits than blocks in a full row."""
    return max(1, min(triton.cdiv(pages * page, _BLOCK), _PROGRAMS // (rows * kv_heads)))


@torch.library.custom_op("qwen3f::paged_attention", mutates_args=("k_pages", "v_pages"))
def _op(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    if not len(qkv):
        return _op_fake(qkv, q_norm, k_norm, eps, cos, sin, k_pages, v_pages, table, lengths)
    if not runs_triton(qkv):
        return reference(qkv, q_norm, k_norm, eps, cos, sin, k_pages, v_pages, table, lengths)
    (B, P), (_, K, PAGE, d) = table.shape, k_pages.shape
    G = qkv.shape[1] // (K * d) - 2
    R = max(16, triton.next_power_of_2(G))
    splits, pdl = splits_of(B, K, P, PAGE), dependent_launch.on(qkv)
    out = qkv.new_empty(B, G * K * d)
    partial = out if splits == 1 else qkv.new_empty(B * K, splits, G, d, dtype=torch.float32)
    lse = qkv.new_empty(B * K, splits, G, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _split_kernel[(B * K, splits)](
            qkv, q_norm, k_norm, cos, sin, k_pages, v_pages, table, lengths, partial, lse,
            eps, math.log2(math.e) * d**-0.5, K, P,
            HAS_NORM=q_norm is not None, GROUP=G, R=R, D=d, PAGE=PAGE, BLOCK=_BLOCK,
            SPLITS=splits, STAGES=_STAGES, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            PDL=pdl, num_warps=min(8, max(1, R * d // _WARP_NUMBERS)), launch_pdl=pdl,
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(B * K, G)](
                partial, lse, lengths, out, K, GROUP=G, D=d, BLOCK=_BLOCK, SPLITS=splits,
                PADDED=triton.next_power_of_2(splits), PDL=pdl, num_warps=_MERGE_WARPS, launch_pdl=pdl,
            )  # fmt: skip
    return out


@_op.register_fake
def _op_fake(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_pages.shape[1] * k_pages.shape[3])


def _check(qkv: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor) -> None:
    if qkv.dim() != 2 or not qkv.is_floating_point() or not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous [B, (H + 2K)·d], got {qkv.dtype} {tuple(qkv.shape)}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 4 or pages.dtype != qkv.dtype or not pages.is_contiguous() or pages.shape != k_pages.shape:
            raise ValueError(
                f"{name} must be contiguous {qkv.dtype} [pages, K, PAGE, d], one shape for keys and values, got "
                f"{pages.dtype} {tuple(pages.shape)}"
            )
    _, K, PAGE, d = k_pages.shape
    if PAGE & (PAGE - 1) or not PAGE or d & (d - 1) or not 16 <= d <= 256:
        raise ValueError(f"a page must hold a power of two of tokens and d be 16, 32, … 256; got {PAGE} and {d}")
    group, rest = divmod(qkv.shape[1], max(K, 1) * d)
    if rest or not K or not 1 <= group - 2 <= MAX_GROUP:
        raise ValueError(
            f"qkv must be [B, (H + 2K)·d] with H/K in 1 … {MAX_GROUP}, got {tuple(qkv.shape)} at K {K}, d {d}"
        )
    fits = table.dim() == 2 and len(table) == len(qkv) and table.shape[1]
    if not fits or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(
            f"table must be contiguous int32 [{len(qkv)}, P] with P > 0, got {table.dtype} {tuple(table.shape)}"
        )
    if lengths.shape != qkv.shape[:1] or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ValueError(f"lengths must be int32 [{len(qkv)}], got {lengths.dtype} {tuple(lengths.shape)}")
    check_devices(qkv=qkv, k_pages=k_pages, v_pages=v_pages, table=table, lengths=lengths)


def _check_vectors(qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, d: int) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: pass both or neither")
    wanted = {"cos": (cos, (len(qkv), d // 2)), "sin": (sin, (len(qkv), d // 2))}
    if q_norm is not None:
        wanted |= {"q_norm": (q_norm, (d,)), "k_norm": (k_norm, (d,))}
    for name, (x, shape) in wanted.items():
        if x.shape != shape or x.dtype != qkv.dtype or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous {qkv.dtype} {list(shape)}, got {x.dtype} {tuple(x.shape)}")
        check_devices(qkv=qkv, **{name: x})
