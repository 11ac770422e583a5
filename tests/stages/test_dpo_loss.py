"""DPO's losses and gradients against float64 formulas and TRL 1.16's own, pair by pair and packed."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DPOTrainer

from qwen3f.errors import UserError
from qwen3f.stages.dpo import BY_LENGTH, DPO, LOSSES, make_objective, preference_loss
from qwen3f.train import state
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.step import StepOptions, make_train_step
from tests.sharding.steps import config
from tests.train.test_objective import log_probs_of, packed

EPSILON = {"cdpo": 0.1, "robust": 0.2, "exo_pair": 0.05}


def hyper(loss, **changes):
    return DPO(loss, **{"beta": 0.3, "label_smoothing": EPSILON.get(loss, 0.0), **changes})


def by_formula(loss, c, r, n_c, n_r, beta, e):
    """The loss of one pair, in Python's floats. c, r: log-ratios of the chosen and the rejected answer."""
    sig = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    z = beta * (c - r)
    return {
        "sigmoid": lambda: -math.log(sig(z)),
        "sigmoid_norm": lambda: -math.log(sig(beta * (c / n_c - r / n_r))),
        "hinge": lambda: max(0.0, 1 - z),
        "ipo": lambda: (c / n_c - r / n_r - 1 / (2 * beta)) ** 2,
        "cdpo": lambda: -(1 - e) * math.log(sig(z)) - e * math.log(sig(-z)),
        "robust": lambda: (-(1 - e) * math.log(sig(z)) + e * math.log(sig(-z))) / (1 - 2 * e),
        "exo_pair": lambda: sig(z) * math.log(sig(z) / (1 - e)) + sig(-z) * math.log(sig(-z) / e),
        "nca_pair": lambda: -math.log(sig(beta * c)) - 0.5 * math.log(sig(-beta * c)) - 0.5 * math.log(sig(-beta * r)),
        "bco_pair": lambda: -math.log(sig(beta * c)) - math.log(sig(-beta * r)),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sig(beta * c) + sig(beta * r),
        "apo_down": lambda: sig(beta * c) + 1 - sig(z),
    }[loss]()


def numbers(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    four = [3 * torch.randn(count, dtype=torch.float64, generator=g) - 9 for _ in range(4)]
    return four, tuple(torch.randint(1, 30, (count,), generator=g) for _ in range(2))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_formulas(loss):
    """float64, 1e-12; and the gradient by central differences, 1e-6."""
    (pc, pr, rc, rr), (n_c, n_r) = numbers(7)
    h = hyper(loss)
    rows = torch.stack((pc - rc, pr - rr, n_c, n_r), 1).tolist()
    expected = [by_formula(loss, *row, h.beta, h.label_smoothing) for row in rows]
    got, figures = preference_loss(pc, pr, rc, rr, h, (n_c, n_r))
    assert got.item() == pytest.approx(sum(expected) / 7, rel=1e-12)
    margin = h.beta * ((pc - rc) - (pr - rr))
    assert figures["reward_margin"] == pytest.approx(margin.mean().item(), rel=1e-12)
    assert figures["accuracy"].item() == (margin > 0).double().mean()
    leaves = [x.clone().requires_grad_() for x in (pc, pr)]
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, rc, rr, h, (n_c, n_r))[0], leaves, atol=1e-6)


def test_the_sft_term_is_the_mean_over_an_answers_tokens():
    (pc, pr, rc, rr), lengths = numbers(5)
    plain = preference_loss(pc, pr, rc, rr, hyper("sigmoid"), lengths)[0]
    with_sft = preference_loss(pc, pr, rc, rr, hyper("sigmoid", sft_weight=0.7), lengths)[0]
    assert (with_sft - plain).item() == pytest.approx(-0.7 * (pc / lengths[0]).mean().item(), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([*LOSSES]), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_losses_and_gradients_of_far_log_probs_are_finite(loss, better, worse):
    one = lambda x: torch.tensor([x], dtype=torch.float32, requires_grad=True)  # noqa: E731
    pc, pr, zero = one(better), one(worse), torch.zeros(1)
    got = preference_loss(pc, pr, zero, zero, hyper(loss), (torch.ones(1), torch.ones(1)))[0]
    assert got.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, (pc, pr)))


