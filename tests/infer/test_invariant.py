"""model.INVARIANT: engine and training give a token the same log-probability, bit for bit, in any batch.

These comparisons are in fp32, where any other order of summation changes bits.
"""

import math
import random

import pytest
import torch

from qwen3f import model
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.model import invariant
from qwen3f.model.attention import AttentionMask, attend_reference, make_mask
from qwen3f.model.mlp import ACTIVATIONS
from qwen3f.train.losses import make_differentiated, sum_totals
from qwen3f.train.objective import MicroBatch, Objective
from qwen3f.train.outputs import make_outputs
from sharding.axes import ONE
from tests.infer.test_engine import build, random_prompts

DRAWN = SamplingParams(0.8)


def packed(rows, width):
    """A batch whose rows are packed documents, each (prompt, answer, temperature). Targets are the answers' tokens."""
    keys = {"tokens": 0, "targets": -100, "segments": 0, "positions": 0, "temperature": 1.0, "loss_weights": 0.0}
    batch = {key: torch.full((len(rows), width), value) for key, value in keys.items()}
    for number, row in enumerate(rows):
        start = 0
        for segment, (prompt, answer, temperature) in enumerate(row, 1):
            ids, end = torch.tensor(prompt + answer), start + len(prompt) + len(answer)
            batch["tokens"][number, start:end] = ids
            batch["targets"][number, start + len(prompt) - 1 : end - 1] = ids[len(prompt) :]
            batch["loss_weights"][number, start + len(prompt) - 1 : end - 1] = 1.0
            batch["segments"][number, start:end] = segment
            batch["positions"][number, start:end] = torch.arange(end - start)
            batch["temperature"][number, start:end] = temperature
            start = end
    return batch


def pack(documents, width):
    rows = [[]]
    for document in documents:
        if sum(len(p) + len(a) for p, a, _ in rows[-1]) + len(document[0]) + len(document[1]) > width:
            rows.append([])
        rows[-1].append(document)
    return packed(rows, width)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True, "attention_bias": True}, {"qk_norm": "none"}])
def test_rollouts_and_training_agree_bit_for_bit_in_any_batch(change):
    cfg, p = build(torch.float32, **change)
    prompts = random_prompts(14, cfg, longest=90, seed=3)
    ways = [DRAWN, GREEDY] * 7
    found = Engine(cfg, p, seed=1, execution=model.INVARIANT).generate(prompts, ways, max_new_tokens=24)
    tight = EngineOptions(rows=3, chunk=20, page_size=8)
    again = Engine(cfg, p, seed=1, max_tokens=400, execution=model.INVARIANT, options=tight)
    for one, other in zip(found, again.generate(prompts, ways, max_new_tokens=24)):
        assert (one.ids, one.logprobs) == (other.ids, other.logprobs)

    outputs = make_outputs(cfg, model.INVARIANT)
    documents = [(prompt, one.ids, way.temperature or 1.0) for prompt, one, way in zip(prompts, found, ways)]
    for width, order in ((128, range(14)), (300, random.Random(0).sample(range(14), 14))):
        batch = pack([documents[i] for i in order], width)
        logs = outputs(p, batch)
        given = logs[batch["targets"] >= 0]
        expected = torch.tensor([x for i in order for x in found[i].logprobs])
        assert torch.equal(given, expected)
    plain = make_outputs(cfg)(p, batch)
    torch.testing.assert_close(plain, logs, rtol=0, atol=2e-5)  # without INVARIANT: the same model, other bits
    assert not torch.equal(plain, logs)


@pytest.mark.parametrize("temperature", [1e-320, 1e308])
def test_any_temperature_gives_a_finite_log_probability(temperature):
    cfg, p = build(torch.float32)
    engine = Engine(cfg, p, seed=1, execution=model.INVARIANT)
    (one,) = engine.generate([[1, 2]], SamplingParams(temperature), max_new_tokens=1)
    assert math.isfinite(one.logprobs[0])


