"""Objectives against float64 formulas written out document by document; cuts and packing change nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f import model, params, presets
from qwen3f.train import state
from qwen3f.train.objective import Objective, document_sums, has_document
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_outputs
from qwen3f.train.schedule import Schedule
from qwen3f.train.step import StepOptions, make_train_step
from tests.sharding.steps import MOE, config

SCHEDULE = Schedule("constant", 1e-2, 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 7), max_size=6), min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 9))
def test_document_sums_are_those_of_a_loop(lengths, padding, seed):
    length = max(1, max(map(sum, lengths)) + padding)
    segments = torch.zeros(len(lengths), length, dtype=torch.int32)
    for row, own in enumerate(lengths):
        numbers = torch.arange(1, len(own) + 1, dtype=torch.int32).repeat_interleave(
            torch.tensor(own, dtype=torch.int64)
        )
        segments[row, : len(numbers)] = numbers
    values = torch.randn(len(lengths), length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values.requires_grad_()
    sums = document_sums(values, segments, length)
    for row in range(len(lengths)):
        for k in range(1, length + 1):
            expected = values[row][segments[row] == k].sum()
            assert abs(sums[row, k - 1] - expected) <= 1e-12
    upstream = torch.randn_like(sums)
    (grad,) = torch.autograd.grad(sums, values, upstream)
    expected = torch.where(segments > 0, upstream.gather(1, (segments.long() - 1).clamp(min=0)), 0)
    assert torch.equal(grad, expected)
    there = has_document({"tokens": segments, "segments": segments})
    assert there.sum(1).tolist() == list(map(len, lengths))


def packed(rows=4, length=24, vocab=40):
    """Rows of six documents of unequal lengths; about three of four places have a weight."""
    g = torch.Generator().manual_seed(0)
    numbers = [[k for k, size in enumerate((3, 2 + row, 4, 3, 2, 3), 1) for _ in range(size)] for row in range(rows)]
    segments = torch.tensor([row + [0] * (length - len(row)) for row in numbers])
    place = torch.arange(length).expand(rows, length)
    begin = torch.where(F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True), place, 0).cummax(1).values
    return {
        "tokens": torch.randint(0, vocab, (rows, length), generator=g),
        "targets": torch.randint(0, vocab, (rows, length), generator=g).masked_fill(segments == 0, -100),
        "loss_weights": ((torch.rand(rows, length, generator=g) < 0.75) & (segments > 0)).float(),
        "positions": place - begin,
        "segments": segments.int(),
        "ref_logprobs": torch.randn(rows, length, generator=g) - 3,
        "old_logprobs": torch.randn(rows, length, generator=g) * 0.1 - 3.7,
        "advantages": torch.randn(rows, length, generator=g),
    }


def pairs(batch):
    return has_document(batch).sum() / 2


def dpo(beta=0.5):
    def log_ratio(log_probs, batch):
        return log_probs - batch["ref_logprobs"].to(log_probs.dtype), {"log_prob": log_probs}

    def preference(sums, rows):
        margin = beta * (sums[:, ::2] - sums[:, 1::2])
        spread = lambda x: torch.stack((x, torch.zeros_like(x)), 2).flatten(1)  # noqa: E731
        return spread(F.softplus(-margin)), {"margin": spread(margin)}

    return Objective("log_probs", log_ratio, preference, pairs, ("log_prob", "margin"))


def surrogate(log_probs, batch):
    ratio = (log_probs - batch["old_logprobs"].to(log_probs.dtype)).exp()
    a = batch["advantages"].to(log_probs.dtype)
    gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return -gain, {"clipped": ((ratio - 1).abs() > 0.2).to(ratio.dtype)}


OBJECTIVES = {"dpo": dpo(), "grpo": Objective("log_probs", surrogate, None, None, ("clipped",))}


def log_probs_of(cfg, p, batch):
    logits = model.apply(cfg, p, batch, model.REFERENCE).logits
    index = batch["targets"].clamp(min=0)[..., None]
    return torch.where(batch["targets"] == -100, 0, logits.log_softmax(-1).gather(-1, index)[..., 0])


def by_hand(name, cfg, p, batch):
    """The loss, document by document."""
    log_probs, weights = log_probs_of(cfg, p, batch), batch["loss_weights"].double()
    if name == "grpo":
        return (surrogate(log_probs, batch)[0] * weights).sum() / weights.sum()
    ratio, losses = (log_probs - batch["ref_logprobs"]) * weights, []
    for row, segments in zip(ratio, batch["segments"]):
        for k in range(1, 7, 2):
            losses.append(F.softplus(-0.5 * (row[segments == k].sum() - row[segments == k + 1].sum())))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_formula_for_any_cut(name):
    """Moments after one step without decay or clipping are (1 − b1) · gradient: to 1e-10 of the float64 formula's."""
    cfg, batch = config(), packed()
    start = state.init_state(cfg, 0, dtype=torch.float64)
    leaves = {path: p.clone().requires_grad_() for path, p in start.params.items()}
    loss = by_hand(name, cfg, leaves, batch)
    grads = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()])))
    for options in ({}, {"microbatches": 2}, {"microbatch_rows": 1}):
        hyper = AdamW(weight_decay=0.0, clip_norm=0.0)
        new, found = make_train_step(cfg, OBJECTIVES[name], StepOptions(hyper, SCHEDULE, **options))(start, batch)
        assert abs(found["loss"] - loss) <= 1e-12
        for path, g in grads.items():
            assert (new.opt.m[path] / 0.1 - g).norm() <= 1e-10 * max(1, g.norm()), path
        assert found.keys() >= set(OBJECTIVES[name].reports)


