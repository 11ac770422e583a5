"""AdamW and clipping against torch.optim."""

import pytest
import torch

from qwen3f.errors import UserError
from qwen3f.train import optimizer
from qwen3f.train.hyper import LEAST_EPS, AdamW, Muon
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
    with pytest.raises(UserError, match="weight_decay must be at least 0"):
        AdamW(weight_decay=float("nan"))
    with pytest.raises(UserError, match="update_rms"):
        Muon(update_rms=float("nan"))


@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize("eps", [0.0, -1e-8, 1e-46, float("nan"), float("inf")])
def test_an_eps_that_divides_by_zero_is_refused(kind, eps):
    """For embedding rows that no batch has used, gradient and moments are 0; with eps 0 the update would be 0/0."""
    with pytest.raises(UserError, match=r"optimizer\.eps must be .*--config\.optimizer\.eps=1e-8"):
        kind(eps=eps)


def test_the_smallest_eps_leaves_what_had_no_gradient():
    start = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    grads = [{"w": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "b": torch.zeros(2)}]
    params, _ = run_updates(AdamW(eps=LEAST_EPS), DECAY, start, grads, [1e-2])
    assert all(torch.isfinite(x).all() for x in params.values())
    assert params["w"][0, 0] == params["b"][0] == 0.0