def test_what_else_is_in_the_batch_and_ids_that_are_never_drawn_change_no_bit():
    """The batch has rows with filters, a penalty or a thinking budget beside plain ones. The embedding has more rows
    than the tokenizer has ids. Plain rows equal training, and each row equals itself alone, bit for bit."""
    cfg, p = build(torch.float32)
    prompts, known = random_prompts(6, cfg, seed=4), cfg.vocab_size - 30
    ways = [DRAWN, GREEDY, SamplingParams(0.8, top_p=0.9), DRAWN, SamplingParams(0.7, presence_penalty=1.0), DRAWN]
    budget = ThinkingBudget(2, 5, (4, 5))
    engine = Engine(cfg, p, seed=1, num_ids=known, execution=model.INVARIANT)
    asked = [
        engine.request(prompt, 12, sampling=way, stream=i, budget=budget if i == 3 else None)
        for i, (prompt, way) in enumerate(zip(prompts, ways))
    ]
    engine.run(rows := engine.submit(asked))
    plain = [i for i in range(6) if i not in (2, 3, 4)]
    documents = [(prompts[i], rows[i].tokens[len(prompts[i]) :], ways[i].temperature or 1.0) for i in plain]
    batch = pack(documents, 300)
    expected = make_outputs(cfg, model.INVARIANT, num_ids=known)(p, batch)[batch["targets"] >= 0]
    assert torch.equal(torch.tensor([x for i in plain for x in rows[i].logprobs]), expected)
    for row in rows:
        (alone,) = engine.submit([row.request])
        engine.run([alone])
        assert (alone.tokens, alone.logprobs) == (row.tokens, row.logprobs)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
def test_an_activation_is_the_same_wherever_it_stands(name, dtype):
    x = 5 * torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:4] = torch.tensor([0.0, -200.0, 200.0, -1e10])
    inputs = x.clone().requires_grad_()
    with invariant.FixedRows():
        whole = ACTIVATIONS[name](inputs)
        whole.sum().backward()
        for start in range(0, 2900, 37):
            for count in (1, 7, 17, 64, 97):
                part = slice(start, start + count)
                assert torch.equal(ACTIVATIONS[name](x[part].clone()), whole[part])
    plain = x.clone().requires_grad_()
    expected = ACTIVATIONS[name](plain)
    expected.sum().backward()
    # the tolerance is a few roundings of numbers up to 20, whose difference may be small
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(whole, expected, rtol=8 * eps, atol=64 * eps)
    torch.testing.assert_close(inputs.grad, plain.grad, rtol=8 * eps, atol=64 * eps)


def test_gradients_are_the_ordinary_ones():
    cfg, p = build(torch.float64, gradient_checkpointing="full")
    prompts = random_prompts(6, cfg, longest=60, seed=4)
    batch = pack([(prompt, [1 + i, 2, 3, 5], 0.7) for i, prompt in enumerate(prompts)], 128)
    objective = Objective("log_probs", token=lambda log_probs, batch: (-log_probs, {}))
    totals, grads = sum_totals(cfg, batch, ONE, objective), []
    for execution in (model.EAGER, model.INVARIANT):
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in p.items()}
        loss, _ = make_differentiated(cfg, objective, execution)(leaves, {}, MicroBatch(batch, batch), totals)
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    for ours, theirs in zip(*grads):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_attention_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 150, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    segments = torch.tensor([[1] * 70 + [2] * 5 + [3] * 75, [1] * 150]).int()
    mask = make_mask(segments, "invariant", 16)
    got = invariant.attend(q, k, v, *mask.ranges[:2])
    expected = attend_reference(q, k, v, AttentionMask(make_mask(segments, "reference", 16).allowed), 0.0, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_targets_that_are_no_token():
    log_probs = invariant.token_log_probs(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([-100, -5, 4]))
    assert log_probs[0] == 0
    assert log_probs[1].isnan()
    assert log_probs[2] < 0


def test_what_it_does_not_take_is_named():
    with pytest.raises(UserError, match="needs compile='off'"):
        model.Execution(invariant=True, compile="block", kernels=())
    cfg, p = build(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    with pytest.raises(UserError, match=r"model\.INVARIANT takes dense models"):
        Engine(cfg, p, execution=model.INVARIANT)
    with pytest.raises(UserError, match=r"config\.attention=invariant has no dropout"):
        model.make_forward(cfg.replace(attention_dropout=0.1), model.INVARIANT, dropout=True)
