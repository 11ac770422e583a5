"""The fused decoding pass against the one through the model's blocks; on a GPU, the engine against that on the CPU.

In fp32 the passes sum in different orders, so logits are compared to 1e-5, relative, by norm.
"""

import pytest
import torch
import torch.nn.functional as F

from qwen3f import model, params
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.fused import Constants, Places, fits, make_fused_decode
from qwen3f.infer.sampling import GREEDY, SamplingParams, log_prob, sample, stream_of, streams_at, uniform
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.model.rope import rope_tables
from tests.infer.test_engine import FILTERED, SAMPLED, random_prompts
from tests.model.hf_params import small_config

MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
CASES = {
    "dense": {},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "no qk_norm, heads 4/4": {"qk_norm": "none", "num_key_value_heads": 4},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "moe, every second layer": {**MOE, "decoder_sparse_step": 2},
}


def build(dtype=torch.float32, **changes):
    """A model of sizes that the kernels support: heads of 16."""
    cfg = small_config(**{"max_position_embeddings": 256, "head_dim": 16, "hidden_size": 64, **changes})
    return cfg, params.init_params(cfg.replace(initializer_range=0.2), 0, dtype=dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_a_pass_equals_the_blocks(case, dtype, tolerance):
    cfg, p = build(dtype, **CASES[case])
    lengths, page = [13, 0, 5], 4
    table = torch.tensor([[3, 1, 10, 7], [0, 0, 0, 0], [5, 12, 6, 8]])  # the second place is idle
    tokens = torch.randint(0, cfg.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    cache = model.init_cache(cfg, p, 12, page)
    forward = model.make_cached_forward(cfg)
    positions = torch.arange(14).expand(3, 14)
    real = positions < torch.tensor(lengths)[:, None]
    slots = torch.where(real, table.gather(1, positions // page) * page + positions % page, 0)
    _, cache = forward(
        p, cache, {"tokens": tokens[:, :14], "positions": positions, "slots": slots}, table=table, span=16
    )
    other = model.KVCache(*(tuple(x.clone() for x in side) for side in cache))

    place = torch.tensor(lengths)
    rotary = place - torch.tensor([4, 0, 2])  # two rows are behind pictures
    slot = (table.gather(1, place[:, None] // page)[:, 0] * page + place % page) * (place > 0)
    fed = tokens.gather(1, place[:, None])
    batch = {"tokens": fed, "positions": place[:, None], "slots": slot[:, None], "rotary": rotary[:, None]}
    hidden, cache = forward(p, cache, batch, table=table, span=16)
    expected = F.linear(hidden[:, 0], model.head_weight(cfg, p))

    streams = torch.tensor([stream_of(0, i) for i in range(3)])
    inv = torch.tensor([0.0, 1.0, 1 / 0.7])
    fed = torch.stack([fed[0, 0], fed[1, 0], torch.tensor(-3)])  # −3: the token that place 2 of the last pass drew
    last = torch.tensor([0, 0, int(tokens[2, 5])])
    decode = make_fused_decode(cfg, model.EAGER, cfg.vocab_size - 7)
    angles = (x[0] for x in rope_tables(cfg, torch.arange(16)[None], dtype))
    allowed = torch.arange(cfg.vocab_size) % 3 != 1
    drawn_by = uniform(streams_at(streams, place + 1))
    got, other = decode(
        p, other, Places(fed, place, rotary, drawn_by, inv, table.int()), last, Constants(*angles, allowed)
    )
    for row in (0, 2):
        assert (got.logits[row] - expected[row]).norm() <= tolerance * expected[row].norm()
    for old, new in zip(cache.keys + cache.values, other.keys + other.values):
        torch.testing.assert_close(new[1:], old[1:], rtol=10 * tolerance, atol=10 * tolerance)
    logits = got.logits[:, :-7].masked_fill(~allowed[:-7], float("-inf"))
    for row, way in ((0, GREEDY), (2, SamplingParams(0.7))):
        ids, log_probs = sample(
            logits[row : row + 1], way, streams_at(streams[row : row + 1], place[row : row + 1] + 1)
        )
        assert got.ids[row] == ids[0]
        assert got.log_probs[row] == pytest.approx(float(log_probs[0]), abs=1e-5)
    assert got.finite.all()


def test_what_the_kernels_take():
    cfg, _ = build()
    assert fits(cfg, torch.bfloat16)
    assert not fits(cfg, torch.float64)
    assert not fits(cfg.replace(qk_norm="l2"), torch.bfloat16)
    assert not fits(cfg.replace(head_dim=24), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_cuda_answers_equal_the_cpus_and_themselves_alone(case):
    cfg, p = build(**CASES[case])
    on_cuda = {path: leaf.cuda() for path, leaf in p.items()}
    prompts = random_prompts(24, cfg)
    ways = [GREEDY, SAMPLED, FILTERED] * 8
    expected = Engine(cfg, p, seed=2).generate(prompts, ways, max_new_tokens=12)
    tight = EngineOptions(rows=7, chunk=64, page_size=16)
    for options, room in ((EngineOptions(), 8192), (tight, 256)):
        found = Engine(cfg, on_cuda, seed=2, max_tokens=room, options=options).generate(
            prompts, ways, max_new_tokens=12
        )
        same = sum(a.ids == b.ids for a, b in zip(found, expected))
        assert same >= 22  # a different order of summation rarely changes a close choice
        for a, b in zip(found, expected):
            if a.ids == b.ids:
                assert torch.tensor(a.logprobs).sub(torch.tensor(b.logprobs)).abs().max() <= 1e-3


@pytest.mark.gpu
def test_on_cuda_new_weights_budgets_and_callbacks():
    cfg, p = build()
    p = {path: leaf.cuda() for path, leaf in p.items()}
    other = {path: leaf.flip(0) if leaf.dim() == 2 else leaf for path, leaf in p.items()}
    kept = {path: leaf.clone() for path, leaf in p.items()}
    prompts = random_prompts(5, cfg, seed=3)
    engine = Engine(cfg, p, max_tokens=4096)
    before = engine.generate(prompts, max_new_tokens=8)
    for weights in (other, p, other):
        engine.update(weights)
        after = engine.generate(prompts, max_new_tokens=8)
        fresh = Engine(cfg, weights, max_tokens=4096).generate(prompts, max_new_tokens=8)
        assert [one.ids for one in after] == [one.ids for one in fresh]
    assert [one.ids for one in before] != [one.ids for one in after]
    assert all(torch.equal(p[path], kept[path]) for path in p)  # the caller's tensors are unchanged
    budget = ThinkingBudget(3, end_id=90, closing_ids=(70, 90, 71))
    (free,) = engine.generate(prompts[:1], SAMPLED, max_new_tokens=8)
    seen = []
    (one,) = engine.generate(
        prompts[:1], SAMPLED, max_new_tokens=8, budget=budget, on_token=lambda *pair: seen.append(pair)
    )
    assert one.ids[:6] == [*free.ids[:3], 70, 90, 71]
    assert seen == list(zip(one.ids, one.logprobs))


@pytest.mark.gpu
def test_on_cuda_weights_change_while_a_result_of_a_graph_is_held():
    """The first update captures all graphs anew. A result that is still held keeps the old graphs' memory pool alive,
    and torch refuses to reuse such a pool. So the new graphs must get a new one."""
    cfg, p = build(**CASES["moe, every second layer"])
    p = {path: leaf.cuda() for path, leaf in p.items()}
    engine = Engine(cfg, p, max_tokens=4096)
    before = engine.generate(random_prompts(5, cfg), max_new_tokens=8)
    held = [graph.result for graph in engine._device._graphs._graphs.values()]
    assert held
    engine.update(p)
    after = engine.generate(random_prompts(5, cfg), max_new_tokens=8)
    assert [one.ids for one in after] == [one.ids for one in before]


def test_log_prob_is_that_of_the_row():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 0, 8, 3])
    torch.testing.assert_close(log_prob(logits, ids), logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
