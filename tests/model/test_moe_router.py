"""What a router counts, and experts of limited capacity, against loops over tokens in float64."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f import model, params
from qwen3f.model.moe import SparseMLP
from tests.batches import random_batch
from tests.model.hf_params import small_config
from tests.model.test_moe import MOE, assert_close, by_tokens, layer, mixed, value_and_gradients


def run(cfg, weights, x, real=None, form="grouped"):
    with torch.device("meta"):
        skeleton = SparseMLP(cfg, form)
    return torch.func.functional_call(skeleton, weights, (x, real), strict=True)


def choices(cfg, weights, x):
    """Yield (softmax, top k experts, logsumexp) for each token."""
    for token in x.flatten(0, 1):
        logits = (weights["gate.weight"] @ token).tolist()
        z = math.log(sum(math.exp(v) for v in logits))
        probs = [math.exp(v - z) for v in logits]
        yield probs, sorted(range(len(probs)), key=lambda e: -probs[e])[: cfg.num_experts_per_tok], z


def statistics(cfg, weights, x, real):
    counts, sums, tokens, log_z = [0] * cfg.num_experts, [0.0] * cfg.num_experts, 0, 0.0
    for (probs, chosen, z), is_real in zip(choices(cfg, weights, x), real.flatten().tolist(), strict=True):
        if is_real:
            tokens, log_z = tokens + 1, log_z + z * z
            sums = [a + b for a, b in zip(sums, probs)]
            for e in chosen:
                counts[e] += 1
    return counts, sums, tokens, log_z


CASES = {
    "padding": ({}, (2, 9), "some"),
    "nothing but padding": ({}, (2, 9), "none"),
    "every expert": ({"num_experts_per_tok": 5}, (2, 9), "all"),
    "a single token": ({}, (1, 1), "all"),
}


@pytest.mark.parametrize("form", ["grouped", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_statistics(case, form):
    changes, (rows, length), which = CASES[case]
    cfg = small_config(**{**MOE, **changes})
    weights, x = layer(cfg)
    x = x[:rows, :length]
    real = torch.full((rows, length), which != "none")
    if which == "some":
        real[0, 5:] = real[1, 0] = False
    _, got = run(cfg, weights, x, real, form)
    counts, sums, tokens, log_z = statistics(cfg, weights, x, real)
    assert got.counts.tolist() == counts
    assert (got.tokens, got.dropped) == (tokens, 0)
    torch.testing.assert_close(got.probs, torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert got.log_z.item() == pytest.approx(log_z, rel=1e-12)
    assert (got.counts.dtype, got.tokens.dtype, got.dropped.dtype) == (torch.int64,) * 3
    if which == "all":
        assert all(torch.equal(a, b) for a, b in zip(run(cfg, weights, x, None, form)[1], got))


def test_one_expert_gets_all_and_one_gets_none():
    cfg = small_config(**{**MOE, "num_experts_per_tok": 1})
    weights, x = layer(cfg)
    weights["gate.weight"] = torch.zeros_like(weights["gate.weight"])
    weights["gate.weight"][3] = 1.0
    _, got = run(cfg, weights, x.abs())
    assert got.counts.tolist() == [0, 0, 0, 18, 0]


def test_a_z_loss_gives_log_z_its_gradient():
    weights, x = layer(small_config(**MOE))
    x.requires_grad_()
    assert not run(small_config(**MOE), weights, x)[1].log_z.requires_grad
    cfg = small_config(**MOE, router_z_loss_coef=0.1)
    (got,) = torch.autograd.grad(run(cfg, weights, x)[1].log_z, x)
    (expected,) = torch.autograd.grad((x @ weights["gate.weight"].T).exp().sum(-1).log().square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def limited(cfg, weights, x, real):
    """(the layer's output by a loop, how many choices of real tokens it dropped).

    Each expert keeps its `capacity` heaviest choices.
    """
    tokens, real = x.flatten(0, 1), real.flatten().tolist()
    fair = Fraction(len(tokens) * cfg.num_experts_per_tok, cfg.num_experts)
    capacity = math.ceil(Fraction(str(cfg.moe_capacity_factor)) * fair)
    routed, queues = [], {e: [] for e in range(cfg.num_experts)}
    for n, token in enumerate(tokens):
        probs = (weights["gate.weight"] @ token).softmax(0)
        chosen = probs.argsort(descending=True)[: cfg.num_experts_per_tok].tolist()
        divisor = sum(probs[e] for e in chosen) if cfg.norm_topk_prob else 1.0
        routed.append({e: probs[e] / divisor for e in chosen})
        for e in chosen:
            queues[e].append((not real[n], -routed[n][e].item() if real[n] else 0.0, n))
    out, dropped = [torch.zeros_like(token) for token in tokens], 0
    for e, queue in queues.items():
        gate, up, down = (weights[f"experts.{name}_proj.weight"][e] for name in ("gate", "up", "down"))
        for place, (padding, _, n) in enumerate(sorted(queue)):
            if place < capacity:
                out[n] = out[n] + routed[n][e] * (down @ (F.silu(gate @ tokens[n]) * (up @ tokens[n])))
            else:
                dropped += not padding
    return torch.stack(out).view_as(x), dropped


@settings(max_examples=20, deadline=None)
@given(
    top_k=st.integers(1, 5),
    factor=st.sampled_from([0.05, 0.5, 0.9, 1.0, 1.25]),
    normalize=st.booleans(),
    form=st.sampled_from(["grouped", "reference"]),
    padding=st.lists(st.booleans(), min_size=18, max_size=18),
)
def test_capacity(top_k, factor, normalize, form, padding):
    changes = {"num_experts_per_tok": top_k, "norm_topk_prob": normalize, "moe_capacity_factor": factor}
    cfg = small_config(**{**MOE, **changes}, moe_drop_tokens=True)
    weights, x = layer(cfg)
    real = ~torch.tensor(padding).view(2, 9)
    got = value_and_gradients(lambda w, x: run(cfg, w, x, real, form)[0], weights, x)
    expected = value_and_gradients(lambda w, x: limited(cfg, w, x, real)[0], weights, x)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-13)
    for path in expected[1]:
        error = (got[1][path] - expected[1][path]).norm()
        assert error <= 1e-12 * max(expected[1][path].norm(), 1.0), path  # top 1, normalised: router gradient 0
    assert run(cfg, weights, x, real, form)[1].dropped == limited(cfg, weights, x, real)[1]


def test_enough_capacity_drops_nothing():
    cfg = small_config(**MOE)
    weights, x = layer(cfg)
    y, stats = run(cfg.replace(moe_drop_tokens=True, moe_capacity_factor=5.0), weights, x)
    assert stats.dropped == 0
    assert torch.equal(y, run(cfg, weights, x)[0])
    assert_close({"y": y}, {"y": by_tokens(cfg, weights, x)}, 1e-12)
    few = run(cfg.replace(moe_drop_tokens=True, moe_capacity_factor=1e-9), weights, x)[1]  # a row for each expert
    assert few.dropped == 36 - (few.counts > 0).sum()


def test_a_capacity_is_the_number_that_was_written():
    """1.1 · 100 rows / 10 experts is 11; floats give a little more, and would round it up. A huge factor: all rows."""
    cfg = small_config(**{**MOE, "num_experts": 10, "num_experts_per_tok": 1}, moe_drop_tokens=True)
    weights, _ = layer(cfg)
    x = torch.ones(1, 100, cfg.hidden_size, dtype=torch.float64)  # all to one expert
    for factor, kept in ((1.1, 11), (1.11, 12), (1e308, 100)):
        assert 100 - run(cfg.replace(moe_capacity_factor=factor), weights, x)[1].dropped == kept


def test_a_model_gives_its_sparse_layers_statistics():
    cfg = mixed()
    p = params.init_params(cfg, 0)
    batch = random_batch(3, 16, cfg.vocab_size)
    batch["segments"][2, 9:] = 0
    got = model.apply(cfg, p, batch).router
    assert got.counts.shape == got.probs.shape == (2, 5)
    assert got.tokens.tolist() == [41, 41]
    assert got.counts.sum(1).tolist() == [82, 82]
    named = {k: v for k, v in batch.items() if k != "segments"} | {"real": torch.zeros(3, 16, dtype=torch.bool)}
    assert model.apply(cfg, p, named).router.tokens.tolist() == [0, 0]
    assert model.apply(cfg.replace(num_experts=0), dense(cfg), batch).router is None


def dense(cfg):
    return params.init_params(cfg.replace(num_experts=0), 0)


def test_generation_drops_no_token():
    """A cached row's logits must not depend on other rows, so generation equals the model that keeps every token."""
    cfg = mixed(moe_drop_tokens=True, moe_capacity_factor=0.5)
    p = params.init_params(cfg.replace(initializer_range=0.2), 0, dtype=torch.float64)
    tokens = random_batch(3, 8, cfg.vocab_size)["tokens"]
    positions = torch.arange(8).expand(3, 8)
    batch = {"tokens": tokens, "positions": positions, "slots": torch.arange(1, 4)[:, None] * 8 + positions}
    hidden, _ = model.make_cached_forward(cfg)(p, model.init_cache(cfg, p, 3, 8), batch, table=1, span=8)
    got = hidden @ model.head_weight(cfg, p).T
    kept = model.apply(cfg.replace(moe_drop_tokens=False), p, {"tokens": tokens}).logits
    torch.testing.assert_close(got, kept, rtol=1e-11, atol=1e-12)
    assert (model.apply(cfg, p, {"tokens": tokens}).logits - kept).abs().max() > 1e-3
