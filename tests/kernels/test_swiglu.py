"""SwiGLU against F.silu(gate) · up in float64: in Triton's interpreter, by the formula on a CPU, and on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from kernels import backend, swiglu
from tests.kernels.gpu_cases import in_dtypes


def draw(*shape, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator(device).manual_seed(seed)
    return (3 * torch.randn(*shape, generator=g, device=device)).to(dtype).requires_grad_()


def exact_joined(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


ENTRIES = {
    "separate": (swiglu.swiglu, swiglu.reference, lambda gate, up: F.silu(gate) * up),
    "joined": (swiglu.swiglu_joined, swiglu.reference_joined, exact_joined),
}


def arguments(entry, shape, dtype, device="cpu"):
    if entry == "joined":
        return [draw(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)]
    return [draw(*shape, dtype=dtype, seed=seed, device=device) for seed in range(2)]


def run(fn, args):
    """Output and gradients, for a fixed random gradient of the output."""
    out = fn(*args)
    grad = draw(*out.shape, seed=7, device=out.device).detach().half().to(out.dtype)
    return [y.detach() for y in (out, *torch.autograd.grad(out, args, grad))]


def assert_as_good_as_torch(ours, entry, args):
    """Ours rounds where torch does, or less often; 3e-7: float32, where both are a few roundings."""
    _, reference, exact = ENTRIES[entry]
    truth = run(exact, [a.detach().double().requires_grad_() for a in args])
    for mine, its, true in zip(ours, run(reference, args), truth):
        error, allowed = (float((y.double() - true).norm() / true.norm()) for y in (mine, its))
        assert error <= max(1.05 * allowed, 3e-7)


# The interpreter truncates bfloat16 instead of rounding it, so half precision is float16 there.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 40), (2, 1025), (3, 1, 1024)])
def test_interpreted(shape, entry, dtype):
    args = arguments(entry, shape, dtype)
    with backend.interpreted():
        assert_as_good_as_torch(run(ENTRIES[entry][0], args), entry, args)


def test_interpreted_strides():
    wide = draw(4, 3, 100)
    gate, up = wide[:, :, 4:34], wide[:, 1:2, 60:90].expand(4, 3, 30)
    with backend.interpreted():
        out = swiglu.swiglu(gate.transpose(0, 1), up.transpose(0, 1))
        (ours,) = torch.autograd.grad(out.sum(), wide)  # a gradient of strides 0
    plain = F.silu(gate) * up
    torch.testing.assert_close(out.transpose(0, 1), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, torch.autograd.grad(plain.sum(), wide)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow")  # exp(3e38) in the interpreter is numpy's
@pytest.mark.parametrize("entry", ENTRIES)
def test_saturated_and_empty(entry):
    gate = torch.tensor([[-3e38, -200.0, -90.0, 0.0, 90.0, 3e38]])
    both = (gate, torch.full_like(gate, 0.5))
    args = [torch.cat(both, -1).requires_grad_()] if entry == "joined" else [x.requires_grad_() for x in both]
    fn, _, exact = ENTRIES[entry]
    with backend.interpreted():
        for a, b in zip(run(fn, args), run(exact, args)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)
        out = fn(*(a[:0] for a in args))
        assert out.shape == (0, 6)
        assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("entry", ENTRIES)
def test_formula(entry):
    fn, reference, exact = ENTRIES[entry]
    args = arguments(entry, (3, 2, 5), torch.float64)
    for f in (fn, reference):
        for a, b in zip(run(f, args), run(exact, args)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fn, args)
    half = arguments(entry, (4, 100), torch.bfloat16)
    assert_as_good_as_torch(run(fn, half), entry, half)
    assert torch.equal(fn(*half), exact(*half))


def test_reference_composes_with_torch_func():
    gate, up = (a.detach() for a in arguments("separate", (4, 6), torch.float64))
    per_row = torch.func.vmap(torch.func.grad(lambda g, u: swiglu.reference(g, u).sum()))(gate, up)
    leaf = gate.clone().requires_grad_()
    torch.testing.assert_close(per_row, torch.autograd.grad((F.silu(leaf) * up).sum(), leaf)[0])


@pytest.mark.parametrize("interpret", [False, True])
def test_opcheck(interpret):
    gate, up = arguments("separate", (2, 3, 6), torch.float32)
    d_out, ops = torch.randn(2, 3, 6), torch.ops.qwen3f

    def check():
        torch.library.opcheck(ops.swiglu, (gate, up))
        torch.library.opcheck(ops.swiglu, (gate.transpose(0, 1), up.transpose(0, 1)))
        torch.library.opcheck(ops.swiglu_backward, (d_out, gate.detach(), up.detach()))
        torch.library.opcheck(ops.swiglu_joined, (gate,))
        torch.library.opcheck(ops.swiglu_joined_backward, (d_out[..., :3], gate.detach()))

    if interpret:
        with backend.interpreted():
            check()
    else:
        check()


def test_compiled_equals_eager():
    def fn(gate, up):
        return swiglu.swiglu_joined(torch.cat((swiglu.swiglu(gate * 2, up), up), -1))

    args = arguments("separate", (3, 8), torch.float32)
    for a, b in zip(run(torch.compile(fn, fullgraph=True, backend="aot_eager"), args), run(fn, args)):
        assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    x = torch.randn(4, 6)
    wrong = [
        (swiglu.swiglu, (x.int(), x), "gate is torch.int32"),
        (swiglu.swiglu, (x, x[:2]), "up must be torch.float32"),
        (swiglu.swiglu, (x, x.half()), "up must be torch.float32"),
        (swiglu.swiglu, (x, torch.randn(6, 4).t()), "up has stride 4"),
        (swiglu.swiglu, (x, x.to("meta")), "up is on meta"),
        (swiglu.swiglu, (x[0, 0], x), "gate must be"),
        (swiglu.swiglu_joined, (x[:, :5],), r"gate_up must be \[..., 2I\]"),
        (swiglu.swiglu_joined, (x.t(),), "gate_up has stride 6"),
    ]
    for fn, args, words in wrong:
        with pytest.raises(ValueError, match=words):
            fn(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("shape, dtype", in_dtypes([((7, 1001),), ((4, 1024, 6144),), ((513, 5504),)]))
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
