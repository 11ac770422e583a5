"""Flash attention against torch's attention in float64: values, log-sum-exp and gradients, in Triton's interpreter and
on a GPU.

The interpreter multiplies bfloat16 as integers (Triton 3.6 and 3.9), so half precision is float16 there, bfloat16 on
the GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend, flash_attention
from kernels.key_ranges import dense_mask, key_ranges, ranges_from_cu_seqlens, ranges_from_segments

attend = flash_attention.flash_attention


def segments(*rows):
    return torch.tensor([[i for i, n in enumerate(row, 1) for _ in range(n)] for row in rows], dtype=torch.int32)


def window(length, keys, width):
    """A sliding window over a longer sequence of keys, as a chunk of ring attention sees it."""
    hi = torch.arange(1, length + 1) + (keys - length)
    return key_ranges((hi - width).clamp(min=0)[None], hi[None], keys)


def frames(length, sizes):
    """Ranges of frames of these sizes, as qwen3f.vision.tower.patch_inputs makes them."""
    place = torch.arange(length)
    ends = torch.tensor(sizes).cumsum(0)
    frame = torch.searchsorted(ends, place, right=True).clamp(max=len(sizes) - 1)
    there = place < ends[-1]
    lo = torch.where(there, ends[frame] - torch.tensor(sizes)[frame], place)
    return key_ranges(lo[None], torch.where(there, ends[frame], place + 1)[None], length)


# name: (B, H, K, T, S, d), mask
CASES = {
    "causal": ((1, 2, 1, 70, 70, 16), {}),
    "causal_long": ((1, 1, 1, 130, 130, 16), {}),
    "one_token": ((2, 2, 2, 1, 1, 16), {}),
    "full": ((1, 2, 2, 40, 70, 24), {"causal": False}),
    "documents": ((2, 4, 2, 100, 100, 32), {"ranges": ranges_from_segments(segments([5, 60, 34, 1], [100]))}),
    "documents_full": ((1, 2, 1, 70, 70, 16), {"ranges": ranges_from_segments(segments([3, 50, 17]), causal=False)}),
    "masked_documents": (
        (1, 2, 1, 140, 140, 16),
        {"ranges": ranges_from_cu_seqlens(torch.tensor([0, 5, 5, 80, 100, 100]), 140)},
    ),
    "nothing_seen": ((1, 1, 1, 20, 20, 16), {"ranges": ranges_from_cu_seqlens(torch.tensor([0, 0]), 20)}),
    "window": ((1, 2, 1, 50, 90, 16), {"ranges": window(50, 90, 37)}),
    # as in a vision tower: a patch sees its frame; patches of padding see themselves
    "frames_72": ((1, 2, 2, 60, 60, 72), {"ranges": frames(60, [24, 8, 20])}),
    "frames_64": ((1, 1, 1, 40, 40, 64), {"ranges": frames(40, [16, 16])}),
    "wide_head": ((1, 1, 1, 40, 40, 256), {}),
}


def inputs(sizes, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v and the gradients of both outputs; q, k and v as transposed [B, T, heads, d]."""
    batch, heads, kv_heads, length, keys, d = sizes
    g = torch.Generator().manual_seed(seed)
    shapes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    qkv = [torch.randn(batch, *shape, d, generator=g).to(device, dtype).transpose(1, 2) for shape in shapes]
    d_out = torch.randn(batch, heads, length, d, generator=g).to(device, dtype)
    return [x.requires_grad_() for x in qkv], d_out, torch.randn(batch, heads, length, generator=g).to(device)


