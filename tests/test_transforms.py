"""grad_and_value against torch.func's, and jit with donation."""

import pytest
import torch

from qwen3f import model, params, presets
from qwen3f.train import losses
from qwen3f.transforms import grad_and_value, jit
from tests.batches import random_batch


def tiny(dtype=torch.float64, **changes):
    cfg = presets.get("nano").replace(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=61, **changes
    )
    return cfg, params.init_params(cfg, 0, dtype=dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_torch_func(dtype, tolerance):
    cfg, p = tiny(dtype)
    batch = random_batch(3, 20, cfg.vocab_size)
    loss = losses.make_loss(cfg, model.REFERENCE)

    def fn(p, batch):
        value = loss(p, batch, 5.0)
        return value, {"twice": 2 * value}

    ours, (value, aux) = grad_and_value(fn, has_aux=True)(p, batch)
    theirs, (value_2, aux_2) = torch.func.grad_and_value(fn, has_aux=True)(p, batch)
    assert ours.keys() == theirs.keys() == p.keys()
    for path in p:
        assert ours[path].shape == p[path].shape
        assert (ours[path] - theirs[path]).norm() <= tolerance * theirs[path].norm(), path
    torch.testing.assert_close(value, value_2, rtol=tolerance, atol=0)
    assert not aux["twice"].requires_grad
    torch.testing.assert_close(aux["twice"], aux_2["twice"], rtol=tolerance, atol=0)


def test_argnums_unused_and_structure():
    def fn(a, b, c):
        return (a["x"][0] * b).sum() + 0 * c.sum()

    args = ({"x": (torch.randn(3), torch.randn(2))}, torch.randn(3), torch.randn(1))
    ours = grad_and_value(fn, argnums=(0, 1))(*args)
    theirs = torch.func.grad_and_value(fn, argnums=(0, 1))(*args)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[0][0]["x"][1], torch.zeros(2))
    torch.testing.assert_close(grad_and_value(fn, argnums=1)(*args), torch.func.grad_and_value(fn, argnums=1)(*args))


def test_wrong_use_is_refused():
    with pytest.raises(TypeError, match="0-d floating"):
        grad_and_value(lambda x: x)(torch.ones(3))
    with pytest.raises(TypeError, match="floating tensors only"):
        grad_and_value(lambda x: x["a"].sum())({"a": torch.ones(3, dtype=torch.int64)})


def test_donation_reuses_storage_and_equals_the_pure_function():
    def fn(state, x):
        return {"a": state["a"] + x, "b": state["b"]}, state["a"].sum()

    for compiled in (False, True):
        state = {"a": torch.arange(4.0), "b": torch.ones(2)}
        pure, total = jit(fn, compile=compiled)(state, torch.ones(4))
        assert torch.equal(state["a"], torch.arange(4.0))
        places = {k: v.data_ptr() for k, v in state.items()}
        donated, total_2 = jit(fn, compile=compiled, donate=True)(state, torch.ones(4))
        assert {k: v.data_ptr() for k, v in donated.items()} == places
        assert total_2 == total == 6.0
        for k in pure:
            assert torch.equal(pure[k], donated[k])
    with pytest.raises(TypeError, match="went in as"):
        jit(lambda s: ((s,), 0), compile=False, donate=True)({"a": torch.ones(1)})


def test_per_example_gradients_by_vmap_equal_a_loop():
    cfg, p = tiny()
    batch = random_batch(4, 12, cfg.vocab_size)
    loss = losses.make_loss(cfg, model.REFERENCE)

    def one(p, row):
        return loss(p, {k: v[None] for k, v in row.items()}, 3.0)

    together = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(p, batch)
    for i in range(4):
        alone = torch.func.grad(one)(p, {k: v[i] for k, v in batch.items()})
        for path in p:
            torch.testing.assert_close(together[path][i], alone[path], rtol=1e-12, atol=1e-15)
