"""Attention over a cache, split over programs, against torch's attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.flash_decode import flash_decode
from tests.kernels.gpu_cases import in_dtypes


def case(batch, heads, kv_heads, length, slots, d, dtype=torch.float32, device="cpu"):
    """q, k, v and the number of slots that each query sees.

    k and v are slices of a larger cache. Slots that no query of a row sees are NaN.
    """
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, length, d, generator=g)
    k, v = (torch.randn(batch, kv_heads, slots + 3, d, generator=g)[:, :, 1 : slots + 1] for _ in range(2))
    seen = torch.randint(0, slots + 1, (batch, length), generator=g).sort(1).values.to(torch.int32)
    seen[0, 0], seen[-1, -1] = 0, slots
    for row in range(batch):
        k[row, :, int(seen[row].max()) :] = v[row, :, int(seen[row].max()) :] = float("nan")
    return *(x.to(device, dtype) for x in (q, k, v)), seen.to(device)


def by_torch(q, k, v, seen):
    group = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num().repeat_interleave(group, 1) for x in (k, v))
    mask = (torch.arange(k.shape[2], device=q.device) < seen[..., None])[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | (seen == 0)[:, None, :, None])
    return out.masked_fill((seen == 0)[:, None, :, None], 0.0)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def exact(q, k, v, seen):
    return by_torch(q.double(), k.double(), v.double(), seen)


SHAPES = [(2, 4, 2, 1, 300, 32), (1, 2, 2, 3, 70, 24), (3, 8, 1, 2, 129, 16), (2, 2, 1, 1, 1, 16)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes):
    arguments = case(*sizes)
    with backend.interpreted():
        out = flash_decode(*arguments)
    assert distance(out, exact(*arguments)) < 1e-6


def test_float16_interpreted():
    """At most 1.5 times torch's error in float16: both round the output, and ours rounds the probabilities too."""
    arguments = case(*SHAPES[0], torch.float16)
    with backend.interpreted():
        out = flash_decode(*arguments)
    assert distance(out, exact(*arguments)) < 1.5 * distance(by_torch(*arguments), exact(*arguments))


def test_formula_opcheck_and_compile():
    q, k, v, seen = case(2, 4, 2, 1, 20, 16)
    out = flash_decode(q, k, v, seen)
    assert distance(out, exact(q, k, v, seen)) < 1e-6
    compiled = torch.compile(lambda *x: flash_decode(*x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, seen), out + 1, rtol=0, atol=0)
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(torch.ops.qwen3f.flash_decode, (q, k, v, seen, 0.25), test_utils="test_faketensor")


def test_wrong_arguments_are_named():
    q, k, v, seen = case(1, 4, 2, 1, 20, 16)
    wrong = [
        ((q[0], k, v, seen), "q must be"),
        ((q, k.half(), v, seen), "k must be"),
        ((q, k, v.transpose(2, 3), seen), "v must be"),
        ((q, k, v[:, :, :5], seen), "fit together"),
        ((q[:, :3], k, v, seen), "fit together"),
        ((q.expand(1, 4, 1, 16).repeat(1, 1, 80, 1), k, v, seen), "at most 128 fit"),
        ((q, k, v, seen.long()), "seen must be"),
        ((q, k, v, seen.to("meta")), "seen is on meta"),
        ((q, k[:, :0], v[:, :0], seen), "do not fit together"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            flash_decode(*arguments)
    with pytest.raises(ValueError, match="scale"):
        flash_decode(q, k, v, seen, scale=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes, dtype",
    in_dtypes([((2, 8, 2, 4, 300, 80),), ((3, 16, 8, 1, 5000, 128),), ((64, 16, 8, 1, 700, 128),)]),
)
def test_on_a_gpu(sizes, dtype):
    """At most 1.2 times as far from float64 as torch's own (2e-6 in float32). Two runs give the same bits."""
    arguments = case(*sizes, dtype, "cuda")
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison
    out = flash_decode(*arguments)
    ours, theirs = (distance(x, exact(*arguments)) for x in (out, by_torch(*arguments)))
    print(f"\ndecode {sizes} {dtype}: ours {ours:.2e}, torch {theirs:.2e}")
    assert torch.equal(out, flash_decode(*arguments))
    assert ours < 2e-6 if dtype == torch.float32 else ours <= 1.2 * theirs
