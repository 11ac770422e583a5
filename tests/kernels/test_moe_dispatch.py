"""Order of rows by expert, rows taken and summed back, capacity: against sorting and loops in plain Python."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, moe_dispatch
from tests.kernels.guards import guarded

DEVICES = pytest.mark.parametrize("interpret", [False, True])


def run(interpret, fn):
    if not interpret:
        return fn()
    with backend.interpreted(), guarded():  # nothing is written outside of the outputs
        return fn()


def choices(n, k, e, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, e, generator=g).argsort(1)[:, :k].to(device)


def assert_planned(where, experts, num_experts):
    flat = experts.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda r: flat[r])
    assert where.order.tolist() == order
    assert [where.order[r] for r in where.place.flatten().tolist()] == list(range(len(flat)))
    assert where.counts.tolist() == [flat.count(e) for e in range(num_experts)]
    assert where.offsets[-1] == len(flat)
    assert where.counts.dtype == torch.int64
    assert where.place.shape == experts.shape


@DEVICES
@pytest.mark.parametrize("n, k, e", [(1, 1, 1), (5, 2, 3), (70, 4, 4), (300, 3, 200), (0, 2, 4)])
def test_plan(n, k, e, interpret):
    """The order must be stable, as Python's sort is. With 200 experts the last of several blocks is partial."""
    experts = choices(n, k, e)
    assert_planned(run(interpret, lambda: moe_dispatch.plan(experts, e)), experts, e)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_plan_of_any_choices(values):
    experts = torch.tensor(values)[:, None]
    for interpret in (False, True):
        assert_planned(run(interpret, lambda: moe_dispatch.plan(experts, 6)), experts, 6)


@DEVICES
def test_values_out_of_range_touch_nothing_else(interpret):
    """The order is undefined then, but rows and places stay inside."""
    experts = torch.tensor([[-3, 1], [7, 2], [2**33, 0]])
    where = run(interpret, lambda: moe_dispatch.plan(experts, 3))
    for rows in (where.order, where.place):
        assert sorted(rows.flatten().tolist()) == list(range(6))


@DEVICES
def test_count(interpret):
    experts, marks = choices(70, 3, 9), torch.rand(70) < 0.6
    got = run(interpret, lambda: moe_dispatch.count(experts, marks, 9))
    assert torch.equal(got, torch.bincount(experts[marks].flatten(), minlength=9))


@DEVICES
@pytest.mark.parametrize("n, k, d", [(7, 2, 5), (3, 1, 1), (2, 3, 2050), (0, 2, 4)])
def test_take_and_combine(n, k, d, interpret):
    """float32 within 3e-7 of float64: a few roundings."""
    g = torch.Generator().manual_seed(1)
    x, weights = torch.randn(n, d, generator=g).requires_grad_(), torch.rand(n, k, generator=g).requires_grad_()
    grad = torch.randn(n, d, generator=g)
    experts = choices(n, k, 4)

    def mix(x, weights):
        where = moe_dispatch.plan(experts, 4)
        rows = moe_dispatch.take(x, where)
        return moe_dispatch.combine(rows.sin() * torch.arange(1, n * k + 1)[:, None].to(x.dtype), weights, where)

    def exact(x, weights):
        flat = experts.flatten().tolist()
        row = {choice: r + 1 for r, choice in enumerate(sorted(range(len(flat)), key=lambda c: flat[c]))}
        scale = torch.tensor([[row[i * k + j] for j in range(k)] for i in range(n)], dtype=x.dtype).view(n, k)
        return x.sin() * (weights * scale).sum(1, keepdim=True)

    got = run(interpret, lambda: (y := mix(x, weights), *torch.autograd.grad(y, (x, weights), grad)))
    wide = [t.detach().double().requires_grad_() for t in (x, weights)]
    y = exact(*wide)
    for ours, true in zip(got, (y, *torch.autograd.grad(y, wide, grad.double()))):
        assert (ours - true).norm() <= 3e-7 * true.norm()


def test_gradients_of_any_order():
    experts = choices(4, 2, 3)
    where = moe_dispatch.plan(experts, 3)
    x, weights = torch.randn(4, 3).double().requires_grad_(), torch.rand(4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: moe_dispatch.combine(moe_dispatch.take(x, where), w, where), (x, weights)
    )
    assert torch.autograd.gradgradcheck(lambda x: moe_dispatch.take(x, where), x)
    y = torch.randn(8, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: moe_dispatch.reference(y, weights.detach(), where.place), y)


