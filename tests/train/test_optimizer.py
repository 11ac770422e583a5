"""AdamW and clipping against torch.optim."""

import pytest
import torch

from qwen3f.errors import UserError
from qwen3f.train import optimizer
from qwen3f.train.hyper import AdamW
from tests.train.runs import run_updates

DECAY = {"w": True, "b": False}


def run_torch(hyper, start, grads, lrs):
    w, b = (torch.nn.Parameter(start[k].clone()) for k in ("w", "b"))
    groups = [{"params": [w], "weight_decay": hyper.weight_decay}, {"params": [b], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, betas=(hyper.b1, hyper.b2), eps=hyper.eps)
    for g, lr in zip(grads, lrs):
        w.grad, b.grad = g["w"].clone(), g["b"].clone()
        torch.nn.utils.clip_grad_norm_([w, b], hyper.clip_norm)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    return {"w": w.detach(), "b": b.detach()}, opt


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adamw_equals_torch(dtype, tolerance):
    torch.manual_seed(0)
    start = {"w": torch.randn(7, 5, dtype=dtype), "b": torch.randn(5, dtype=dtype)}
    grads = [{k: torch.randn_like(v) * 10 ** (i % 3 - 1) for k, v in start.items()} for i in range(12)]
    lrs = [1e-2 * (i + 1) / 12 for i in range(12)]
    hyper = AdamW()
    ours, state = run_updates(hyper, DECAY, start, grads, lrs)
    theirs, opt = run_torch(hyper, start, grads, lrs)
    moments = list(opt.state.values())
    for i, k in enumerate(("w", "b")):
        for a, b in (
            (ours[k], theirs[k]),
            (state.m[k], moments[i]["exp_avg"]),
            (state.v[k], moments[i]["exp_avg_sq"]),
        ):
            assert (a - b).norm() <= tolerance * b.norm()


def test_withheld_update_changes_nothing():
    start = {"w": torch.randn(3, 3), "b": torch.randn(3)}
    g = {k: torch.full_like(v, float("nan")) for k, v in start.items()}
    hyper, decay = AdamW(), {"w": True, "b": False}
    p, state = optimizer.update(
        hyper, optimizer.leaf_rules(hyper, decay), start, g, optimizer.init(hyper, decay, start),
        optimizer.Scalars(torch.tensor(0), torch.tensor(0.1), torch.tensor(float("nan")), torch.tensor(False)),
    )  # fmt: skip
    for k in start:
        assert torch.equal(p[k], start[k])
        assert (state.m[k] == 0).all()
        assert (state.v[k] == 0).all()


def test_clip_factor():
    assert optimizer.clip_factor(torch.tensor(0.5), 1.0) == 1.0
    assert optimizer.clip_factor(torch.tensor(4.0), 1.0) == pytest.approx(0.25, rel=1e-6)
    assert optimizer.clip_factor(torch.tensor(4.0), 0.0) == 1.0


def test_wrong_hyperparameters_are_named():
    with pytest.raises(UserError, match="b2"):
        AdamW(b2=1.0)
    with pytest.raises(UserError, match="clip_norm"):
        AdamW(clip_norm=-1.0)
