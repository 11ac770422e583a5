"""RMSNorm against torch's own in float64: in Triton's interpreter, by the formula on a CPU, and on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from kernels import backend, rmsnorm
from qwen3f.model import norm
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def draw(*shape, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).to(dtype).requires_grad_()


def exact(x, weight, eps, residual=None):
    total = x if residual is None else x + residual
    out = F.rms_norm(total, total.shape[-1:], weight, eps)
    return out if residual is None else (out, total)


def run(fn, *args):
    """Outputs and gradients, for fixed random gradients of the outputs."""
    outputs = fn(args[0], args[1], EPS, *args[2:])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [draw(*y.shape, seed=7 + i, device=y.device).detach().half().to(y.dtype) for i, y in enumerate(outputs)]
    return [y.detach() for y in (*outputs, *torch.autograd.grad(outputs, args, grads))]


def errors(results, args):
    truth = run(exact, *(a.detach().double().requires_grad_() for a in args))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, truth)]


def arguments(shape, residual, dtype, device="cpu"):
    args = [draw(*shape, dtype=dtype, device=device), draw(shape[-1], dtype=dtype, seed=1, device=device)]
    return args + [draw(*shape, dtype=dtype, seed=2, device=device)] * residual


def assert_as_good_as_torch(ours, args, ratio):
    """Ours rounds where the reference does, so only the order of sums may differ. Gradients are rounded less often."""
    for mine, its in zip(errors(ours, args), errors(run(rmsnorm.reference, *args), args)):
        assert mine <= max(ratio * its, 3e-7)  # 3e-7: float32, where both are a few roundings


# The interpreter truncates bfloat16 instead of rounding it, so half precision is float16 there.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (3, 40), (2, 150, 128), (5, 2049), (1, 9000)])
def test_interpreted(shape, residual, dtype):
    args = arguments(shape, residual, dtype)
    with backend.interpreted():
        ours = run(rmsnorm.rms_norm, *args)
    assert_as_good_as_torch(ours, args, 1.05)
    if dtype == torch.float32:
        assert max(errors(ours, args)) < 1e-6


def test_interpreted_strides():
    wide = draw(6, 5, 64)
    x, residual = wide[:, :, 8:40], wide[:, 1:2, :32].expand(6, 5, 32)
    weight = draw(32)
    with backend.interpreted():
        ours = rmsnorm.rms_norm(x, weight, EPS, residual)
        grads = torch.autograd.grad(ours[0].sum() + ours[1].mT.sum(), (wide, weight))  # gradients of strides 0
        flipped = rmsnorm.rms_norm(x.transpose(0, 1), weight, EPS)
    plain = exact(x, weight, EPS, residual)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flipped, exact(x.transpose(0, 1), weight, EPS), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plain[0].sum() + plain[1].mT.sum(), (wide, weight))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_no_rows(residual, interpret):
    args = arguments((0, 3, 8), residual, torch.float32)
    if interpret:
        with backend.interpreted():
            results = run(rmsnorm.rms_norm, *args)
    else:
        results = run(rmsnorm.rms_norm, *args)
    assert results[0].shape == (0, 3, 8)
    dw = results[3 if residual else 2]
    assert torch.equal(dw, torch.zeros(8))


@pytest.mark.parametrize("residual", [False, True])
def test_formula(residual):
    args = arguments((3, 2, 24), residual, torch.float64)
    assert max(errors(run(rmsnorm.rms_norm, *args), args)) < 1e-14
    assert torch.autograd.gradcheck(lambda x, w, *r: rmsnorm.rms_norm(x, w, EPS, *r), args)
    half = arguments((3, 40), residual, torch.bfloat16)
    assert_as_good_as_torch(run(rmsnorm.rms_norm, *half), half, 1.05)
    outputs = rmsnorm.rms_norm(half[0], half[1], EPS, *half[2:])
    total = half[0] + half[2] if residual else half[0]
    assert torch.equal(outputs[0] if residual else outputs, norm.rms_norm(total, half[1], EPS))


def test_reference_composes_with_torch_func():
    x, weight = (a.detach() for a in arguments((4, 16), False, torch.float64))

    def loss(row, w):
        return rmsnorm.reference(row, w, EPS).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x, weight)
    leaf = weight.clone().requires_grad_()
    (whole,) = torch.autograd.grad(exact(x, leaf, EPS).square().sum(), leaf)
    torch.testing.assert_close(per_row.sum(0), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interpret", [False, True])
def test_opcheck(interpret):
    x, weight, residual = arguments((2, 5, 24), True, torch.float32)
    d_out, rstd = torch.randn(2, 5, 24), torch.rand(2, 5)
    ops = torch.ops.qwen3f

    def check():
        torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
        torch.library.opcheck(ops.rms_norm, (x.transpose(0, 1), weight, EPS))
        torch.library.opcheck(ops.rms_norm_add, (x, residual, weight, EPS))
        for d_sum in (None, d_out):
            args = (d_out, d_sum, x.detach(), weight.detach(), rstd)
            torch.library.opcheck(ops.rms_norm_backward, args)

    if interpret:
        with backend.interpreted():
            check()
    else:
        check()


def test_compiled_equals_eager():
    def fn(x, weight, eps, residual):
        out, total = rmsnorm.rms_norm(x * 2, weight, eps, residual)
        return rmsnorm.rms_norm(out, weight, eps) + total

    args = arguments((3, 8), True, torch.float32)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, *args), run(fn, *args)):
        assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    x, weight = torch.randn(3, 8), torch.randn(8)
    wrong = [
        ((x.int(), weight), "x is torch.int32"),
        ((x[0, 0], weight), "x must be"),
        ((torch.randn(1, 16_385), torch.randn(16_385)), "D ≤ 16384"),
        ((x, weight[:4]), r"weight must be torch.float32 \[8\]"),
        ((x, weight.half()), "weight must be torch.float32"),
        ((x.t(), torch.randn(3)), "x has stride 8"),
        ((x, weight, x[:2]), "residual must be"),
        ((x, weight, x.double()), "residual must be"),
        ((x, weight, torch.randn(8, 3).t()), "residual has stride 3"),
        ((x, weight.to("meta")), "weight is on meta"),
    ]
    for (x_, weight_, *residual), words in wrong:
        with pytest.raises(ValueError, match=words):
            rmsnorm.rms_norm(x_, weight_, EPS, *residual)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, residual, dtype", in_dtypes([
    ((513, 5504), True), ((4096, 4096), False), ((4096, 4096), True), ((8, 512, 16, 128), False), ((64, 16384), False),
]))  # fmt: skip
def test_gpu(shape, residual, dtype):
    torch.manual_seed(0)
    args = arguments(shape, residual, dtype, "cuda")
    expected = run(rmsnorm.reference, *args)

    def poisoned():
        for y in expected:
            torch.full_like(y, float("nan"))  # NaN memory, freed at once: our outputs are allocated from it
        return run(rmsnorm.rms_norm, *args)

    ours = poisoned()
    assert_as_good_as_torch(ours, args, 1.05)
    assert all(torch.equal(a, b) for a, b in zip(ours, poisoned()))
