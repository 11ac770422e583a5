"""Rotary positions, alone and after the norms of queries and keys, against transformers' Qwen3 in float64.

In Triton's interpreter, by the formula on a CPU, and on a GPU; MRoPE's tables against transformers' Qwen3-VL.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from kernels import backend, qk_norm_rope, rmsnorm, rope
from qwen3f.model.rope import apply_rope
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def draw(*shape, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).to(dtype).requires_grad_()


def tables(B, T, d, dtype, device="cpu"):
    angles = draw(T, d // 2, seed=5, device=device).detach().mul(10).expand(B, T, d // 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def exact_rope(q, k, cos, sin):
    wide = [torch.cat((x, x), -1) for x in (cos, sin)]
    return apply_rotary_pos_emb(q, k, *wide, unsqueeze_dim=2)


def exact_fused(q, k, q_weight, k_weight, cos, sin):
    d = q.shape[-1:]
    return exact_rope(F.rms_norm(q, d, q_weight, EPS), F.rms_norm(k, d, k_weight, EPS), cos, sin)


ENTRIES = {
    "rope": (rope.rope, rope.reference, exact_rope),
    "fused": (
        lambda *args: qk_norm_rope.qk_norm_rope(*args, EPS),
        lambda *args: qk_norm_rope.reference(*args, EPS),
        exact_fused,
    ),
}


def arguments(entry, shape, dtype, device="cpu"):
    B, T, H, K, d = shape
    q, k = draw(B, T, H, d, dtype=dtype, device=device), draw(B, T, K, d, dtype=dtype, seed=1, device=device)
    weights = [draw(d, dtype=dtype, seed=2 + i, device=device) for i in range(2)] if entry == "fused" else []
    return [q, k, *weights, *tables(B, T, d, dtype, device)]


def run(fn, args):
    """Outputs and gradients, for fixed random gradients of the outputs."""
    outputs = fn(*args)
    grads = [draw(*y.shape, seed=7 + i, device=y.device).detach().half().to(y.dtype) for i, y in enumerate(outputs)]
    wanted = [x for x in args if x.requires_grad]
    return [y.detach() for y in (*outputs, *torch.autograd.grad(outputs, wanted, grads))]


def assert_as_good_as_torch(ours, entry, args):
    """Ours rounds where torch does, or less often; 3e-7: float32, where both are a few roundings."""
    _, reference, exact = ENTRIES[entry]
    truth = run(exact, [a.detach().double().requires_grad_(a.requires_grad) for a in args])
    for mine, its, true in zip(ours, run(reference, args), truth):
        error, allowed = (float((y.double() - true).norm() / true.norm()) for y in (mine, its))
        assert error <= max(1.05 * allowed, 3e-7)


# The interpreter truncates bfloat16 instead of rounding it, so half precision is float16 there.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 64), (2, 7, 4, 2, 16), (1, 19, 3, 1, 80), (2, 3, 2, 2, 256)])
def test_interpreted(shape, entry, dtype):
    args = arguments(entry, shape, dtype)
    with backend.interpreted():
        assert_as_good_as_torch(run(ENTRIES[entry][0], args), entry, args)


@pytest.mark.parametrize("entry", ENTRIES)
def test_interpreted_strides(entry):
    """Heads before tokens, heads cut out of one joined projection, tables of unlike strides."""
    fn, _, exact = ENTRIES[entry]
    args = arguments(entry, (2, 9, 4, 2, 12), torch.float32)
    joined = draw(2, 9, 8, 12)
    transposed = args[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    cos = args[-2].transpose(0, 1).contiguous().transpose(0, 1)

    def grads(f):
        outputs = f(transposed, joined[:, :, 4:6], *args[2:-2], cos, args[-1])
        loss = outputs[0].transpose(1, 2).matmul(torch.ones(12)).sum() + outputs[1].sum()  # gradients of strides 0
        return *outputs, *torch.autograd.grad(loss, (transposed, joined))

    with backend.interpreted():
        ours = grads(fn)
    torch.testing.assert_close(ours, grads(exact), rtol=1e-5, atol=1e-5)
    assert ours[0].is_contiguous()


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_tokens(entry, interpret):
    args = arguments(entry, (2, 0, 3, 1, 8), torch.float32)
    if interpret:
        with backend.interpreted():
            results = run(ENTRIES[entry][0], args)
    else:
        results = run(ENTRIES[entry][0], args)
    assert [tuple(r.shape) for r in results[:2]] == [(2, 0, 3, 8), (2, 0, 1, 8)]
    assert all(r.eq(0).all() for r in results)


@pytest.mark.parametrize("interpret", [False, True])
def test_inplace(interpret):
    q, k, cos, sin = arguments("rope", (2, 5, 3, 1, 8), torch.float32)
    expected = exact_rope(q, k, cos, sin)

    def check():
        with pytest.raises(ValueError, match="q requires a gradient"):
            rope.rope(q, k, cos, sin, inplace=True)
        a, b = q.detach().transpose(1, 2).contiguous().transpose(1, 2), k.detach().clone()
        before = a.data_ptr()
        out = rope.rope(a, b, cos, sin, inplace=True)
        assert out[0] is a
        assert out[1] is b
        assert a.data_ptr() == before
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        torch.library.opcheck(torch.ops.qwen3f.rope_, (a, b, cos, sin))
        with pytest.raises(ValueError, match="k is expanded"):
            rope.rope(a, b[:, :1].expand(2, 5, 1, 8), cos, sin, inplace=True)

    if interpret:
        with backend.interpreted():
            check()
    else:
        check()


@pytest.mark.parametrize("entry", ENTRIES)
def test_formula(entry):
    fn, reference, exact = ENTRIES[entry]
    args = arguments(entry, (2, 3, 4, 2, 6), torch.float64)
    for f in (fn, reference):
        for a, b in zip(run(f, args), run(exact, args)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fn, args)
    half = arguments(entry, (2, 5, 4, 2, 16), torch.bfloat16)
    assert_as_good_as_torch(run(fn, half), entry, half)


def test_rope_is_the_model_s_and_differentiable_twice():
    q, k, cos, sin = arguments("rope", (2, 3, 2, 1, 4), torch.float64)
    assert torch.equal(rope.rope(q, k, cos, sin)[0], apply_rope(q, cos, sin))
    assert torch.autograd.gradgradcheck(rope.rope, (q, k, cos, sin))


def test_fused_equals_apart_in_the_interpreter():
    """Both round the normed head, its product with the weight and the rotated head to float16.

    So they are equal, except where sums are in another order.
    """
    q, k, q_weight, k_weight, cos, sin = arguments("fused", (1, 9, 4, 2, 32), torch.float16)
    with backend.interpreted():
        fused = qk_norm_rope.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
        apart = rope.rope(rmsnorm.rms_norm(q, q_weight, EPS), rmsnorm.rms_norm(k, k_weight, EPS), cos, sin)
    for a, b in zip(fused, apart):
        assert (a != b).float().mean() < 0.02
        torch.testing.assert_close(a, b, rtol=2**-9, atol=2**-9)


def test_reference_composes_with_torch_func():
    q, k, *rest = (a.detach() for a in arguments("fused", (3, 2, 2, 1, 4), torch.float64))

    def loss(q, k, q_weight, k_weight, cos, sin):
        return sum(
            y.square().sum() for y in qk_norm_rope.reference(q[None], k[None], q_weight, k_weight, cos, sin, EPS)
        )

    tables_ = [x[:1] for x in rest[2:]]
    per_row = torch.func.vmap(torch.func.grad(loss), (0, 0, *[None] * 4))(q, k, *rest[:2], *tables_)
    leaf = q.clone().requires_grad_()
    total = sum(y.square().sum() for y in exact_fused(leaf, k, *rest))
    torch.testing.assert_close(per_row, torch.autograd.grad(total, leaf)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("interpret", [False, True])
def test_opcheck(interpret):
    q, k, q_weight, k_weight, cos, sin = arguments("fused", (2, 3, 2, 1, 8), torch.float32)
    ops, plain = torch.ops.qwen3f, [x.detach() for x in (q, k, q_weight, k_weight)]

    def check():
        torch.library.opcheck(ops.rope, (q, k, cos, sin, False))
        torch.library.opcheck(ops.rope, (*(x.mT.contiguous().mT for x in (q, k)), cos, sin, True))
        torch.library.opcheck(ops.qk_norm_rope, (q, k, q_weight, k_weight, cos, sin, EPS))
        torch.library.opcheck(ops.qk_norm_rope_backward, (*plain[:2], *plain, cos, sin, EPS))

    if interpret:
        with backend.interpreted():
            check()
    else:
        check()


def test_compiled_equals_eager():
    def fn(q, k, q_weight, k_weight, cos, sin):
        q, k = qk_norm_rope.qk_norm_rope(q * 2, k, q_weight, k_weight, cos, sin, EPS)
        return rope.rope(q, k, cos, sin)

    args = arguments("fused", (2, 3, 2, 1, 8), torch.float32)
    for a, b in zip(run(torch.compile(fn, fullgraph=True, backend="aot_eager"), args), run(fn, args)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sections", [(24, 20, 20), (6, 1, 1), (2, 3, 3)])
def test_mrope_tables_are_transformers(sections):
    d = 2 * sum(sections)
    parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections)}
    config = Qwen3VLTextConfig(head_dim=d, hidden_size=2 * d, num_attention_heads=2, rope_parameters=parameters)
    theirs = Qwen3VLTextRotaryEmbedding(config)
    positions = torch.randint(0, 10_000, (3, 2, 11))
    cos, sin = rope.mrope_tables(positions, theirs.inv_freq, sections, torch.float32)
    for mine, its in zip((cos, sin), theirs(torch.zeros(1), positions)):
        assert torch.equal(torch.cat((mine, mine), -1), its)


def test_mrope_tables_of_text_are_those_of_one_axis():
    positions = torch.arange(5).expand(3, 1, 5)
    inv_freq = torch.rand(8)
    angles = torch.arange(5.0)[None, :, None] * inv_freq
    cos, sin = rope.mrope_tables(positions, inv_freq, (4, 2, 2), torch.float32, scale=1.5)
    torch.testing.assert_close((cos, sin), (angles.cos() * 1.5, angles.sin() * 1.5))
    with pytest.raises(ValueError, match="of sum 8"):
        rope.mrope_tables(positions, inv_freq, (4, 2, 1), torch.float32)


def test_wrong_arguments_are_named():
    q, k, q_weight, k_weight, cos, sin = arguments("fused", (2, 3, 4, 2, 8), torch.float32)
    wrong = [
        ((q.int(), k, cos, sin), "q is torch.int32"),
        ((q[0], k, cos, sin), r"q must be \[B, T, H, d\]"),
        ((q[..., :7], k, cos, sin), "d even"),
        ((q, k[:, :2], cos, sin), "k must be"),
        ((q, k[..., :6], cos, sin), "k must be"),
        ((q, k.half(), cos, sin), "k is torch.float16"),
        ((q, k, cos[..., :3], sin), "cos must be"),
        ((q, k, cos, sin[:, :1]), "sin must be"),
        ((q, k, cos, sin.double()), "sin is torch.float64"),
        ((q.mT.contiguous().mT, k, cos, sin), "q has stride 4"),
        ((q, k, cos, sin.mT.contiguous().mT), "sin has stride 3"),
        ((q, k, cos.to("meta"), sin), "cos is on meta"),
    ]
    for args, words in wrong:
        with pytest.raises(ValueError, match=words):
            rope.rope(*args)
        with pytest.raises(ValueError, match=words):
            qk_norm_rope.qk_norm_rope(*args[:2], q_weight, k_weight, *args[2:], EPS)
    for weights, words in (((q_weight[:4], k_weight), "q_weight must"), ((q_weight, k_weight.half()), "k_weight must")):
        with pytest.raises(ValueError, match=words):
            qk_norm_rope.qk_norm_rope(q, k, *weights, cos, sin, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "shape, dtype", in_dtypes([((1, 777, 5, 1, 80),), ((2, 1024, 16, 8, 128),), ((2, 300, 32, 4, 64),)])
)
def test_gpu(shape, entry, dtype):
    args = arguments(entry, shape, dtype, "cuda")
    fn, reference, _ = ENTRIES[entry]
    expected = run(reference, args)

    def poisoned():
        for y in expected:
            torch.full_like(y, float("nan"))  # NaN memory, freed at once: our outputs are allocated from it
        return run(fn, args)

    ours = poisoned()
    assert_as_good_as_torch(ours, entry, args)
    assert all(torch.equal(a, b) for a, b in zip(ours, poisoned()))
    if entry == "rope":
        q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in args[:2])
        for a, b in zip(rope.rope(q, k, *args[2:], inplace=True), ours):
            assert torch.equal(a, b)
