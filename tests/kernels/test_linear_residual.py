"""A product added to the residual stream, against the formula in float64."""

import pytest
import torch

from kernels import backend
from kernels.linear_residual import linear_residual, reference
from tests.kernels.gpu_cases import in_dtypes


def case(rows, inner, hidden, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    h, x = torch.randn(rows, inner, generator=g), torch.randn(rows, hidden, generator=g)
    weight = torch.randn(2, hidden, inner, generator=g) / inner**0.5
    return h.to(device, dtype), weight.to(device, dtype)[1], x.to(device, dtype)


def exact(h, weight, x):
    return x.double() + h.double() @ weight.double().t()


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


SHAPES = [(1, 96, 40), (1, 2100, 6), (2, 300, 21), (20, 600, 33), (34, 150, 30), (66, 72, 20)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes):
    """1e-6: float32 sums."""
    arguments = case(*sizes)
    with backend.interpreted():
        out = linear_residual(*arguments)
    assert distance(out, exact(*arguments)) < 1e-6


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_float16_interpreted(sizes):
    """Product and sum are rounded once, not twice, so the result is closer to float64 than the formula's."""
    arguments = case(*sizes, dtype=torch.float16)
    with backend.interpreted():
        out = linear_residual(*arguments)
    assert distance(out, exact(*arguments)) < distance(reference(*arguments), exact(*arguments))


def test_formula():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        arguments = case(3, 40, 9, dtype)
        assert distance(linear_residual(*arguments), exact(*arguments)) < tolerance


def test_opcheck_and_compile():
    h, weight, x = arguments = case(2, 32, 8)
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.linear_residual, arguments, test_utils=("test_schema", "test_faketensor")
            )
    compiled = torch.compile(lambda *a: linear_residual(*a) + 1, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), linear_residual(*arguments) + 1, rtol=0, atol=0)
    with backend.interpreted():
        assert linear_residual(h[:0], weight, x[:0]).shape == (0, 8)


def test_wrong_arguments_are_named():
    h, weight, x = case(2, 32, 8)
    wrong = [
        ((h[0], weight, x), "h must be"),
        ((h, weight.t(), x), "weight must be"),
        ((h, weight, x[:1]), "residual x must be"),
        ((h, weight, x.half()), "residual x must be"),
        ((h, weight, x.to("meta")), "x is on meta"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            linear_residual(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64, 256])
@pytest.mark.parametrize("inner, hidden, dtype", in_dtypes([(1000, 1000), (3072, 1024), (12288, 4096)]))
def test_on_a_gpu(rows, inner, hidden, dtype):
    """Closer to float64 than product and sum computed apart (2e-6 in float32). Two runs give the same bits."""
    arguments = case(rows, inner, hidden, dtype, "cuda")
    truth = exact(*arguments)
    out = linear_residual(*arguments)
    ours, theirs = distance(out, truth), distance(reference(*arguments), truth)
    print(f"\n{rows} rows {dtype}: ours {ours:.2e}, apart {theirs:.2e}")
    assert torch.equal(out, linear_residual(*arguments))
    assert ours < 2e-6 if dtype == torch.float32 else ours < theirs
