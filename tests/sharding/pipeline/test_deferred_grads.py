"""Weight gradients of linear layers that are computed later equal those of torch's autograd, in float64 to 1e-12."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sharding.pipeline.deferred_grads import Deferred


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 4), "one": (5, 4), "bias": (5,), "two": (4, 5), "norm": (4,)}
    return {
        name: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for name, s in shapes.items()
    }


def layers(x, one, bias, two, norm):
    return F.linear(F.linear(x * norm, one, bias).tanh(), two)


def recomputed(*args):
    return checkpoint(layers, *args, use_reentrant=False)


def gathered(x, one, bias, two, norm):
    """Use weights that are computed from other tensors, as FSDP's are: joined in one tensor and split again."""
    flat = torch.cat([one.flatten(), norm.flatten(), two.flatten()])
    parts = flat.split([one.numel(), norm.numel(), two.numel()])
    return layers(x, parts[0].view_as(one), bias, parts[2].view_as(two), parts[1])


@pytest.mark.parametrize("fn", [layers, recomputed, gathered])
def test_gradients_come_later_and_are_right(fn):
    expected, got = inputs(), inputs()
    fn(*expected.values()).square().sum().backward()
    deferred = Deferred()
    inner = deferred.within(layers)
    if fn is recomputed:
        out = checkpoint(inner, *got.values(), use_reentrant=False)
    else:
        out = deferred.within(fn)(*got.values())
    torch.testing.assert_close(out, fn(*expected.values()), rtol=0, atol=0)
    out.square().sum().backward()
    early = {"x", "bias", "norm"}
    for name in early:
        torch.testing.assert_close(got[name].grad, expected[name].grad, rtol=0, atol=1e-12)
    for name in got.keys() - early:
        assert got[name].grad is None or not got[name].grad.any()
    late = deferred.take()
    assert not deferred.waiting
    late()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].grad, value.grad, rtol=0, atol=1e-12)


def test_two_backward_passes_put_off_one_after_the_other():
    """As a pipeline schedule does: take the deferred work after each backward pass, and run it later in any order."""
    expected, got, deferred, late = inputs(), inputs(), Deferred(), []
    for factor in (1.0, 3.0):
        (factor * layers(*expected.values())).sum().backward()
        (factor * deferred.within(layers)(*got.values())).sum().backward()
        late.append(deferred.take())
    for run in reversed(late):
        run()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].grad, value.grad, rtol=0, atol=1e-12)


def test_a_half_precision_leaf_adds_to_a_float32_sum():
    """float32 holds what bfloat16 would lose: 256 + 1."""
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    total = torch.full((1, 1), 256.0)
    weight.grad_dtype, weight.grad = torch.float32, total
    deferred = Deferred()
    deferred.within(F.linear)(x, weight).sum().backward()
    deferred.take()()
    assert total.item() == 257.0


def test_what_needs_no_gradient_is_left_alone():
    deferred, values = Deferred(), inputs()
    with torch.no_grad():
        deferred.within(layers)(*values.values())
    frozen = values["one"].detach()
    deferred.within(F.linear)(values["x"], frozen).sum().backward()
    assert not deferred.waiting
    torch.testing.assert_close(values["x"].grad, frozen.sum(0).expand(2, 3, 4), rtol=0, atol=1e-12)