def by_torch(q, k, v, causal=True, ranges=None):
    """torch's attention and log-sum-exp. Rows that see nothing give 0 and −∞, without a gradient."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if ranges is not None:
        mask = dense_mask(ranges)
    else:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
    empty = ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty).masked_fill(empty, 0.0)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~(mask | empty), float("-inf"))
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))


def distance(a, b):
    """‖a − b‖ / ‖b‖; 0 for two zeros; infinite entries must be the same."""
    a, b = a.double(), b.double()
    assert torch.equal(a.isinf(), b.isinf())
    a, b = (x.masked_fill(x.isinf(), 0.0) for x in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item() if b.any() or a.any() else 0.0


def results(fn, qkv, d_out, d_lse, mask, with_lse=True):
    """[out, lse, dq, dk, dv]."""
    out, lse = fn(*qkv, **mask)
    d_lse = d_lse.to(lse.dtype).masked_fill(lse.isinf(), 0.0)
    outputs, grads = ([out, lse], [d_out.to(out.dtype), d_lse]) if with_lse else ([out], [d_out.to(out.dtype)])
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, qkv, grads)]


def exact(qkv, *rest):
    return results(by_torch, [x.detach().double().requires_grad_() for x in qkv], *rest)


@pytest.mark.parametrize("name", CASES)
def test_float32_interpreted(name):
    """1e-6 by norm: float32 sums in another order."""
    sizes, mask = CASES[name]
    case = *inputs(sizes), mask
    with backend.interpreted():
        ours = results(attend, *case)
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, exact(*case)))


def test_float16_interpreted():
    """At most 1.5 times as far from float64 as torch's attention in float16. Both round the output, and ours also the
    probabilities before the product."""
    qkv, *rest = *inputs((1, 2, 1, 90, 90, 32), torch.float16), {}
    with backend.interpreted():
        ours = results(attend, qkv, *rest)
    theirs, best = results(by_torch, qkv, *rest), exact(qkv, *rest)
    for a, b, c in zip(ours, theirs, best):
        assert distance(a, c) < 1.5 * distance(b, c) + 1e-6


@pytest.mark.parametrize("name", ["causal", "full", "documents", "masked_documents"])
def test_the_formula_on_a_cpu(name):
    """Without the interpreter, CPU tensors run the formula: float64 to 1e-12."""
    sizes, mask = CASES[name]
    case = *inputs(sizes, torch.float64), mask
    assert all(distance(a, b) < 1e-12 for a, b in zip(results(attend, *case), exact(*case)))


def test_huge_logits():
    """Scores of ±1e4: the log-sum-exp is rounded to 1e-3, so probabilities are exact to 1e-3. Scores of ±1e7: no digit
    of the probabilities is exact, but they stay below 1. So no value's gradient is larger than if every query put all
    its weight on it."""
    (q, k, v), d_out, d_lse = inputs((1, 2, 2, 40, 40, 16))
    for size, far in ((1e2, 2e-3), (3e3, None)):
        scaled = [(x * s).detach().requires_grad_() for x, s in zip((q, k, v), (size, size, 1.0))]
        with backend.interpreted():
            ours = results(attend, scaled, d_out, d_lse, {}, False)
        theirs = exact(scaled, d_out, d_lse, {}, False)
        assert all(torch.isfinite(x).all() for x in ours)
        assert distance(ours[0], theirs[0]) < 1e-6
        assert (ours[4].abs() <= 1.000001 * d_out.abs().sum(2, keepdim=True)).all()
        if far is not None:
            assert distance(ours[4], theirs[4]) < far


def test_only_the_log_sum_exp_is_differentiated():
    qkv, _, d_lse = inputs((1, 2, 1, 40, 40, 16))
    with backend.interpreted():
        ours = torch.autograd.grad(attend(*qkv)[1], qkv[:2], d_lse)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    theirs = torch.autograd.grad(by_torch(*wide)[1], wide[:2], d_lse.double())
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, theirs))


def test_a_gradient_that_begins_anywhere():
    """The gradient may be part of a larger one and begin at no multiple of 16 bytes, where kernels cannot read."""
    qkv, d_out, _ = inputs((1, 2, 1, 40, 40, 16))
    with backend.interpreted():
        out = attend(*qkv)[0]
        ours = torch.autograd.grad(
            torch.cat((torch.ones(1), out.flatten())), qkv, torch.cat((torch.ones(1), d_out.flatten()))
        )
        theirs = torch.autograd.grad(attend(*qkv)[0], qkv, d_out)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_merged_chunks_equal_the_whole():
    """Attention over three chunks of keys, merged; the first rows see no key of the later chunks. Values and gradients,
    in float64 to 1e-12."""
    qkv, d_out, d_lse = inputs((1, 2, 1, 30, 30, 16), torch.float64)

    def in_chunks(q, k, v):
        parts = []
        for start, stop in ((0, 7), (7, 20), (20, 30)):
            hi = (torch.arange(1, 31) - start).clamp(0, stop - start)[None]
            ranges = key_ranges(torch.zeros_like(hi), hi, stop - start)
            parts.append(attend(q, k[:, :, start:stop], v[:, :, start:stop], ranges=ranges))
        return flash_attention.merge(parts)

    assert all(
        distance(a, b) < 1e-12 for a, b in zip(results(in_chunks, qkv, d_out, d_lse, {}), exact(qkv, d_out, d_lse, {}))
    )


def test_reference_composes_with_func():
    qkv, *_ = inputs((3, 2, 1, 5, 5, 16), torch.float64)
    qkv = [x.detach() for x in qkv]

    def loss(q, k, v):
        return flash_attention.reference(q[None], k[None], v[None])[0].square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss))(*qkv)
    torch.testing.assert_close(per_example, torch.stack([torch.func.grad(loss)(*x) for x in zip(*qkv)]))


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("name", ["causal", "masked_documents"])
def test_opcheck(name, interpret):
    sizes, mask = CASES[name]
    qkv, d_out, d_lse = inputs(sizes)
    bounds = mask.get("ranges", (None,) * 4)
    with backend.interpreted() if interpret else torch.no_grad():
        arguments = (*qkv, *bounds, True, 0.25)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.qwen3f.flash_attention, arguments, test_utils=tests)
        out, lse = torch.ops.qwen3f.flash_attention(*(x.detach() for x in qkv), *bounds, True, 0.25)
        backward = (d_out, d_lse, *(x.detach() for x in qkv), out, lse, *bounds, True, 0.25)
        torch.library.opcheck(torch.ops.qwen3f.flash_attention_backward, backward)
    if not interpret:
        torch.library.opcheck(torch.ops.qwen3f.flash_attention, arguments, test_utils="test_aot_dispatch_static")


def test_compiles_into_one_graph():
    qkv, d_out, d_lse = inputs((1, 2, 1, 30, 30, 16))
    ranges = ranges_from_segments(segments([9, 21]))

    def fn(q, k, v):
        out, lse = attend(q * 2, k, v, ranges=ranges)
        return out + 1, lse

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, qkv, d_out, d_lse, {}), results(fn, qkv, d_out, d_lse, {})):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_wrong_arguments_are_named():
    (q, k, v), *_ = inputs((1, 4, 2, 20, 20, 16))
    ranges = ranges_from_segments(segments([20]))
    wrong = [
        ((q[0], k, v), {}, "q must be"),
        ((q, k.half(), v), {}, "k is torch.float16"),
        ((q.int(), k.int(), v.int()), {}, "q is torch.int32"),
        ((q.transpose(2, 3), k, v), {}, "q has strides"),
        ((q, k[:, :, :, ::2], v), {}, "k has strides"),
        ((q, k, v.to("meta")), {}, "v is on meta"),
        ((q, k[:, :, :9], v), {}, "k and v must be"),
        ((q[:, :3], k, v), {}, "3 heads"),
        ((q, k[:, :, :9], v[:, :, :9]), {}, "causal needs"),
        ((q, k[:, :0], v[:, :0]), {}, "no multiple of k's 0"),
        ((q, k, v), {"scale": 0.0}, "scale must be positive"),
        ((q, k, v), {"ranges": ranges._replace(lo=ranges.lo.long())}, "ranges.lo must be"),
        ((q, k, v), {"ranges": ranges._replace(last=ranges.last[:, :9])}, "ranges.last must be"),
    ]
    for arguments, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            attend(*arguments, **options)
    with pytest.raises(ValueError, match="head_dim must be"):
        attend(*(x.detach()[..., :8].contiguous() for x in (q, k, v)))


GPU_CASES = {
    "causal": ((2, 4, 2, 600, 600, 128), {}),
    "documents": ((2, 4, 2, 600, 600, 128), {"ranges": ranges_from_segments(segments([5, 400, 194, 1], [600]))}),
    "full": ((1, 4, 4, 257, 300, 64), {"causal": False}),
    "masked": ((1, 2, 1, 333, 333, 80), {"ranges": ranges_from_cu_seqlens(torch.tensor([0, 5, 5, 180, 300]), 333)}),
    "wide": ((1, 2, 1, 333, 333, 256), {}),
    "narrow": ((1, 2, 2, 200, 200, 16), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name, dtype", [
    *(pytest.param(n, torch.bfloat16, marks=pytest.mark.nightly if n in ("wide", "narrow") else ()) for n in GPU_CASES),
    pytest.param("documents", torch.float16, marks=pytest.mark.nightly),
    ("documents", torch.float32),
])  # fmt: skip
def test_on_a_gpu(name, dtype):
    """At most 1.1 times as far from float64 as torch's own attention; in float32 within 2e-6 by norm. Two runs give the
    same bits."""
    sizes, mask = GPU_CASES[name]
    if "ranges" in mask:
        mask = {"ranges": type(mask["ranges"])(*(x.cuda() for x in mask["ranges"]))}
    qkv, *rest = *inputs(sizes, dtype, "cuda", seed=torch.seed() % 2**31), mask, False
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison
    ours, again = (results(attend, qkv, *rest) for _ in range(2))
    theirs, best = results(by_torch, qkv, *rest), exact(qkv, *rest)
    far = [[distance(x, y) for x, y in zip(r, best)] for r in (ours, theirs)]
    print(f"\nattention {name} {dtype}: ours {far[0]}, torch {far[1]}")
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    if dtype == torch.float32:
        assert max(far[0]) < 2e-6
    else:
        assert far[0][1] < 1e-6
        assert all(a <= 1.1 * b for a, b in zip(far[0][::2], far[1][::2]))
        assert far[0][3] <= 1.1 * far[1][3]
