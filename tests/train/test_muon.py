"""Muon against torch.optim.Muon and against the singular value decomposition."""

import pytest
import torch

from qwen3f.errors import UserError
from qwen3f.train import muon, optimizer
from qwen3f.train.hyper import AdamW, Muon, make_hyper
from tests.train.runs import run_updates

SHAPES = {"square": (2, 6, 6), "tall": (2, 9, 6), "wide": (2, 6, 9), "long": (40, 6), "experts": (2, 3, 5, 8)}
HYPER = Muon(weight_decay=0.3, momentum=0.9, clip_norm=0.5)
DECAY = dict.fromkeys(SHAPES, True) | {"embed": False}
RULES = optimizer.leaf_rules(HYPER, DECAY)


def run_torch(start, grads, lrs):
    """torch's Muon takes single matrices: each of a stack is a parameter of its own."""
    rows = {k: [torch.nn.Parameter(m.clone()) for m in v.reshape(-1, *v.shape[-2:])] for k, v in start.items()}
    embed = rows.pop("embed")
    matrices = [m for leaf in rows.values() for m in leaf]
    opts = [
        torch.optim.Muon(
            matrices, lr=1.0, weight_decay=HYPER.weight_decay, momentum=HYPER.momentum, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(embed, betas=(HYPER.b1, HYPER.b2), eps=HYPER.eps, weight_decay=0.0),
    ]
    for g, lr in zip(grads, lrs):
        for k, leaf in (rows | {"embed": embed}).items():
            for p, x in zip(leaf, g[k].reshape(-1, *g[k].shape[-2:])):
                p.grad = x.clone()
        torch.nn.utils.clip_grad_norm_([*matrices, *embed], HYPER.clip_norm)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
    return {k: torch.stack([p.detach() for p in v]).view(start[k].shape) for k, v in (rows | {"embed": embed}).items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_torch(dtype, tolerance, monkeypatch):
    """torch iterates in bfloat16; here it is made to keep the dtype, so that the algorithm is compared, not rounding.

    The iteration multiplies what is small by 3.4445 each time, five times, so rounding grows by 500 at most: 1e-13 and
    1e-7 of one operation come out below 1e-10 and 1e-5 after six steps.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    torch.manual_seed(0)
    start = {k: torch.randn(shape, dtype=dtype) for k, shape in (SHAPES | {"embed": (7, 4)}).items()}
    grads = [{k: torch.randn_like(v) * 10 ** (i % 3 - 1) for k, v in start.items()} for i in range(6)]
    lrs = [1e-1 * (i + 1) / 6 for i in range(6)]
    ours, state = run_updates(HYPER, DECAY, start, grads, lrs)
    theirs = run_torch(start, grads, lrs)
    for k in start:
        assert (ours[k] - theirs[k]).norm() <= tolerance * theirs[k].norm(), k
    assert set(state.v) == {"embed"}  # matrices have no second moment
    assert list(ours) == list(state.m) == list(start)


@pytest.mark.parametrize("shape", [(16, 16), (16, 20), (16, 300), (300, 16)])
def test_singular_values_are_brought_near_one(shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    y = muon.orthogonalize({"x": x}, 5)["x"]
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    got = u.mT @ y @ v.mT  # the same singular vectors, other values
    large = values > 0.02 * values.norm(dim=-1, keepdim=True)  # the smallest need more iterations
    diagonal = got.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal - 0.95).abs()[large] < 0.3).all()
    assert (got - torch.diag_embed(diagonal)).norm() < 1e-8


def test_long_matrices_take_the_gram_form_to_the_same_result():
    """To 1e-3: in float32 the Gram matrix of a badly conditioned matrix loses its small singular values."""
    x = torch.randn(64, 512, dtype=torch.float64) * torch.logspace(0, -4, 64, dtype=torch.float64)[:, None]
    exact = x / x.norm()
    a, b, c = muon.NEWTON_SCHULZ
    for _ in range(5):
        g = exact @ exact.mT
        exact = a * exact + (b * g + c * g @ g) @ exact
    got = muon.orthogonalize({"x": x.float()}, 5)["x"]
    assert (got - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("iterations", [6, 7, 10, 20])
def test_more_iterations_stay_bounded_for_a_matrix_of_low_rank(iterations):
    """Its Gram matrix has eigenvalues that rounding makes negative, which an iteration would multiply."""
    torch.manual_seed(0)
    x = torch.randn(16, 1) @ torch.randn(1, 32)
    assert torch.linalg.matrix_norm(muon.orthogonalize({"x": x}, iterations)["x"], 2) < 1.3


def test_withheld_update_changes_nothing():
    start = {"square": torch.randn(2, 3, 3)}
    g = {"square": torch.full_like(start["square"], float("nan"))}
    p, state = optimizer.update(
        HYPER, RULES, start, g, optimizer.init(HYPER, DECAY, start),
        optimizer.Scalars(torch.tensor(0), torch.tensor(0.1), torch.tensor(float("nan")), torch.tensor(False)),
    )  # fmt: skip
    assert torch.equal(p["square"], start["square"])
    assert (state.m["square"] == 0).all()


def test_hyperparameters_by_name():
    fields = {"b1": 0.8, "momentum": 0.5}
    assert make_hyper("adamw", **fields) == AdamW(b1=0.8)
    assert make_hyper("muon", **fields) == Muon(b1=0.8, momentum=0.5)
    for message, wrong in (
        ("kind", {"kind": "sgd"}),
        ("momentum", {"momentum": 1.0}),
        ("update_rms", {"update_rms": 0}),
        ("iterations must be 1 … 20", {"iterations": 10**11}),
    ):
        with pytest.raises(UserError, match=message):
            make_hyper(**{"kind": "muon", **wrong})


def test_traced_as_one_graph_it_equals_eager():
    """Compiled steps hold the update; aot_eager traces it as inductor does, without the time to build kernels."""
    torch.manual_seed(0)
    start = {k: torch.randn(shape, dtype=torch.float64) for k, shape in (SHAPES | {"embed": (7, 4)}).items()}
    grads = {k: torch.randn_like(v) for k, v in start.items()}
    state = optimizer.init(HYPER, DECAY, start)
    rate = torch.tensor(0.1, dtype=torch.float64)
    at = optimizer.Scalars(torch.tensor(3), rate, torch.tensor(0.5), torch.tensor(True))

    def update(p, g, s):
        return optimizer.update(HYPER, RULES, p, g, s, at)

    expected, got = (
        f(start, grads, state) for f in (update, torch.compile(update, backend="aot_eager", fullgraph=True))
    )
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
