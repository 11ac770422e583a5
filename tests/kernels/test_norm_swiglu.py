"""RMSNorm, two products and SwiGLU in one launch, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.norm_swiglu import norm_swiglu, reference
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def case(rows, hidden, width, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=g) * torch.logspace(-1, 1, rows)[:, None]
    norm = 1 + 0.3 * torch.randn(hidden, generator=g)
    gate, up = ((torch.randn(2, width, hidden, generator=g) * 2 / hidden**0.5).to(device, dtype)[1] for _ in range(2))
    return x.to(device, dtype), norm.to(device, dtype), EPS, gate, up


def exact(x, norm, eps, gate, up):
    normed = F.rms_norm(x.double(), x.shape[-1:], norm.double(), eps)
    return F.silu(normed @ gate.double().t()) * (normed @ up.double().t())


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


SHAPES = [(1, 96, 40), (1, 1100, 3), (3, 300, 21), (20, 64, 33), (34, 96, 30), (66, 72, 20)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes):
    """1e-6: float32 sums."""
    arguments = case(*sizes)
    with backend.interpreted():
        out = norm_swiglu(*arguments)
    assert distance(out, exact(*arguments)) < 1e-6


@pytest.mark.parametrize("sizes", SHAPES)
def test_without_a_norm_interpreted(sizes):
    x, _, eps, gate, up = case(*sizes)
    expected = F.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    with backend.interpreted():
        out = norm_swiglu(x, None, eps, gate, up)
    assert distance(out, expected) < 1e-6
    assert distance(norm_swiglu(x, None, eps, gate, up), expected) < 1e-6  # the formula


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_float16_interpreted(sizes):
    """Closer to float64 than norm, products and SwiGLU computed apart, which round more often."""
    arguments = case(*sizes, dtype=torch.float16)
    with backend.interpreted():
        out = norm_swiglu(*arguments)
    assert distance(out, exact(*arguments)) < distance(reference(*arguments), exact(*arguments))


def test_formula():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        arguments = case(3, 40, 9, dtype)
        assert distance(norm_swiglu(*arguments), exact(*arguments)) < tolerance


def test_opcheck_and_compile():
    arguments = case(2, 32, 8)
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.norm_swiglu, arguments, test_utils=("test_schema", "test_faketensor")
            )
    compiled = torch.compile(lambda *a: norm_swiglu(*a) + 1, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), norm_swiglu(*arguments) + 1, rtol=0, atol=0)
    with backend.interpreted():
        assert norm_swiglu(arguments[0][:0], *arguments[1:]).shape == (0, 8)


def test_wrong_arguments_are_named():
    x, norm, eps, gate, up = case(2, 32, 8)
    wrong = [
        ((x[0], norm, eps, gate, up), "x must be"),
        ((x, norm.half(), eps, gate, up), "norm must be"),
        ((x, norm, eps, gate.t(), up), "gate must be"),
        ((x, norm, eps, gate, up[:3]), "up must be"),
        ((x, norm, eps, gate, up.to("meta")), "up is on meta"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            norm_swiglu(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64, 256])
@pytest.mark.parametrize("hidden, width, dtype", in_dtypes([(1000, 3000), (4096, 12288)]))
def test_on_a_gpu(rows, hidden, width, dtype):
    """Closer to float64 than norm, products and SwiGLU computed apart (2e-6 in float32). The same bits twice."""
    arguments = case(rows, hidden, width, dtype, "cuda")
    truth = exact(*arguments)
    out = norm_swiglu(*arguments)
    ours, theirs = distance(out, truth), distance(reference(*arguments), truth)
    print(f"\n{rows} rows {dtype}: ours {ours:.2e}, apart {theirs:.2e}")
    assert torch.equal(out, norm_swiglu(*arguments))
    assert ours < 2e-6 if dtype == torch.float32 else ours < theirs
