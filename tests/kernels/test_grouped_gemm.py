"""Grouped linear layers against a loop over rows, values and gradients; counts with empty and crowded experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_gemm


def case(counts, dtype=torch.float64, d=5, f=7):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(len(counts), f, d, generator=g, dtype=dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


def by_rows(x, weight, counts):
    expert = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    return torch.stack([weight[e] @ row for e, row in zip(expert, x)]) if expert else x.new_zeros(0, weight.shape[1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_values_and_gradients(counts):
    x, weight, counts = case(counts)
    for fn in (grouped_gemm.grouped_linear, grouped_gemm.reference):
        got, expected = fn(x, weight, counts), by_rows(x, weight, counts)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        if len(x):
            ours, theirs = (torch.autograd.grad(y.square().sum(), (x, weight)) for y in (got, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives():
    x, weight, counts = case([2, 0, 3])
    fn = grouped_gemm.grouped_linear
    assert torch.autograd.gradcheck(lambda x, w: fn(x, w, counts), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: fn(x, w, counts), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, weight, counts = case([3, 0, 2], dtype)
    torch.library.opcheck(torch.ops.qwen3f.grouped_linear, (x, weight, counts))
    torch.library.opcheck(torch.ops.qwen3f.grouped_linear, (x, weight.transpose(1, 2).contiguous().mT, counts))
    torch.library.opcheck(torch.ops.qwen3f.grouped_outer, (x, torch.randn(5, 4, dtype=dtype).requires_grad_(), counts))


def test_wrong_arguments_are_named():
    x, weight, counts = case([2, 3])
    wrong = [
        ((x, weight[:, :, :3], counts), r"x must be \[N, D\]"),
        ((x.float(), weight, counts), "x is torch.float32"),
        ((x, weight, counts[:1]), r"int64 \[2\]"),
        ((x, weight, counts.int()), r"int64 \[2\]"),
        ((x, weight, counts + 1), "sum to 5"),
        ((x, weight, torch.tensor([6, -1])), "sum to 5"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            grouped_gemm.grouped_linear(*arguments)
