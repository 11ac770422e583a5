"""Learning rates by pattern, and frozen leaves: against torch's parameter groups, and on one device against several."""

import pytest
import torch

from qwen3f.errors import UserError
from qwen3f.train import optimizer, state
from qwen3f.train.hyper import AdamW, Muon, parse_rates
from qwen3f.train.loop import run
from qwen3f.train.objective import NEXT_TOKEN
from qwen3f.train.step import StepOptions, make_train_step
from tests.sharding.steps import SCHEDULE, batches, config, expected_on, on_local_world
from tests.train.runs import run_updates

DECAY = {"a.w": True, "b.w": True, "c": False, "d.w": True}
RATES = ((r"a\..*", 0.25), (r".*\.w", 2.0), ("c", 0.0))
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def test_rates_are_those_of_torchs_parameter_groups():
    """float64, 1e-12: six clipped AdamW steps; the frozen leaf is in no group, nor in the norm."""
    g = torch.Generator().manual_seed(0)
    start = {name: torch.randn(4, 3, dtype=torch.float64, generator=g) for name in DECAY}
    grads = [{k: torch.randn(4, 3, dtype=torch.float64, generator=g) for k in start if k != "c"} for _ in range(6)]
    lrs = [1e-2 * (i + 1) for i in range(6)]
    hyper = AdamW(rates=RATES)
    ours, moments = run_updates(hyper, DECAY, start, grads, lrs)
    theirs = {name: torch.nn.Parameter(x.clone()) for name, x in start.items() if name != "c"}
    factors = {"a.w": 0.25, "b.w": 2.0, "d.w": 2.0}
    groups = [{"params": [p], "factor": factors[name]} for name, p in theirs.items()]
    opt = torch.optim.AdamW(groups, betas=(hyper.b1, hyper.b2), eps=hyper.eps, weight_decay=hyper.weight_decay)
    for grad, lr in zip(grads, lrs):
        for name, p in theirs.items():
            p.grad = grad[name].clone()
        torch.nn.utils.clip_grad_norm_([*theirs.values()], hyper.clip_norm)
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        opt.step()
    for name, p in theirs.items():
        assert (ours[name] - p).norm() <= 1e-12 * p.norm(), name
    assert torch.equal(ours["c"], start["c"])
    assert moments.m.keys() == moments.v.keys() == theirs.keys()


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_compiled_rates_equal_eager(kind):
    hyper = kind(rates=RATES)
    rules = optimizer.leaf_rules(hyper, DECAY)
    g = torch.Generator().manual_seed(1)
    start = {name: torch.randn(4, 3, dtype=torch.float64, generator=g) for name in DECAY}
    grads = {k: torch.randn(4, 3, dtype=torch.float64, generator=g) for k in start if k != "c"}
    at = optimizer.Scalars(
        torch.tensor(2), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5), torch.tensor(True)
    )

    def update(p, g, s):
        return optimizer.update(hyper, rules, p, g, s, at)

    compiled = torch.compile(update, backend="eager", fullgraph=True)
    both = [f(start, grads, optimizer.init(hyper, DECAY, start)) for f in (update, compiled)]
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, both), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("mesh", ["dp2", "tp2", "cp2"])
def test_frozen_leaves_on_a_mesh_are_those_of_one_device(mesh):
    """float64, 1e-10, three steps; a frozen leaf has no moments and stays, bit for bit."""
    hyper = AdamW(rates=parse_rates(rf"{EMBED}=0,.*\.q_proj\.weight=0,.*norm.*=0.1"))
    cfg = config()
    current = state.init_state(cfg, 0, hyper, dtype=torch.float64)
    step = make_train_step(cfg, NEXT_TOKEN, StepOptions(hyper, SCHEDULE))
    start = current
    for batch in batches(3):
        current, metrics = step(current, batch)
    assert torch.equal(current.params[EMBED], start.params[EMBED])
    assert not torch.equal(current.params[NORM], start.params[NORM])
    assert current.opt.m.keys() == current.params.keys() - {EMBED, "model.layers.self_attn.q_proj.weight"}
    got, got_metrics = on_local_world(cfg, mesh, hyper=hyper)[-1]
    expected = expected_on(current, cfg, mesh)
    for path, shards in got.params.items():
        for a, b in zip(shards, expected.params[path], strict=True):
            assert (a - b).abs().max() <= 1e-10, path
    assert all(abs(x - metrics["grad_norm"]) <= 1e-10 for x in got_metrics["grad_norm"])


def test_other_frozen_leaves_in_a_workdir_are_an_error(make, tmp_path):
    run(make(steps=1, **{"optimizer.rates": f"{EMBED}=0"}), tmp_path, progress=False)
    run(make(steps=2, **{"optimizer.rates": f"{EMBED}=0,{NORM}=0.5"}), tmp_path, progress=False)  # same moments
    with pytest.raises(UserError, match="to a run of another optimizer: its optimizer.rates is"):
        run(make(steps=3), tmp_path, progress=False)


@pytest.mark.parametrize(
    "text, words",
    [
        ("model.norm", "has no pattern"), ("=2", "has no pattern"), ("(=1", "is not PATTERN=FACTOR"),
        ("a{99999999999}=0", "is not PATTERN=FACTOR"), ("(" * 2000 + ")" * 2000 + "=0", "is not PATTERN=FACTOR"),
        ("a=x", "is not PATTERN=FACTOR"), ("nothing=0", "'nothing' matches none of the model's parameters"),
        (".*=0", "freezes every parameter"), (".*=-1", "at least 0"), (".*=nan", "at least 0"),
        (".*=inf", "at least 0"),
    ],
)  # fmt: skip
def test_wrong_rates_are_named(make, tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        run(make(steps=1, **{"optimizer.rates": text}), tmp_path / "w", progress=False)
    assert not (tmp_path / "w").exists()
