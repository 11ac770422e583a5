"""Every loss and its gradient against float64 formulas and TRL 1.16 on stubs; any micro-batches, any packing."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.errors import UserError
from qwen3f.rl import surrogates
from qwen3f.rl.correction import entropy_threshold, high_entropy
from qwen3f.rl.policy import GRPO, LOSSES, make_objective
from qwen3f.stages.grpo import policy_loss
from qwen3f.train.objective import MicroBatch, cost_shares, divisor
from tests.rl.formulas import batch_of, by_hand, tensors, trl_loss

PLAIN = {name: GRPO(loss=name) for name in LOSSES}
VARIANTS = {
    **PLAIN,
    "dapo wide": GRPO(loss="dapo", clip_low=0.1, clip_high=0.05),
    "grpo dual": GRPO(loss="grpo", clip_low=0.05, clip_high=0.05, dual_clip=1.2),
    "gspo narrow": GRPO(loss="gspo", clip_low=3e-4, clip_high=4e-4),
    "cispo low cap": GRPO(loss="cispo", cispo_cap=1.0),
    "dr_grpo longest": GRPO(loss="dr_grpo", longest=50),
    **{f"{name} k3": GRPO(loss=name, kl_coef=0.1) for name in LOSSES},
    **{f"{name} k3 alone": GRPO(loss=name, kl_coef=0.1, kl_ratio=False) for name in LOSSES},
}
ESTIMATES = {f"dapo {kl} {ratio}": GRPO(kl_coef=0.3, kl=kl, kl_ratio=ratio) for kl in ("k1", "k2") for ratio in (0, 1)}


def value_and_grad(fn, logp):
    logp = logp.clone().requires_grad_()
    loss = fn(logp)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def ours(x, hyper, batch=None):
    return value_and_grad(lambda logp: policy_loss(logp, batch or batch_of(x), hyper)[0], x["logp"])


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("name", VARIANTS | ESTIMATES)
def test_loss_and_gradient_are_those_of_the_formula(name, spread):
    """To 1e-12: both are float64."""
    hyper, x = (VARIANTS | ESTIMATES)[name], tensors(spread=spread)
    loss, grad = ours(x, hyper)
    expected, expected_grad = value_and_grad(lambda logp: by_hand({**x, "logp": logp}, hyper), x["logp"])
    assert (loss - expected).abs() <= 1e-12 * max(1, expected.abs())
    assert (grad - expected_grad).abs().max() <= 1e-12 * max(1, expected_grad.abs().max())
    assert (grad[x["mask"] == 0] == 0).all()


def test_ratio_gap_and_moved_are_means_over_the_tokens_that_count():
    """Against the formulas |r − 1| and r − log r − 1, in float64."""
    x = tensors(spread=0.3)
    _, figures = policy_loss(x["logp"], batch_of(x), GRPO(loss="dapo"))
    log_ratio = (x["logp"] - x["old"])[x["mask"] != 0]
    assert figures["ratio_gap"] == pytest.approx((log_ratio.exp() - 1).abs().mean().item(), rel=1e-12)
    assert figures["moved"] == pytest.approx((log_ratio.exp() - log_ratio - 1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("dual", [0.0, 1.5])
def test_clipped_shares_are_of_the_tokens_whose_gradient_a_bound_takes(dual):
    ratio, advantage = (x.flatten() for x in torch.meshgrid(torch.linspace(0.55, 1.95, 15), torch.tensor([-2.0, 0, 3])))
    clip = surrogates.Clip(0.2, 0.28, dual)
    _, grad = value_and_grad(lambda r: surrogates.clipped(r, advantage, clip).sum(), ratio)
    low, high = surrogates.clipped_low(ratio, advantage, clip), surrogates.clipped_high(ratio, advantage, clip)
    assert torch.equal(low + high, ((grad == 0) & (advantage != 0)).float())
    assert (ratio[low > 0] < 1).all()
    assert (ratio[high > 0] > 1).all()
    assert (high[advantage < 0].sum() > 0) == bool(dual)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_are_trls(name, spread):
    """To 1e-5 of TRL 1.16's `_compute_loss`, on the same float64 tensors."""
    hyper, x = VARIANTS[name], tensors(spread=spread)
    loss, grad = ours(x, hyper)
    theirs, their_grad = value_and_grad(lambda logp: trl_loss(x, hyper, logp)[0], x["logp"])
    assert (loss - theirs).abs() <= 1e-5 * max(1, theirs.abs())
    assert (grad - their_grad).abs().max() <= 1e-5 * max(1, their_grad.abs().max())


