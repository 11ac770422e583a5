"""Attention of new tokens over a paged cache, against torch's attention in float64 over each row's own tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, paged_attention
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def case(lengths, heads, kv_heads, d, page, columns, dtype=torch.float32, norm=True, device="cpu"):
    """Arguments of paged_attention. Pages are in a random order; what no row has written is NaN, also page 0.

    Table entries after a row's own pages are invalid (2^30).
    """
    g = torch.Generator().manual_seed(0)
    rows, used = len(lengths), [n // page + 1 for n in lengths]
    order = iter((torch.randperm(sum(used), generator=g) + 1).tolist())
    table = torch.full((rows, columns), 1 << 30, dtype=torch.int32)
    k, v = (torch.full((sum(used) + 1, kv_heads, page, d), float("nan")) for _ in range(2))
    for b, length in enumerate(lengths):
        table[b, : used[b]] = torch.tensor([next(order) for _ in range(used[b])], dtype=torch.int32)
        for pages in (k, v):
            for t in range(length):
                pages[table[b, t // page], :, t % page] = torch.randn(kv_heads, d, generator=g)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * d, generator=g)
    norms = [1 + 0.3 * torch.randn(d, generator=g) if norm else None for _ in range(2)]
    angles = torch.tensor(lengths)[:, None] * 10000.0 ** -torch.linspace(0, 1, d // 2)
    floats = [None if x is None else x.to(device, dtype) for x in (qkv, *norms, angles.cos(), angles.sin(), k, v)]
    ends = table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)
    return [*floats[:3], EPS, *floats[3:], *ends]


def heads_of(x_Hd: Tensor, weight_d: Tensor | None, cos_F: Tensor, sin_F: Tensor) -> Tensor:
    if weight_d is not None:
        x_Hd = F.rms_norm(x_Hd, x_Hd.shape[-1:], weight_d, EPS)
    first, second = x_Hd.chunk(2, -1)
    return torch.cat((first * cos_F - second * sin_F, second * cos_F + first * sin_F), -1)


def exact(qkv, q_norm, k_norm, _eps, cos, sin, k_pages, v_pages, table, lengths):
    """(output, new keys, new values) row by row, in float64 or the dtype that torch computes in."""
    out, keys, values = [], [], []
    _, K, page, d = k_pages.shape
    for b, length in enumerate(lengths.tolist()):
        q, k, v = qkv[b].view(-1, d).split((qkv.shape[1] // d - 2 * K, K, K))
        q, k = heads_of(q, q_norm, cos[b], sin[b]), heads_of(k, k_norm, cos[b], sin[b])
        pages = table[b, : length // page + 1].long()
        old_k, old_v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (k_pages, v_pages))
        all_k, all_v = torch.cat((old_k, k[:, None]), 1), torch.cat((old_v, v[:, None]), 1)
        attended = F.scaled_dot_product_attention(q[None, :, None], all_k[None], all_v[None], enable_gqa=True)
        out.append(attended.flatten())
        keys.append(k)
        values.append(v)
    return torch.stack(out), torch.stack(keys), torch.stack(values)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def wide(arguments):
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def check(arguments, tolerance):
    """The output, the pages' new entries, and that nothing else in the pages changed. Returns the output."""
    *_, k_pages, v_pages, table, lengths = arguments
    before = k_pages.clone(), v_pages.clone()
    truth = exact(*wide(arguments))
    out = paged_attention.paged_attention(*arguments)
    page = k_pages.shape[2]
    at = table.gather(1, (lengths // page)[:, None].long())[:, 0].long(), slice(None), (lengths % page).long()
    for ours, true in zip((out, k_pages[at], v_pages[at]), truth):
        assert distance(ours, true) < tolerance
    for pages, old in zip((k_pages, v_pages), before):
        old[at] = pages[at]
        torch.testing.assert_close(pages, old, rtol=0, atol=0, equal_nan=True)
    return out


# lengths (0, page borders and blocks' borders among them), heads, kv heads, d, page, columns of the table
SHAPES = [
    ([0, 1, 31, 32, 33, 100], 4, 2, 32, 16, 8),
    ([127, 128, 5], 3, 1, 16, 64, 4),
    ([70], 2, 2, 64, 32, 3),
    ([3, 250], 8, 1, 16, 256, 1),
]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("programs", [1, 40])
def test_interpreted(sizes, programs, monkeypatch):
    """With one split and with several; 1e-6: float32 sums of a few hundred terms."""
    monkeypatch.setattr(paged_attention, "_PROGRAMS", programs)
    *_, table, _ = arguments = case(*sizes)
    splits = paged_attention.splits_of(len(sizes[0]), sizes[2], table.shape[1], sizes[4])
    assert (splits > 1) == (programs > 1)
    with backend.interpreted():
        check(arguments, 1e-6)


def test_without_norm_interpreted():
    with backend.interpreted():
        check(case(*SHAPES[0], norm=False), 1e-6)


def test_float16_interpreted():
    """Rounded where torch's formula rounds, and the probabilities too. Two float16 roundings: 1e-3."""
    with backend.interpreted():
        check(case(*SHAPES[0], torch.float16), 1e-3)


@pytest.mark.parametrize("interpret", [False, True])
def test_idle_rows_share_the_dump(interpret):
    """Two idle rows beside a real one write to page 0 only, and their outputs are finite."""
    arguments = case([0, 40, 0], 4, 2, 16, 16, 4)
    arguments[-2][0] = arguments[-2][2] = 0
    alone = [x[1:2] if isinstance(x, Tensor) and len(x) == 3 else x for x in arguments]
    truth = exact(*wide(alone))[0]
    kept = arguments[6][1:].clone()
    if interpret:
        with backend.interpreted():
            out = paged_attention.paged_attention(*arguments)
    else:
        out = paged_attention.paged_attention(*arguments)
    assert out.isfinite().all()
    assert distance(out[1], truth[0]) < 1e-6
    changed = (arguments[6][1:] != kept) & ~(arguments[6][1:].isnan() & kept.isnan())
    assert changed.any(-1).sum() == 2  # the real row's two key heads


@pytest.mark.parametrize("interpret", [False, True])
def test_no_rows(interpret):
    arguments = [x[:0] if isinstance(x, Tensor) and len(x) == 3 else x for x in case([0, 40, 9], 4, 2, 16, 16, 4)]
    with backend.interpreted() if interpret else torch.no_grad():
        assert paged_attention.paged_attention(*arguments).shape == (0, 64)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", SHAPES[:2])
def test_formula(sizes, norm):
    check(case(*sizes, torch.float64, norm), 1e-12)
    check(case(*sizes, torch.float32, norm), 1e-6)
    check(case(*sizes, torch.bfloat16, norm), 1e-2)


def test_many_steps_build_the_cache_they_read():
    """From an empty cache, one token at a time, against full causal attention at the end."""
    g = torch.Generator().manual_seed(1)
    steps, heads, K, d, page = 21, 2, 1, 16, 8
    qkv = torch.randn(steps, 1, (heads + 2 * K) * d, generator=g)
    angles = torch.arange(steps)[:, None] * 100.0 ** -torch.linspace(0, 1, d // 2)
    k, v = (torch.full((4, K, page, d), float("nan")) for _ in range(2))
    table, ones = torch.tensor([[2, 3, 1]], dtype=torch.int32), torch.ones(d)
    with backend.interpreted():
        for t in range(steps):
            cos, sin = angles[t : t + 1].cos(), angles[t : t + 1].sin()
            length = torch.tensor([t], dtype=torch.int32)
            out = paged_attention.paged_attention(qkv[t], ones, ones, EPS, cos, sin, k, v, table, length)
    q_THd, k_TKd, v_TKd = qkv.double().view(steps, -1, d).split((heads, K, K), 1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    turned = [heads_of(x, ones.double(), cos, sin) for x in (q_THd, k_TKd)]
    q, k, v = (x.transpose(0, 1)[None] for x in (*turned, v_TKd))
    truth = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0, :, -1]
    assert distance(out.view(heads, d), truth) < 1e-6


def test_opcheck_and_compile():
    arguments = case(*SHAPES[0])
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.paged_attention, tuple(arguments), test_utils=("test_schema", "test_faketensor")
            )
    expected = paged_attention.paged_attention(*arguments)
    compiled = torch.compile(
        lambda *x: paged_attention.paged_attention(*x) + 1, fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.testing.assert_close(compiled(*arguments), expected + 1, rtol=0, atol=0)


def test_splits_follow_from_shapes_alone():
    assert paged_attention.splits_of(1, 8, 640, 64) == 64
    assert paged_attention.splits_of(64, 8, 640, 64) == 1
    assert paged_attention.splits_of(256, 8, 640, 64) == 1
    assert paged_attention.splits_of(1, 1, 1, 16) == 1


def test_wrong_arguments_are_named():
    qkv, q_norm, k_norm, eps, cos, sin, k, v, table, lengths = case([5, 9], 4, 2, 16, 16, 2)
    wrong = [
        ((qkv[:, :-16], q_norm, k_norm, eps, cos, sin, k, v, table, lengths), "qkv must be"),
        ((qkv[0], q_norm, k_norm, eps, cos, sin, k, v, table, lengths), "qkv must be"),
        ((qkv[:, :64].contiguous(), q_norm, k_norm, eps, cos, sin, k, v, table, lengths), "H/K"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k[:, :0], v[:, :0], table, lengths), "H/K"),
        ((qkv, q_norm, None, eps, cos, sin, k, v, table, lengths), "go together"),
        ((qkv, q_norm, k_norm[:8], eps, cos, sin, k, v, table, lengths), "k_norm must be"),
        ((qkv, q_norm, k_norm, eps, cos.repeat(1, 2), sin, k, v, table, lengths), "cos must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k.half(), v, table, lengths), "k_pages must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k, v[:1], table, lengths), "v_pages must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, *(x[:, :, :5].contiguous() for x in (k, v)), table, lengths), "power"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k, v, table.long(), lengths), "table must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k, v, table[:, :0], lengths), "table must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k, v, table, lengths.long()), "lengths must be"),
        ((qkv, q_norm, k_norm, eps, cos, sin, k, v, table.to("meta"), lengths), "table is on meta"),
    ]  # fmt: skip
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            paged_attention.paged_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes, dtype",
    in_dtypes(
        [
            (([0, 63, 64, 1000, 5000], 16, 8, 128, 64, 100),),
            (([9] * 30 + [700] * 34, 16, 8, 128, 16, 64),),
            (([300], 32, 4, 128, 256, 4),),
            (([40, 90], 2, 2, 64, 16, 10),),
        ]
    ),
)
def test_on_a_gpu(sizes, dtype):
    """At most 1.2 times as far from float64 as torch's own attention (2e-6 in float32). The same bits twice."""
    arguments = case(*sizes, dtype, device="cuda")
    truth = exact(*wide(arguments))[0]
    theirs = distance(exact(*arguments)[0], truth)
    out = check(arguments, 1e-2)
    ours = distance(out, truth)
    print(f"\npaged {sizes[1:]} {dtype}: ours {ours:.2e}, torch {theirs:.2e}")
    assert torch.equal(out, paged_attention.paged_attention(*arguments))
    assert ours < 2e-6 if dtype == torch.float32 else ours <= 1.2 * theirs