def trl_loss(loss, log_probs, mask, ref, h, sft=0.0):
    """TRL's own method on given log-probabilities [2N, T] of tokens 1 … T. The N chosen answers come first."""
    outputs = SimpleNamespace(
        log_probs=log_probs,
        **{name: torch.zeros_like(log_probs) for name in ("entropy", "mean_logits")},
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )
    names, weights = ([loss, "sft"], [1.0, sft]) if sft else ([loss], [1.0])
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    self = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=names, loss_weights=weights,
        beta=h.beta, label_smoothing=h.label_smoothing, use_weighting=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    full = torch.nn.functional.pad(mask, (1, 0))
    inputs = {
        "completion_mask": full, "input_ids": torch.zeros_like(full), "attention_mask": full,
        "ref_chosen_logps": ref.chunk(2)[0], "ref_rejected_logps": ref.chunk(2)[1],
    }  # fmt: skip
    found = DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    return found, {name: values[0] for name, values in self._metrics["eval"].items() if values and name != "num_tokens"}


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cdpo"])  # TRL has no cdpo
def test_losses_gradients_and_metrics_are_trls(loss):
    """float32 tensors of different lengths. One answer is masked completely. 1e-5, since float32 rounds."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1, 7, 13, 5, 9, 3, 0, 11])
    mask = (torch.arange(13) < lengths[:, None]).long()
    log_probs = (-torch.rand(8, 13, generator=g) * mask).requires_grad_()
    ref = -torch.rand(8, 13, generator=g).mul(mask).sum(1)
    h = hyper(loss)
    expected, their = trl_loss(loss, log_probs, mask, ref, h)
    sums = log_probs.sum(1)
    got, figures = preference_loss(*sums.chunk(2), *ref.chunk(2), h, lengths.chunk(2))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (got, expected))
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    pairs = {
        "chosen_log_prob": "logps/chosen",
        "rejected_log_prob": "logps/rejected",
        "accuracy": "rewards/accuracies",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "reward_margin": "rewards/margins",
    }
    for name, theirs in pairs.items():
        assert figures[name].item() == pytest.approx(their[theirs], rel=1e-5, abs=1e-6), name


def test_the_sft_term_of_one_pair_is_trls():
    mask = torch.ones(2, 6, dtype=torch.long)
    log_probs = -torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    ref = log_probs.sum(1) - 0.5
    expected, _ = trl_loss("sigmoid", log_probs, mask, ref, hyper("sigmoid"), sft=0.4)
    sums = log_probs.sum(1).chunk(2)
    got, _ = preference_loss(*sums, *ref.chunk(2), hyper("sigmoid", sft_weight=0.4), mask.sum(1).chunk(2))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_packed_rows_give_the_formula_of_the_pairs_apart(loss):
    """Loss to 1e-12, gradient to 1e-10 (float64), for any cut into micro-batches. One answer is masked completely."""
    cfg, batch = config(), packed()
    batch["loss_weights"] = (batch["loss_weights"] > 0).float()
    batch["loss_weights"][1][batch["segments"][1] == 2] = 0
    h = hyper(loss, sft_weight=0.3)
    start = state.init_state(cfg, 0, dtype=torch.float64)
    leaves = {path: p.clone().requires_grad_() for path, p in start.params.items()}
    log_probs, weights = log_probs_of(cfg, leaves, batch), batch["loss_weights"].double()
    fields = {"c": ([], [], []), "r": ([], [], [])}
    for row, (segments, own) in enumerate(zip(batch["segments"], weights)):
        for k in range(1, 7):
            here = (segments == k) & (own > 0) & (batch["targets"][row] != -100)
            values = log_probs[row][here].sum(), batch["ref_logprobs"][row][here].double().sum(), here.sum()
            for place, value in zip(fields["c" if k % 2 else "r"], values):
                place.append(value)
    (pc, rc, n_c), (pr, rr, n_r) = ([torch.stack(x) for x in fields[key]] for key in "cr")
    loss_there, figures = preference_loss(pc, pr, rc, rr, h, (n_c, n_r))
    grads = dict(zip(leaves, torch.autograd.grad(loss_there, [*leaves.values()])))
    for options in ({}, {"microbatches": 2}, {"microbatch_rows": 1}):
        adam = AdamW(weight_decay=0.0, clip_norm=0.0)
        options = StepOptions(adam, Schedule("constant", 1e-2, 10), **options)
        new, found = make_train_step(cfg, make_objective(h), options)(start, batch)
        assert found["loss"].item() == pytest.approx(loss_there.item(), rel=1e-12)
        for path, g in grads.items():
            assert (new.opt.m[path] / 0.1 - g).norm() <= 1e-10 * max(1, g.norm()), path
        for name, value in figures.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert found["kl"] > 0


def test_ids_of_the_padding_change_nothing():
    """Padding is recognised by its segment, 0. So its id may be any, also that of the end of a turn."""
    cfg, batch = config(), packed()
    start = state.init_state(cfg, 0, dtype=torch.float64)
    step = make_train_step(cfg, make_objective(hyper("ipo")), StepOptions(AdamW(), Schedule("constant", 1e-2, 10)))
    ends = {**batch, "tokens": torch.where(batch["segments"] == 0, int(batch["tokens"][0, 2]), batch["tokens"])}
    (a, found), (b, again) = step(start, batch), step(start, ends)
    assert (batch["segments"] == 0).any()
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(torch.equal(a.params[path], b.params[path]) for path in a.params)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"loss": "sigmod"}, "config.dpo.loss=sigmod: write one of sigmoid, "),
        ({"beta": 0.0}, "config.dpo.beta=0.0: write a positive number"),
        ({"beta": float("nan")}, "config.dpo.beta=nan"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 does nothing to --config.dpo.loss=sigmoid: write"),
        ({"loss": "robust", "label_smoothing": 0.5}, "write a share below 0.5"),
        ({"loss": "exo_pair"}, "write a share below 0.5 and above 0"),
        ({"sft_weight": -1.0}, "config.dpo.sft_weight=-1.0"),
    ],
)
def test_values_that_cannot_work_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        DPO(**values)


def test_a_loss_by_length_asks_for_lengths():
    (pc, pr, rc, rr), _ = numbers(2)
    for h in (*map(hyper, BY_LENGTH), hyper("sigmoid", sft_weight=1.0)):
        with pytest.raises(ValueError, match="needs the answers' lengths"):
            preference_loss(pc, pr, rc, rr, h)
    none = torch.zeros(0)
    assert preference_loss(none, none, none, none, hyper("sigmoid"))[0] == 0