def test_every_loss_type_that_trl_has_is_here():
    import inspect

    from trl import GRPOTrainer

    text = inspect.getsource(GRPOTrainer._compute_loss)
    known = {"grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"}
    assert all(f'"{name}"' in text for name in known)
    assert set(LOSSES) == known | {"gspo"}


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_clip_fractions_are_trls(name):
    width = 0.02 if name == "gspo" else 0.1
    hyper, x = GRPO(loss=name, clip_low=width, clip_high=width), tensors(rows=40, spread=0.5)
    x["mask"][:] = 1  # TRL's mean over sequences is NaN where one is empty
    figures = policy_loss(x["logp"], batch_of(x), hyper)[1]
    theirs = trl_loss(x, hyper, x["logp"])[1]
    for here, there in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean")):
        assert figures[here].item() == pytest.approx(theirs[there][0], rel=1e-5)
        assert figures[here] > 0


def test_the_top_entropy_filter_is_trls():
    """TRL takes the quantile of a micro-batch, we take that of the batch. Here the micro-batch is the whole batch."""
    hyper, x = GRPO(), tensors()
    counts = x["mask"] > 0
    kept = high_entropy(x["entropy"], counts, entropy_threshold(x["entropy"][counts], 0.2))
    batch = batch_of(x)
    batch["advantages"] = batch["advantages"] * kept
    theirs = value_and_grad(lambda logp: trl_loss(x, hyper, logp, top_entropy=0.2)[0], x["logp"])
    for a, b in zip(ours(x, hyper, batch), theirs):
        assert (a - b).abs().max() <= 1e-5
    assert 0.15 < kept.sum() / counts.sum() < 0.3


# -- one denominator for the whole batch -------------------------------------------------------------------------------


