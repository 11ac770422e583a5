"""Chunked cross-entropy against torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy


def case(n=37, d=8, v=53, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::5] = -100
    return (
        torch.randn(n, d, generator=g, dtype=dtype).requires_grad_(),
        torch.randn(v, d, generator=g, dtype=dtype).requires_grad_(),
        targets,
        torch.rand(n, generator=g),
    )


def by_torch(h, w, t, weights):
    return (F.cross_entropy(h @ w.t(), t, reduction="none", ignore_index=-100) * weights).sum()


@pytest.mark.parametrize("chunk_logits", [1 << 29, 53 * 16], ids=["one chunk", "ragged chunks"])
@pytest.mark.parametrize("fn", [cross_entropy.linear_cross_entropy, cross_entropy.reference])
def test_value_and_gradients(monkeypatch, fn, chunk_logits):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS_CPU", chunk_logits)
    monkeypatch.setattr(cross_entropy, "_MIN_CHUNK", 16)
    h, w, t, weights = case()
    expected = by_torch(h, w, t, weights)
    got = fn(h, w, t, weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * got, (h, w)), torch.autograd.grad(3 * expected, (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(fn(h, w, t, weights), expected, rtol=1e-12, atol=0)


def test_huge_logits_and_nothing_predicted():
    h, w, t, weights = case(dtype=torch.float32)
    loss = cross_entropy.linear_cross_entropy(h * 1e4, w * 1e2, t, weights)
    assert torch.isfinite(loss)
    loss = cross_entropy.linear_cross_entropy(h, w, torch.full_like(t, -100), weights)
    grads = torch.autograd.grad(loss, (h, w))
    assert loss == 0
    assert all((g == 0).all() for g in grads)


def test_wrong_arguments_are_named():
    h, w, t, weights = case()
    with pytest.raises(ValueError, match="weight"):
        cross_entropy.linear_cross_entropy(h, w[:, :3], t, weights)
    with pytest.raises(ValueError, match="targets must be"):
        cross_entropy.linear_cross_entropy(h, w, t[:3], weights)
    with pytest.raises(ValueError, match="int64"):
        cross_entropy.linear_cross_entropy(h, w, t.int(), weights)
    with pytest.raises(ValueError, match="float32"):
        cross_entropy.linear_cross_entropy(h.float(), w, t, weights)