@DEVICES
@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
def test_capacity(capacity, interpret):
    """Against a loop: the heaviest first, then the earlier token; padding last of all."""
    g = torch.Generator().manual_seed(2)
    experts, weights = choices(12, 2, 4), torch.randint(1, 4, (12, 2), generator=g) / 8
    real = torch.arange(12) % 5 != 1
    kept = run(interpret, lambda: moe_dispatch.within_capacity(weights, experts, real, 4, capacity))
    expected = torch.zeros(12, 2, dtype=torch.bool)
    for e in range(4):
        mine = [(n, k) for n in range(12) for k in range(2) if experts[n, k] == e]
        mine.sort(key=lambda at: -weights[at].item() if real[at[0]] else 1.0)
        for at in mine[:capacity]:
            expected[at] = True
    assert torch.equal(kept, expected)


@DEVICES
def test_opcheck(interpret):
    experts, ops = choices(6, 2, 4), torch.ops.qwen3f
    x, weights = torch.randn(6, 5).requires_grad_(), torch.rand(6, 2).requires_grad_()
    y = torch.randn(12, 5).requires_grad_()

    with backend.interpreted() if interpret else contextlib.nullcontext():
        order, place, _ = moe_dispatch.plan(experts, 4)
        torch.library.opcheck(ops.moe_plan, (experts, 4))
        torch.library.opcheck(ops.moe_count, (experts, torch.ones(6, dtype=torch.bool), 4))
        torch.library.opcheck(ops.moe_take, (x, order, place))
        torch.library.opcheck(ops.moe_combine, (y, weights, order, place))
        torch.library.opcheck(ops.moe_combine, (y, None, order, place))
        plain = x.detach(), y.detach(), weights.detach()
        torch.library.opcheck(ops.moe_combine_backward, (*plain, order, place))
        torch.library.opcheck(ops.moe_combine_backward, (*(t.t().contiguous().t() for t in plain), order, place))


def test_wrong_arguments_are_named():
    where = moe_dispatch.plan(choices(3, 2, 4), 4)
    x, weights = torch.randn(3, 5), torch.rand(3, 2)
    wrong = [
        (lambda: moe_dispatch.plan(choices(3, 2, 4).int(), 4), r"experts must be int64 \[N, K\]"),
        (lambda: moe_dispatch.plan(choices(3, 2, 4), 0), "num_experts must be at least 1"),
        (lambda: moe_dispatch.count(choices(3, 2, 4), torch.ones(3), 4), r"marks must be bool \[3\]"),
        (lambda: moe_dispatch.take(x[:2], where), r"x must be floating \[3, D\]"),
        (lambda: moe_dispatch.combine(x, weights, where), r"y must be floating \[6, D\]"),
        (lambda: moe_dispatch.combine(x.repeat(2, 1), weights.half(), where), "weights must be torch.float32"),
        (lambda: moe_dispatch.take(x.to("meta"), where), "plan is on cpu, x on meta"),
    ]
    for fn, words in wrong:
        with pytest.raises(ValueError, match=words):
            fn()


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, e", [(32768, 8, 128), (1001, 3, 5), (1, 1, 1)])
def test_gpu(n, k, e):
    """Plans equal those of a CPU. bf16 sums are as good as torch's; two runs give the same bits; all is written."""
    experts = choices(n, k, e)
    where = moe_dispatch.plan(experts.cuda(), e)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(where, moe_dispatch.plan(experts, e)))
    marks = torch.rand(n) < 0.5
    counts = moe_dispatch.count(experts.cuda(), marks.cuda(), e)
    assert torch.equal(counts.cpu(), torch.bincount(experts[marks].flatten(), minlength=e))
    y, weights = (torch.randn(*s, device="cuda").bfloat16().requires_grad_() for s in ((n * k, 520), (n, k)))
    grad = torch.randn(n, 520, device="cuda").bfloat16()

    def gradients(fn, y, weights):
        out = fn(y, weights)
        return out, *torch.autograd.grad(out, (y, weights), grad.to(out.dtype))

    def ours():
        torch.full((2 * n * k, 520), float("nan"), device="cuda")  # freed at once: outputs get this memory
        return gradients(lambda y, w: moe_dispatch.combine(y, w, where), y, weights)

    def plain(y, w):
        return moe_dispatch.reference(y, w, where.place)

    truth = gradients(plain, y.detach().double().requires_grad_(), weights.detach().double().requires_grad_())
    got = ours()
    for mine, its, true in zip(got, gradients(plain, y, weights), truth):
        error, allowed = ((t.double() - true).norm() for t in (mine, its))
        assert error <= 1.05 * allowed
    assert all(torch.equal(a, b) for a, b in zip(got, ours()))
