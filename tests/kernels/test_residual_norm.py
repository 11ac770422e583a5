"""A product added to the residual stream and the norm of the sum, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels import backend, residual_norm
from kernels.residual_norm import reference
from tests.kernels.gpu_cases import in_dtypes
from tests.kernels.test_linear_residual import case as product_case
from tests.kernels.test_linear_residual import distance
from tests.kernels.test_linear_residual import exact as exact_sum

EPS = 1e-6


def case(rows, inner, hidden, dtype=torch.float32, device="cpu"):
    norm = 1 + 0.3 * torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    return *product_case(rows, inner, hidden, dtype, device), norm.to(device, dtype), EPS


def exact(h, weight, x, norm, eps):
    out = exact_sum(h, weight, x)
    return out, F.rms_norm(out, out.shape[-1:], norm.double(), eps)


# One part and several; a last part that is shorter; two tiles of rows, of outputs; sizes that no tile divides
SHAPES = [(3, 96, 40), (34, 300, 21), (34, 600, 70), (66, 130, 20), (130, 40, 33)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes):
    """1e-6: float32 sums."""
    arguments = case(*sizes)
    with backend.interpreted():
        got = residual_norm.residual_norm(*arguments)
    for ours, truth in zip(got, exact(*arguments)):
        assert distance(ours, truth) < 1e-6


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[2]])
def test_float16_interpreted(sizes):
    """The sum is rounded once, not twice, so it is closer to float64 than the formula's; so is its norm."""
    arguments = case(*sizes, dtype=torch.float16)
    with backend.interpreted():
        got = residual_norm.residual_norm(*arguments)
    for ours, apart, truth in zip(got, reference(*arguments), exact(*arguments)):
        assert distance(ours, truth) < distance(apart, truth)


def test_formula():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        arguments = case(3, 40, 9, dtype)
        for ours, truth in zip(residual_norm.residual_norm(*arguments), exact(*arguments)):
            assert distance(ours, truth) < tolerance


@given(
    B=st.integers(1, 2000), D=st.integers(1, 20_000), N=st.integers(1, 60_000), rows=st.sampled_from([16, 32, 64, 128])
)
def test_parts_cover_a_sum_and_none_is_small(B, D, N, rows):
    part, parts = residual_norm.parts_of(B, D, N, rows)
    assert (parts - 1) * part < N <= parts * part
    assert part % residual_norm.LEAST == 0
    tiles = -(-B // rows) * -(-D // residual_norm.OUTPUTS)
    assert parts == 1 or parts * tiles <= residual_norm.PROGRAMS


def test_opcheck_and_compile():
    h, weight, x, norm, eps = arguments = case(2, 32, 8)
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.residual_norm, arguments, test_utils=("test_schema", "test_faketensor")
            )
    run = residual_norm.residual_norm
    compiled = torch.compile(lambda *a: sum(run(*a)), fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), sum(run(*arguments)), rtol=0, atol=0)
    with backend.interpreted():
        assert [y.shape for y in run(h[:0], weight, x[:0], norm, eps)] == [(0, 8), (0, 8)]


def test_wrong_arguments_are_named():
    h, weight, x, norm, eps = case(2, 32, 8)
    wrong = [
        ((h[0], weight, x, norm), "h must be"),
        ((h, weight.t(), x, norm), "weight must be"),
        ((h, weight, x[:1], norm), "residual x must be"),
        ((h, weight, x, norm[:5]), "norm must be"),
        ((h, weight, x, norm.half()), "norm must be"),
        ((h, weight, x, norm.to("meta")), "norm is on meta"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            residual_norm.residual_norm(*arguments, eps)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 20, 64, 256])
@pytest.mark.parametrize("inner, hidden, dtype", in_dtypes([(1000, 1000), (3072, 1024), (12288, 4096)]))
def test_on_a_gpu(rows, inner, hidden, dtype):
    """At most 1.1 times as far from float64 as computed apart (2e-6 in float32). Two runs give the same bits."""
    arguments = case(rows, inner, hidden, dtype, "cuda")
    got, again = residual_norm.residual_norm(*arguments), residual_norm.residual_norm(*arguments)
    for ours, same, apart, truth in zip(got, again, reference(*arguments), exact(*arguments)):
        assert torch.equal(ours, same)
        off, theirs = distance(ours, truth), distance(apart, truth)
        print(f"\n{rows} rows {dtype}: ours {off:.2e}, apart {theirs:.2e}")
        assert off < 2e-6 if dtype == torch.float32 else off < 1.1 * theirs
