"""RMSNorm and products in one launch, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.norm_linear import norm_linear, reference
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def case(rows, hidden, sizes, bias=False, dtype=torch.float32, device="cpu"):
    """Rows have magnitudes from 0.1 to 10; each weight is one layer of a stack."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=g) * torch.logspace(-1, 1, rows)[:, None]
    norm = 1 + 0.3 * torch.randn(hidden, generator=g)
    stacks = [torch.randn(3, n, hidden, generator=g).to(device, dtype) / hidden**0.5 for n in sizes]
    biases = tuple(torch.randn(n, generator=g).to(device, dtype) for n in sizes) if bias else None
    return x.to(device, dtype), norm.to(device, dtype), EPS, tuple(s[1] for s in stacks), biases


def exact(x, norm, eps, weights, biases):
    normed = F.rms_norm(x.double(), x.shape[-1:], norm.double(), eps)
    return torch.cat([normed @ w.double().t() for w in weights], -1) + (torch.cat(biases).double() if biases else 0.0)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# One row; tiles of 16, 32 and 64 rows; a second tile of rows; sizes that no tile divides.
SHAPES = [
    (1, 96, (40, 8, 8)),
    (1, 1100, (10,)),
    (3, 300, (40, 24)),
    (20, 64, (33,)),
    (34, 96, (30, 7, 7)),
    (66, 72, (40,)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes, bias):
    """1e-6: float32 sums."""
    arguments = case(*sizes, bias)
    with backend.interpreted():
        out = norm_linear(*arguments)
    assert distance(out, exact(*arguments)) < 1e-6


@pytest.mark.parametrize("sizes", SHAPES)
def test_without_a_norm_interpreted(sizes):
    x, _, eps, weights, biases = case(*sizes, True)
    expected = torch.cat([x.double() @ w.double().t() for w in weights], -1) + torch.cat(biases).double()
    with backend.interpreted():
        out = norm_linear(x, None, eps, weights, biases)
    assert distance(out, expected) < 1e-6
    assert distance(norm_linear(x, None, eps, weights, biases), expected) < 1e-6  # the formula


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_float16_does_not_overflow_before_it_is_normed_interpreted(rows):
    x, norm, eps, weights, _ = case(rows, 64, (8,), dtype=torch.float16)
    x, norm = (3e4 * (x.float() / x.abs().amax())).half(), 4 * norm
    with backend.interpreted():
        out = norm_linear(x, norm, eps, weights)
    assert distance(out, exact(x, norm, eps, weights, None)) < 2e-3


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_float16_interpreted(sizes):
    """At most 1.1 times the error of norm and product computed apart, which round more often."""
    arguments = case(*sizes, dtype=torch.float16)
    with backend.interpreted():
        out = norm_linear(*arguments)
    assert distance(out, exact(*arguments)) < 1.1 * distance(reference(*arguments), exact(*arguments))


@pytest.mark.parametrize("bias", [False, True])
def test_formula(bias):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        arguments = case(3, 40, (8, 5), bias, dtype)
        assert distance(norm_linear(*arguments), exact(*arguments)) < tolerance


def test_rows_of_zeros_and_no_rows():
    x, norm, *rest = case(5, 32, (8,))
    x[2] = 0
    with backend.interpreted():
        out = norm_linear(x, norm, *rest)
        assert norm_linear(x[:0], norm, *rest).shape == (0, 8)
    assert out[2].eq(0).all()
    assert distance(out, exact(x, norm, *rest)) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_and_compile(bias):
    arguments = case(2, 32, (8, 4), bias)
    x, norm, eps, weights, biases = arguments
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.norm_linear, (x, norm, eps, list(weights), list(biases or ())),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip
    compiled = torch.compile(lambda *a: norm_linear(*a) + 1, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), norm_linear(*arguments) + 1, rtol=0, atol=0)


def test_wrong_arguments_are_named():
    x, norm, eps, weights, biases = case(2, 32, (8, 4), True)
    wrong = [
        ((x[0], norm, eps, weights), "x must be"),
        ((x.t(), norm, eps, weights), "x must be"),
        ((x, norm[:5], eps, weights), "norm must be"),
        ((x, norm, eps, (weights[0], weights[1].half())), r"weights\[1\] must be"),
        ((x, norm, eps, (weights[0][:, :8],)), r"weights\[0\] must be"),
        ((x, norm, eps, ()), "one to three"),
        ((x, norm, eps, weights, biases[:1]), "one for each"),
        ((x, norm, eps, weights, biases[::-1]), r"biases\[0\] must be"),
        ((x, norm, eps, (weights[0].to("meta"),)), "is on meta"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            norm_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64, 256])
@pytest.mark.parametrize("hidden, sizes, dtype", in_dtypes([(1000, (2048, 1000, 24)), (4096, (4096, 1024, 1024))]))
def test_on_a_gpu(rows, hidden, sizes, dtype):
    """At most 1.1 times as far from float64 as norm and products apart (2e-6 in float32). The same bits twice."""
    arguments = case(rows, hidden, sizes, True, dtype, "cuda")
    truth = exact(*arguments)
    out = norm_linear(*arguments)
    ours, theirs = distance(out, truth), distance(reference(*arguments), truth)
    print(f"\n{rows} rows {dtype}: ours {ours:.2e}, apart {theirs:.2e}")
    assert torch.equal(out, norm_linear(*arguments))
    assert ours < 2e-6 if dtype == torch.float32 else ours < 1.1 * theirs
