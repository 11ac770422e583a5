"""Generation against transformers' generate and against an argmax loop without a cache; rows, stops, budgets, errors.

Greedy answers are compared token by token in fp32. This is safe: the best two logits are at least 1.8e-4 apart in every
step of every case, and different orders of summation change a logit by 1e-5.
"""

import random

import pytest
import torch

from qwen3f import model
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine
from qwen3f.infer.generate import _in_step, generate, stream
from qwen3f.infer.request import Request, Row
from qwen3f.infer.sampling import NON_THINKING
from qwen3f.infer.thinking import ThinkingBudget
from tests.model.hf_params import Widen, from_hf, hf_model, small_config

NEW = 64
CASES = {
    "dense": {},
    "tied, heads 3/1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": (1,)},
}
LENGTHS = (9, 4, 1)


def build(**changes):
    cfg = small_config(max_position_embeddings=128, **changes)
    hf = hf_model(cfg)
    p = from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()})
    tokens = torch.randint(2, cfg.vocab_size, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(4))
    return cfg, p, hf, tokens


def hf_generate(hf, tokens, mask, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, **options}
    return hf.generate(tokens, attention_mask=mask, **options)


def left_padded(tokens, fill=0):
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, tokens, fill), mask.long()


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers_and_no_cache(case):
    cfg, p, hf, tokens = build(**CASES[case])
    got = generate(cfg, p, tokens, max_new_tokens=NEW)
    assert torch.equal(got, hf_generate(hf, tokens, torch.ones_like(tokens)))
    grown = tokens
    for _ in range(NEW):
        grown = torch.cat([grown, model.apply(cfg, p, {"tokens": grown}).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, grown)
    assert len(set(got[0, -NEW:].tolist())) > 5  # not one token over and over


def drawn(number):
    """Sizes and kind of a random model, from the seed `number`: dense or MoE, tied or not, with YaRN or without."""
    chance = random.Random(number)
    kv = chance.choice((1, 2, 3))
    changes = {
        "hidden_size": 8 * chance.randint(3, 9),
        "num_hidden_layers": chance.randint(1, 4),
        "num_key_value_heads": kv,
        "num_attention_heads": kv * chance.choice((1, 2, 4)),
        "head_dim": chance.choice((8, 16, 24)),
        "intermediate_size": chance.randint(30, 90),
        "vocab_size": chance.randint(50, 200),
        "tie_word_embeddings": chance.random() < 0.5,
        "rope_theta": chance.choice((1e3, 1e4, 1e6)),
    }
    if chance.random() < 0.4:
        scaling = {"factor": chance.choice((2.0, 4.0)), "original_max_position_embeddings": 32}
        changes["rope_scaling"] = {"rope_type": "yarn", **scaling}
    if chance.random() < 0.5:
        experts = chance.randint(3, 8)
        changes |= {"num_experts": experts, "num_experts_per_tok": chance.randint(1, experts)}
        changes |= {"moe_intermediate_size": chance.randint(8, 40), "norm_topk_prob": chance.random() < 0.5}
    return changes


@pytest.mark.parametrize("number", [*range(6), *(pytest.param(n, marks=pytest.mark.nightly) for n in range(6, 20))])
def test_greedy_equals_transformers_for_random_models(number):
    """float64 on both sides, so that the order of summation changes no choice."""
    cfg = small_config(**{**drawn(number), "max_position_embeddings": 128})
    hf = hf_model(cfg, number, torch.float64)
    p = from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()})
    tokens = torch.randint(2, cfg.vocab_size, (3, 7), generator=torch.Generator().manual_seed(number))
    with Widen():
        expected = hf_generate(hf, tokens, torch.ones_like(tokens))
    assert torch.equal(generate(cfg, p, tokens, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("case", CASES)
def test_left_padded_rows_equal_transformers_and_themselves_alone(case):
    cfg, p, hf, tokens = build(**CASES[case])
    padded, mask = left_padded(tokens)
    got = generate(cfg, p, padded, max_new_tokens=NEW, prompt_lengths=LENGTHS)
    assert torch.equal(got, hf_generate(hf, padded, mask))
    for row, length in enumerate(LENGTHS):
        alone = generate(cfg, p, tokens[row : row + 1, -length:], max_new_tokens=NEW)
        assert torch.equal(got[row, -NEW:], alone[0, -NEW:])
    elsewhere, _ = left_padded(tokens, fill=-100)
    again = generate(cfg, p, elsewhere, max_new_tokens=NEW, prompt_lengths=torch.tensor(LENGTHS))
    assert torch.equal(again[:, -NEW:], got[:, -NEW:])


SAMPLED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.5}


def test_draws_follow_seed_request_and_position_alone():
    cfg, p, _, tokens = build()
    got = generate(cfg, p, tokens, max_new_tokens=16, seed=3, prompt_lengths=LENGTHS, **SAMPLED)
    assert torch.equal(got, generate(cfg, p, tokens, max_new_tokens=16, seed=3, prompt_lengths=LENGTHS, **SAMPLED))
    for row, length in enumerate(LENGTHS):
        one = tokens[row : row + 1, -length:]
        alone = generate(cfg, p, one, max_new_tokens=16, seed=3, request_ids=[row], **SAMPLED)
        assert torch.equal(alone[0, -16:], got[row, -16:])
    same = tokens[:1].repeat(8, 1)
    answers = generate(cfg, p, same, max_new_tokens=8, temperature=1.0)[:, -8:]
    assert len({tuple(a) for a in answers.tolist()}) == 8  # request ids differ
    named = generate(cfg, p, same, max_new_tokens=8, temperature=1.0, request_ids=[5] * 8)[:, -8:]
    assert len({tuple(a) for a in named.tolist()}) == 1
    assert not torch.equal(generate(cfg, p, tokens, max_new_tokens=16, seed=4, prompt_lengths=LENGTHS, **SAMPLED), got)


def test_ids_beyond_the_tokenizer_are_never_chosen():
    cfg, p, _, tokens = build()
    free = generate(cfg, p, tokens, max_new_tokens=30, presence_penalty=1.0)[:, -30:]
    assert free.max() >= 60
    for options in ({"temperature": 2.0}, {"presence_penalty": 1.0}):
        out = generate(cfg, p, tokens, max_new_tokens=30, num_ids=60, stop_ids=[80], pad_id=96, **options)
        assert out[:, -30:].max() < 60


def test_a_step_copies_no_whole_answers():
    class Watched(list):
        copied = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Watched.copied += len(found) if isinstance(place, slice) else 0
            return found

    rows = [Row(Request((1, 2), 100), 0), Row(Request((1,), 100), 1)]
    for row, answer in zip(rows, ([5] * 100, [6] * 10)):
        row.tokens, row.finish_reason = Watched([*row.tokens, *answer]), "length"
    out = torch.stack(list(_in_step(None, rows, torch.device("cpu"), 9)))
    assert out.T.tolist() == [[5] * 100, [6] * 10 + [9] * 90]
    assert Watched.copied == 0


def test_presence_penalty_forbids_what_was_said():
    cfg, p, _, tokens = build()
    p = {**p, "lm_head.weight": p["lm_head.weight"] * 0.05}  # logits of ±0.5: a penalty of 2 always wins
    out = generate(cfg, p, tokens, max_new_tokens=40, presence_penalty=2.0)[:, -40:]
    assert all(len(set(row)) == 40 for row in out.tolist())
    assert any(len(set(row)) < 40 for row in generate(cfg, p, tokens, max_new_tokens=40)[:, -40:].tolist())


def test_stop_ids_end_rows_and_then_the_stream():
    cfg, p, hf, tokens = build()
    free = generate(cfg, p, tokens, max_new_tokens=NEW)[:, -NEW:]
    stops = [int(free[0, 3]), int(free[1, 10]), int(free[2, 6])]
    got = generate(cfg, p, tokens, max_new_tokens=NEW, stop_ids=stops, pad_id=1)
    expected = hf_generate(hf, tokens, torch.ones_like(tokens), eos_token_id=stops, pad_token_id=1)
    steps = expected.shape[1] - tokens.shape[1]
    assert 1 < steps < NEW
    assert torch.equal(got[:, : expected.shape[1]], expected)
    assert (got[:, expected.shape[1] :] == 1).all()
    assert got.shape == (3, tokens.shape[1] + NEW)
    ids = list(stream(cfg, p, tokens, max_new_tokens=NEW, stop_ids=stops))
    assert len(ids) == steps
    first = next(t for t, i in enumerate(ids) if int(i[0]) in stops)
    assert all(int(i[0]) == stops[0] for i in ids[first + 1 :])  # the first stop id is the default padding
    assert torch.equal(generate(cfg, p, tokens, max_new_tokens=0), tokens)


def test_thinking_budget_closes_exactly_the_rows_that_think_on():
    cfg, p, _, tokens = build()
    free = generate(cfg, p, tokens, max_new_tokens=20)[:, -20:]
    end = int(free[1, 2])  # row 1 ends its thought by itself
    assert all(end not in free[row, :6] for row in (0, 2))
    closing = (90, 91, end, 92)
    got = generate(cfg, p, tokens, max_new_tokens=20, budget=ThinkingBudget(6, end, closing))[:, -20:]
    assert torch.equal(got[1], free[1])
    for row in (0, 2):
        assert torch.equal(got[row, :6], free[row, :6])
        assert got[row, 6:10].tolist() == list(closing)
        prompt = torch.cat([tokens[row], got[row, :10]])[None]
        assert torch.equal(got[row, 10:], generate(cfg, p, prompt, max_new_tokens=10)[0, -10:])
    stopped = generate(
        cfg, p, tokens, max_new_tokens=20, budget=ThinkingBudget(6, end, closing), stop_ids=[int(free[0, 1])], pad_id=0
    )[:, -20:]
    assert (stopped[0, 2:] == 0).all()  # a row that has stopped gets no closing sentence
    truncated = generate(cfg, p, tokens, max_new_tokens=8, budget=ThinkingBudget(6, end, closing))[:, -8:]
    assert torch.equal(truncated, got[:, :8])


def test_streaming_yields_what_generate_returns():
    cfg, p, _, tokens = build()
    ids = torch.stack(list(stream(cfg, p, tokens, max_new_tokens=7, sampling=NON_THINKING, seed=2)), 1)
    whole = generate(
        cfg, p, tokens, max_new_tokens=7, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, seed=2
    )
    assert torch.equal(whole, torch.cat([tokens, ids], 1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, "a prompt is empty"),
        ({"prompt_lengths": [3, 0, 2]}, "a prompt is empty"),
        ({"prompt_lengths": [3, 10, 2]}, "10 is more than the 9 columns"),
        ({"prompt_lengths": [3, 3]}, "one number for each of the 3 rows"),
        ({"request_ids": [1]}, "one number for each of the 3 rows"),
        ({"pictures": [None]}, "pictures has 1 entries for 3 rows; give one for each"),
        (
            {"tokens": torch.zeros(1, 129, dtype=torch.int64)},
            "129 tokens and the model's max_position_embeddings is 128",
        ),
        ({"tokens": torch.tensor([[3, 97]])}, "token id 97, ids of this model are 0 to 96"),
        ({"tokens": torch.tensor([[3, -1]])}, "token id -1"),
        ({"max_new_tokens": -1}, "must not be negative"),
        ({"stop_ids": [3, 97]}, r"stop_ids: \[3, 97\]"),
        ({"pad_id": -1}, "pad_id: -1"),
        ({"budget": ThinkingBudget(3, 98, (98,))}, r"budget: \[98\]"),
        ({"num_ids": 98}, r"num_ids must lie in 1..vocab_size \(97\), got 98"),
    ],
)
def test_bad_input_is_named_at_once(change, words):
    cfg, p, _, tokens = build()
    with pytest.raises(UserError, match=words):
        stream(cfg, p, **{"tokens": tokens, "max_new_tokens": 2, **change})  # raises before it is iterated