def test_what_does_not_count_may_be_anything_finite():
    cfg, batch = config(), packed()
    start = state.init_state(cfg, 0, dtype=torch.float64)
    step = make_train_step(cfg, OBJECTIVES["grpo"], StepOptions(AdamW(), SCHEDULE))
    wild = {**batch, "old_logprobs": torch.where(batch["loss_weights"] == 0, 7.0, batch["old_logprobs"])}
    (a, x), (b, y) = step(start, batch), step(start, wild)
    assert x["loss"] == y["loss"]
    assert all(torch.equal(a.params[path], b.params[path]) for path in a.params)


def test_several_updates_are_as_many_steps_of_parts():
    """Two updates from one batch equal two steps with its halves, as the rate changes. A bad update is withheld."""
    cfg, batch = config(), packed()
    schedule = Schedule("cosine", 1e-2, 6, warmup_steps=3)
    start = state.init_state(cfg, 0, dtype=torch.float64)
    halves = [{key: x.chunk(2)[i] for key, x in batch.items()} for i in (0, 1)]
    one = make_train_step(cfg, OBJECTIVES["dpo"], StepOptions(AdamW(), schedule))
    expected = start
    for half in halves:
        expected, last = one(expected, half)
    two = make_train_step(cfg, OBJECTIVES["dpo"], StepOptions(AdamW(), schedule, updates=2))
    got, found = two(start, batch)
    assert (int(got.step), int(got.position)) == (1, 4)
    assert found["lr"] == last["lr"]
    assert int(found["withheld"]) == 0
    for path in got.params:
        assert (got.params[path] - expected.params[path]).norm() <= 1e-12 * expected.params[path].norm()
    bad = {**batch, "ref_logprobs": torch.cat((halves[0]["ref_logprobs"] * float("nan"), halves[1]["ref_logprobs"]))}
    got, found = two(start, bad)
    assert (int(found["withheld"]), bool(found["finite"])) == (1, False)
    assert not torch.equal(got.params["model.norm.weight"], start.params["model.norm.weight"])
    assert all(x.isfinite().all() for x in got.params.values())


def test_an_update_without_tokens_changes_no_weights_and_no_means():
    """With momentum of a step before, AdamW would move the weights without a gradient, and weight decay shrink them."""
    cfg, batch = config(), packed()
    options = StepOptions(AdamW(), Schedule("constant", 1e-2, 6))
    one = make_train_step(cfg, OBJECTIVES["grpo"], options)
    start, _ = one(state.init_state(cfg, 0, dtype=torch.float64), batch)
    halves = [{key: x.chunk(2)[i] for key, x in batch.items()} for i in (0, 1)]
    empty = {**halves[1], "loss_weights": torch.zeros_like(halves[1]["loss_weights"])}
    alone, figures = one(start._replace(step=2 * start.step), halves[0])  # updates are counted, not steps
    both = {key: torch.cat([halves[0][key], empty[key]]) for key in batch}
    got, found = make_train_step(cfg, OBJECTIVES["grpo"], dataclasses.replace(options, updates=2))(start, both)
    for path in got.params:
        torch.testing.assert_close(got.params[path], alone.params[path], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got.opt.m[path], alone.opt.m[path], rtol=1e-12, atol=1e-14)
    for name in set(figures) - {"lr"}:
        torch.testing.assert_close(found[name].double(), figures[name].double(), rtol=1e-9, atol=1e-12)
    kept, nothing = one(start, empty)
    assert all(torch.equal(kept.params[path], start.params[path]) for path in start.params)
    assert (int(kept.step), int(nothing["tokens"]), bool(nothing["finite"])) == (2, 0, True)


def test_consumed_moves_the_position_and_nothing_else():
    cfg, batch = config(), packed()
    start = state.init_state(cfg, 0)
    step = make_train_step(cfg, OBJECTIVES["grpo"], StepOptions(AdamW(), SCHEDULE, microbatches=2))
    got, _ = step(start, {**batch, "consumed": torch.tensor(11)})
    usual, _ = step(start, batch)
    assert (int(got.position), int(usual.position)) == (11, 4)
    assert all(torch.equal(got.params[path], usual.params[path]) for path in got.params)


