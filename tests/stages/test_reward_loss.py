"""The reward model's loss against float64 formulas and TRL 1.16's own, pair by pair and packed."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.reward_trainer import RewardTrainer

from qwen3f import model
from qwen3f.errors import UserError
from qwen3f.preference.rows import last_places
from qwen3f.stages.reward_model import RewardLoss, make_objective, pairwise_loss
from qwen3f.train import state
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.step import StepOptions, make_train_step
from tests.sharding.steps import config
from tests.train.test_objective import packed


def scores(count=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    both = [torch.randn(count, dtype=dtype, generator=g).requires_grad_() for _ in range(2)]
    return both, torch.rand(count, generator=g)


def test_the_loss_is_the_formula():
    """float64, 1e-12, and the gradient by central differences."""
    (c, r), margins = scores()
    got, figures = pairwise_loss(c, r, margins, 0.01)
    rows = torch.stack((c, r, margins), 1).tolist()
    each = [-math.log(1 / (1 + math.exp(-(a - b - m)))) + 0.01 * (a + b) ** 2 for a, b, m in rows]
    assert got.item() == pytest.approx(sum(each) / 9, rel=1e-12)
    assert figures["score_margin"].item() == pytest.approx((c - r).mean().item(), rel=1e-12)
    assert figures["accuracy"].item() == (c > r).double().mean()
    assert torch.autograd.gradcheck(lambda a, b: pairwise_loss(a, b, margins, 0.01)[0], (c, r))
    assert pairwise_loss(c[:0], r[:0])[0] == 0


@pytest.mark.parametrize("with_margins", [False, True])
@pytest.mark.parametrize("centre", [0.0, 0.02])
def test_the_loss_its_gradient_and_metrics_are_trls(with_margins, centre):
    """float32, 1e-5."""
    (c, r), margins = scores(dtype=torch.float32)
    logits = torch.cat([c, r])[:, None]
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    self = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=same, _metrics={"eval": defaultdict(list)},
        args=SimpleNamespace(center_rewards_coefficient=centre or None), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"margin": margins} if with_margins else {}
    expected = RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=logits), inputs)
    got, figures = pairwise_loss(c, r, margins if with_margins else 0.0, centre)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(got, (c, r)), torch.autograd.grad(expected, (c, r))):
        assert (ours - theirs).abs().max() <= 1e-5
    their = self._metrics["eval"]
    assert figures["accuracy"].item() == pytest.approx(their["accuracy"][0], rel=1e-5)
    assert figures["score_margin"].item() == pytest.approx(their["margin"][0], rel=1e-5)


def test_packed_rows_give_the_loss_of_the_last_tokens_scores():
    """Loss to 1e-12, gradient to 1e-10 (float64), with margins and centring, for any cut into micro-batches."""
    cfg, batch = config(scalar_head=True), packed()
    ends = last_places(batch)
    batch["loss_weights"] = ends.float()
    of_first = ends & (batch["segments"] % 2 == 1)
    batch["margins"] = torch.where(of_first, torch.rand(ends.shape, generator=torch.Generator().manual_seed(1)), 0)
    start = state.init_state(cfg, 0, dtype=torch.float64)
    leaves = {path: p.clone().requires_grad_() for path, p in start.params.items()}
    there = model.apply(cfg, leaves, batch, model.REFERENCE).logits[..., 0]
    rows = zip(there, batch["segments"])
    at = torch.stack([row[(own == k).nonzero()[-1, 0]] for row, own in rows for k in range(1, 7)])
    margins = batch["margins"].double()[of_first]
    expected, figures = pairwise_loss(at[::2], at[1::2], 0.5 * margins, 0.01)
    grads = dict(zip(leaves, torch.autograd.grad(expected, [*leaves.values()])))
    for options in ({}, {"microbatches": 2}, {"microbatch_rows": 1}):
        options = StepOptions(AdamW(weight_decay=0.0, clip_norm=0.0), Schedule("constant", 1e-2, 10), **options)
        new, found = make_train_step(cfg, make_objective(RewardLoss(0.5, 0.01)), options)(start, batch)
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
        for path, g in grads.items():
            assert (new.opt.m[path] / 0.1 - g).norm() <= 1e-10 * max(1, g.norm()), path
        for name, value in figures.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-10), name


def test_last_places_are_those_of_segments():
    rows = {"tokens": torch.zeros(2, 8), "segments": torch.tensor([[0, 0, 1, 1, 2, 3, 3, 3], [1, 1, 1, 2, 2, 0, 0, 0]])}
    assert last_places(rows).int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("values", [{"margin": -1.0}, {"centre": float("inf")}])
def test_values_that_cannot_work_are_refused(values):
    with pytest.raises(UserError, match="config.reward_model"):
        RewardLoss(**values)


def test_far_scores_stay_finite():
    c, r = (torch.tensor([x], requires_grad=True) for x in (-1e30, 1e30))
    loss = pairwise_loss(c, r)[0]
    assert loss.isfinite()
    assert F.softplus(torch.tensor(1e30)) == loss / 2