def test_a_model_of_scores_makes_no_text():
    cfg, p, _, tokens = build()
    with pytest.raises(UserError, match="is a reward model.*--config.init_from=W"):
        stream(cfg.replace(scalar_head=True), p, tokens, max_new_tokens=2)


def test_logits_that_are_not_finite_are_an_error():
    cfg, p, _, tokens = build()
    broken = {**p, "lm_head.weight": p["lm_head.weight"].index_fill(0, torch.tensor(5), float("nan"))}
    with pytest.raises(UserError, match="not finite at new token 1"):
        generate(cfg, broken, tokens, max_new_tokens=3, temperature=1.0)


@pytest.mark.gpu
def test_on_cuda():
    """float64: the same answers as on the CPU, in eager mode and with the decoding pass as one compiled graph."""
    cfg, p, _, tokens = build()
    p = {path: leaf.double() for path, leaf in p.items()}
    on_cuda = {path: leaf.cuda() for path, leaf in p.items()}
    for options in ({}, SAMPLED):
        expected = generate(cfg, p, tokens, max_new_tokens=NEW, prompt_lengths=LENGTHS, **options)
        for mode in ("off", "step"):
            execution = model.Execution(compile=mode)
            options = {**options, "prompt_lengths": LENGTHS, "execution": execution}
            got = generate(cfg, on_cuda, tokens.cuda(), max_new_tokens=NEW, **options)
            assert torch.equal(got.cpu(), expected)


def test_a_forced_tokens_log_probability_is_over_the_ids_that_can_be_drawn():
    cfg, p, _, tokens = build()
    prompt = tokens[0, :9].remainder(50).tolist()
    engine = Engine(cfg, p, num_ids=50)
    (free,) = engine.generate([prompt], max_new_tokens=1, stop_ids=())
    budget = ThinkingBudget(0, end_id=49, closing_ids=(free.ids[0], 49))
    (one,) = engine.generate([prompt], max_new_tokens=2, stop_ids=(), budget=budget)
    assert one.ids == [free.ids[0], 49]
    assert one.logprobs[0] == pytest.approx(free.logprobs[0], abs=1e-6)