def test_scores_are_read_by_weight_from_a_scalar_head():
    """The Bradley–Terry loss of the last tokens' scores, against the formula. One row replaces lm_head."""
    cfg, batch = config(scalar_head=True, tie_word_embeddings=True), packed()
    ends = F.pad(batch["segments"][:, 1:] != batch["segments"][:, :-1], (0, 1), value=True) & (batch["segments"] > 0)
    batch["loss_weights"] = ends.float()

    def ranking(sums, rows):
        margin = sums[:, ::2] - sums[:, 1::2]
        return torch.stack((F.softplus(-margin), torch.zeros_like(margin)), 2).flatten(1), {}

    start = state.init_state(cfg, 0, dtype=torch.float64)
    assert start.params["score.weight"].shape == (1, cfg.hidden_size)
    assert "lm_head.weight" not in start.params
    scores = model.apply(cfg, start.params, batch, model.REFERENCE).logits[..., 0]
    last = [[(row == k).nonzero()[-1, 0] for k in range(1, 7)] for row in batch["segments"]]
    ends_of = [row[torch.stack(places)] for row, places in zip(scores, last)]
    expected = torch.stack([F.softplus(row[k + 1] - row[k]) for row in ends_of for k in (0, 2, 4)]).mean()
    step = make_train_step(cfg, Objective("scores", None, ranking, pairs), StepOptions(AdamW(), SCHEDULE))
    assert abs(step(start, batch)[1]["loss"] - expected) <= 1e-12
    got = make_outputs(cfg, output="scores")(start.params, batch)
    assert (got - scores).abs().max() <= 1e-12


def test_outputs_are_log_probs_at_the_temperature_and_entropy_goes_to_the_token():
    cfg, batch = config(), packed()
    p = params.init_params(cfg, 0, dtype=torch.float64)
    batch["temperature"] = torch.full_like(batch["loss_weights"], 0.5)
    logits = model.apply(cfg, p, batch, model.REFERENCE).logits / 0.5
    log_p = logits.log_softmax(-1)
    of_target = log_p.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    expected = torch.where(batch["targets"] == -100, 0, of_target)
    assert (make_outputs(cfg, microbatches=2)(p, batch) - expected).abs().max() <= 1e-12
    seen = []

    def token(log_probs, given):
        seen.append(given["entropy"])
        return log_probs, {}

    step = make_train_step(cfg, Objective("log_probs", token, entropy=True), StepOptions(AdamW(), SCHEDULE))
    step(state.from_params(cfg, p, 0), batch)
    assert (seen[0] + (log_p.exp() * log_p).sum(-1)).abs().max() <= 1e-12


def test_ids_that_no_sampler_draws_have_no_probability():
    """Against a softmax over the first 33 of 40 ids. The head's rows of the other ids get no gradient."""
    cfg, batch = config(tie_word_embeddings=False), packed(vocab=33)
    p = params.init_params(cfg, 0, dtype=torch.float64)
    log_p = model.apply(cfg, p, batch, model.REFERENCE).logits[..., :33].log_softmax(-1)
    of_target = log_p.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    expected = torch.where(batch["targets"] == -100, 0, of_target)
    assert (make_outputs(cfg, num_ids=33)(p, batch) - expected).abs().max() <= 1e-12
    around = make_outputs(cfg, output="entropy", num_ids=33)(p, batch)
    assert (around + (log_p.exp() * log_p).sum(-1)).abs().max() <= 1e-12
    hyper = AdamW(weight_decay=0.0, clip_norm=0.0)
    step = make_train_step(cfg, Objective("log_probs", num_ids=33), StepOptions(hyper, SCHEDULE))
    new, found = step(state.from_params(cfg, p, 0), batch)
    weights = batch["loss_weights"].double()
    assert abs(found["loss"] - (expected * weights).sum() / weights.sum()) <= 1e-12
    assert (new.opt.m["lm_head.weight"][33:] == 0).all()
    assert (new.opt.m["lm_head.weight"][:33] != 0).any(1).all()


@pytest.mark.parametrize("balance", ["global", "global_exact"])
def test_an_objective_without_router_losses_measures_them_and_is_that_of_a_model_without_coefficients(balance):
    cfg = config(**{**MOE, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5, "router_balance": balance})
    batch, start = packed(), state.init_state(cfg, 0, dtype=torch.float64)
    options = StepOptions(AdamW(), SCHEDULE, microbatches=2)

    def norm(cfg, **objective):
        found = make_train_step(cfg, Objective("log_probs", **objective), options)(start, batch)[1]
        assert found["aux_loss"] > 0
        assert found["router_z_loss"] > 0
        return found["grad_norm"]

    without = cfg.replace(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert norm(cfg, router_losses=False) == norm(without)
    assert norm(cfg) != norm(without)


@pytest.mark.parametrize(
    "wrong", [{"output": "logits"}, {"output": "nll", "reports": ("x",)}, {"output": "scores", "entropy": True}]
)
def test_objectives_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="Objective"):
        Objective(**wrong)


def test_figures_that_were_not_announced_are_an_error():
    cfg = presets.get("nano").replace(vocab_size=40, num_hidden_layers=1, hidden_size=32)
    step = make_train_step(cfg, Objective("log_probs", surrogate), StepOptions(AdamW(), SCHEDULE))
    with pytest.raises(ValueError, match=r"reports=\(\), but token and document returned \['clipped'\]"):
        step(state.init_state(cfg, 0), packed())