def packed(x, order, per_row, length):
    """(log-probabilities, batch): the rows of x as documents, in this order, per_row of them packed in a row of
    `length` tokens. Padding is at the end of a row."""
    rows, width = x["logp"].shape
    keys = ("logp", "old", "ref", "mask", "entropy")
    shape = (-(-rows // per_row), length)
    out = {key: torch.zeros(shape, dtype=torch.float64) for key in keys} | {"advantages": torch.zeros(shape).double()}
    segments = torch.zeros(shape, dtype=torch.int32)
    for place, b in enumerate(order):
        row, slot = divmod(place, per_row)
        span = slice(slot * width, (slot + 1) * width)
        for key in keys:
            out[key][row, span] = x[key][b]
        out["advantages"][row, span] = x["advantages"][b]
        segments[row, span] = slot + 1
    batch = {
        "old_logprobs": out["old"],
        "ref_logprobs": out["ref"],
        "advantages": out["advantages"],
        "loss_weights": out["mask"],
        "segments": segments,
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "targets": torch.zeros(shape, dtype=torch.int64),
    }
    return out["logp"], batch


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(LOSSES)), st.permutations(range(6)), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)
)
def test_gradient_is_the_same_for_any_packing_and_any_cut(name, order, per_row, padding, parts):
    """float64, 1e-10. Any order of documents, any number of them in a row, any cut of rows into micro-batches.
    dr_grpo's constant divisor is given."""
    hyper, x = GRPO(loss=name, kl_coef=0.05, longest=9), tensors()
    loss, grad = ours(x, hyper)
    logp, batch = packed(x, order, per_row, per_row * 9 + padding)
    objective = make_objective(hyper, entropy=False)
    count = divisor(objective, batch)
    leaf = logp.clone().requires_grad_()
    bounds = torch.linspace(0, len(logp), parts + 1).long().tolist()
    total = 0
    for first, last in pairwise(bounds):
        part = {key: value[first:last] for key, value in batch.items()}
        if last > first:
            total = total + cost_shares(objective, leaf[first:last], MicroBatch(part, part), count)[0]
    (got,) = torch.autograd.grad(total, leaf)
    assert (total - loss).abs() <= 1e-10
    for place, b in enumerate(order):
        row, slot = divmod(place, per_row)
        assert (got[row, slot * 9 : (slot + 1) * 9] - grad[b]).abs().max() <= 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_may_be_anything_finite(name):
    x, hyper = tensors(), GRPO(loss=name, kl_coef=0.1)
    wild = {key: torch.where(x["mask"] == 0, 7.0, x[key]) if key in ("logp", "old", "ref") else x[key] for key in x}
    (a, grad), (b, other) = ours(x, hyper), ours(wild, hyper)
    assert a == b
    assert torch.equal(grad, other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_which_nothing_counts_is_a_finite_zero(name):
    x = tensors()
    x["mask"][:] = 0
    loss, grad = ours(x, GRPO(loss=name, kl_coef=0.1))
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_prob, old", [(-1.0, -100.0), (-1.0, -1e5), (-200.0, -1.0)])
@pytest.mark.parametrize("name", [*PLAIN, *(f"{name} k3" for name in LOSSES)])
def test_a_policy_far_from_the_old_one_gives_finite_numbers(name, log_prob, old, advantage):
    """e^99 is infinite in float32. A bound may keep the cost finite, but without a limit on the ratio its gradient
    would be NaN."""
    batch = {
        "old_logprobs": torch.full((1, 2), old),
        "ref_logprobs": torch.full((1, 2), old),
        "advantages": torch.full((1, 2), advantage),
        "loss_weights": torch.ones(1, 2),
    }
    logp = torch.full((1, 2), log_prob, requires_grad=True)
    loss, figures = policy_loss(logp, batch, VARIANTS[name])
    (grad,) = torch.autograd.grad(loss, logp)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert all(torch.isfinite(figure) for figure in figures.values())
    if name in PLAIN and advantage == 0:
        assert loss == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_of_log_prob(name):
    x = tensors(spread=0.0)
    batch = batch_of(x)
    del batch["old_logprobs"]
    (a, grad), (b, other) = ours(x, GRPO(loss=name)), ours(x, GRPO(loss=name), batch)
    assert abs(a - b) <= 1e-14
    assert (grad - other).abs().max() <= 1e-14
    assert policy_loss(x["logp"], batch, GRPO(loss=name))[1]["ratio_gap"] == 0


def test_figures_are_means_of_what_counts():
    x = tensors()
    mask, lengths = x["mask"], x["mask"].sum(1)
    ratio = ((x["logp"] - x["old"]).exp() - 1).abs()
    of_tokens = (ratio * mask).sum() / mask.sum()
    of_documents = ((ratio * mask).sum(1) / lengths.clamp(min=1)).mean()
    batch = {**batch_of(x), "entropy": x["entropy"]}
    for name in LOSSES:
        found = policy_loss(x["logp"], batch, GRPO(loss=name, kl_coef=0.1))[1]
        assert set(found) == {"ratio_gap", "clip_low", "clip_high", "moved", "kl", "entropy"}
        expected = of_tokens if name in ("dapo", "bnpo", "cispo", "vespo") else of_documents
        assert found["ratio_gap"].item() == pytest.approx(expected.item(), rel=1e-12), name


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"loss": "ppo"}, "grpo.loss=ppo: write one of grpo, dr_grpo"),
        ({"kl": "k4"}, "grpo.kl=k4"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"dual_clip": 1.1}, "dual_clip=1.1 must be 0 or more than 1"),
        ({"cispo_cap": 0.2}, "bounds the ratio itself"),
        ({"kl_coef": -1}, "kl_coef"),
        (
            {"sapo_temperatures": ()},
            r"temperatures=\(\): write two numbers from 0.001 to 1000, such as \(1.0,1.05\)",
        ),
        ({"sapo_temperatures": ("x", 1.0)}, "write two numbers"),
        ({"sapo_temperatures": (1.0, 1.05, 2.0)}, "write two numbers"),
        ({"sapo_temperatures": (1.0, 0.0)}, "write two numbers"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        GRPO(**wrong)


def test_hyperparameters_are_a_value():
    assert dataclasses.replace(GRPO(), clip_high=0.3) == GRPO(clip_high=0.3)
    assert hash(GRPO()) == hash(GRPO())
