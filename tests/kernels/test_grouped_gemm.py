"""Grouped linear layers against a loop over rows, values and gradients; counts with empty and crowded experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, grouped_gemm
from kernels.grouped_gemm import Tile
from tests.kernels.gpu_cases import in_dtypes
from tests.kernels.guards import guarded


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


SMALL = {"linear": Tile(16, 32, 16, 4, 2, per_sm=1, flat=True), "outer": Tile(16, 32, 16, 4, 2)}


@pytest.mark.parametrize("tiles", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-7), (torch.float16, 1e-3)])
@pytest.mark.parametrize("counts, d, f", [([9, 0, 40, 3], 24, 40), ([0, 0, 20], 17, 9), ([150], 8, 8), ([1], 1, 1)])
def test_interpreted(counts, d, f, dtype, limit, tiles, monkeypatch):
    """Empty and crowded experts, groups larger than a tile, sizes that no tile divides; also with transposed weights.

    A few roundings of the dtype: 5e-7 in float32, 1e-3 in float16. (The interpreter multiplies bfloat16 as integers.)
    Nothing is written outside of the outputs.
    """
    if tiles:
        monkeypatch.setattr(grouped_gemm, "tile_of", lambda kind, dtype: tiles[kind])
    x, weight, counts = (t.detach() for t in case(counts, dtype, d, f))
    grad = torch.randn(len(x), f, generator=torch.Generator().manual_seed(1)).to(dtype)
    for transposed in (False, True):
        with backend.interpreted(), guarded() as copied:
            w = copied(weight.mT.contiguous()).mT if transposed else copied(weight)
            leaves = [t.requires_grad_() for t in (copied(x), w.detach())]
            y = grouped_gemm.grouped_linear(*leaves, counts)
            got = y, *torch.autograd.grad(y, leaves, copied(grad))
        wide = [t.detach().double().requires_grad_() for t in leaves]
        y = by_rows(*wide, counts)
        for ours, true in zip(got, (y, *torch.autograd.grad(y, wide, grad.double()))):
            assert (ours - true).norm() <= limit * true.norm()


def test_counts_that_do_not_fit_touch_nothing_else():
    """Counts on a device are not checked, so wrong ones must not lead a kernel outside of its tensors."""
    x, weight, _ = case([5], torch.float32)
    for counts in ([9], [-4], [3]):
        with backend.interpreted(), guarded() as copied:
            y = grouped_gemm.grouped_linear(copied(x.detach()), copied(weight.detach()), torch.tensor(counts))
            rows = min(max(counts[0], 0), 5)
            torch.testing.assert_close(y[:rows], x[:rows] @ weight[0].t())
            assert y[rows:].isnan().all()  # as the guards: not written


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
        ((x.long(), weight.long(), counts), "x must be floating"),
        ((x, weight, counts[:1]), r"int64 \[2\]"),
        ((x, weight, counts.int()), r"int64 \[2\]"),
        ((x, weight, counts + 1), "sum to 5"),
        ((x, weight, torch.tensor([6, -1])), "sum to 5"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            grouped_gemm.grouped_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("counts, d, f, dtype", in_dtypes([([65, 64], 250, 90), ([700, 0, 3, 1345], 512, 384)]))
def test_gpu(counts, d, f, dtype):
    """At most 1.05 times as far from float64 as one cuBLAS product for each expert (float32: 2e-6).

    Two runs give the same bits, and every output is written.
    """
    x, weight, counts = (t.detach().cuda() for t in case(counts, dtype, d, f))
    grad = torch.randn(len(x), f, device="cuda").to(dtype)

    def run(fn, x, weight):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = fn(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def ours():
        torch.full((1 << 26,), float("nan"), device="cuda")  # NaN memory, freed at once: outputs are allocated from it
        return run(lambda x, w: grouped_gemm.grouped_linear(x, w, counts), x, weight)

    def plain(x, w):
        return torch.cat([rows @ w[e].t() for e, rows in enumerate(x.split(counts.tolist()))])

    got, truth = ours(), run(plain, x.double(), weight.double())
    for mine, its, true in zip(got, run(plain, x, weight), truth):
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (mine, its))
        assert error <= (2e-6 if dtype == torch.float32 else 1.05 * allowed)
    assert all(torch.equal(a, b) for a, b in zip(got, ours()))
