"""The engine: every answer is as if asked alone, whatever else is computed; stops, log-probabilities, new weights.

Answers are compared token by token, in float64 but for one test: other rows of a batch change a row's logits only by
rounding, which in float64 changes no choice.
"""

import random

import pytest
import torch

from qwen3f import model, params
from qwen3f.errors import UserError
from qwen3f.infer import device
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.request import Request, Row
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.thinking import ThinkingBudget
from tests.model.hf_params import small_config

SAMPLED = SamplingParams(temperature=0.8)
FILTERED = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, presence_penalty=0.5)


def build(dtype=torch.float64, seed=0, **changes):
    cfg = small_config(max_position_embeddings=128, **changes)
    return cfg, params.init_params(cfg.replace(initializer_range=0.3), seed, dtype=dtype)


def random_prompts(count, cfg, longest=40, seed=0):
    """Random prompts of mixed lengths. Many begin with the same tokens."""
    chance = random.Random(seed)
    stem = [chance.randrange(cfg.vocab_size) for _ in range(longest)]
    return [
        stem[: chance.randint(0, longest // 2)]
        + [chance.randrange(cfg.vocab_size) for _ in range(chance.randint(1, 20))]
        for _ in range(count)
    ]


class Letters:
    """A tokenizer whose ids are one printable character each; 50 and 51 are the two bytes of an "é"."""

    vocab_size, stop_ids = 97, (1,)

    def token_bytes(self, token, skip_special=False):
        return {50: b"\xc3", 51: b"\xa9"}.get(token, bytes([33 + token % 90]))


@pytest.mark.parametrize("pages", ["one a row", "few of 4 tokens", "of 16"])
def test_200_requests_equal_each_alone_in_fp32(pages):
    """Greedy requests of mixed lengths, many with the same beginning. Where pages are few, rows are also preempted.
    Every fourth answer is compared with the answer of an engine that computes nothing else."""
    cfg, p = build(torch.float32)
    prompts = random_prompts(200, cfg)
    lengths = [1 + i % 13 for i in range(200)]
    alone = [Engine(cfg, p).generate([a], max_new_tokens=n)[0].ids for a, n in zip(prompts[::4], lengths[::4])]
    options, room = {
        "one a row": (EngineOptions(rows=16, chunk=128), 0),
        "few of 4 tokens": (EngineOptions(rows=8, chunk=32, page_size=4), 120),
        "of 16": (EngineOptions(rows=64, chunk=300, page_size=16), 4096),
    }[pages]
    engine = Engine(cfg, p, max_tokens=room, options=options)
    found = engine.generate(prompts, max_new_tokens=lengths)
    assert [len(one.ids) for one in found] == lengths
    assert [one.ids for one in found[::4]] == alone
    assert [one.prompt_index for one in found] == list(range(200))
    assert {one.finish_reason for one in found} == {"length"}


def test_draws_depend_on_seed_stream_and_place_alone():
    cfg, p = build()
    prompts = random_prompts(12, cfg, seed=1)
    ways = [SAMPLED, GREEDY, FILTERED] * 4
    found = Engine(cfg, p, seed=5).generate(prompts, ways, max_new_tokens=10, n=2)
    small = Engine(cfg, p, seed=5, max_tokens=80, options=EngineOptions(rows=3, chunk=7, page_size=4))
    again = small.generate(prompts, ways, max_new_tokens=10, n=2)
    assert [one.ids for one in again] == [one.ids for one in found]
    assert [(one.prompt_index, one.sample_index) for one in found] == [(i, j) for i in range(12) for j in range(2)]
    alone = Engine(cfg, p, seed=5).generate(prompts[6:7], ways[6:7], max_new_tokens=10, streams=[13])
    assert alone[0].ids == found[13].ids
    assert Engine(cfg, p, seed=6).generate(prompts, ways, max_new_tokens=10, n=2)[0].ids != found[0].ids
    assert found[0].ids != found[1].ids
    assert found[2].ids == found[3].ids  # greedy


def test_results_that_are_read_a_pass_late_are_the_same(monkeypatch):
    """On a GPU the engine launches the next pass before it reads the results of the last; here the CPU does so too.
    Answers stay the same, with preemption, penalties, thinking budgets and stops."""
    cfg, p = build()
    prompts, ways = random_prompts(24, cfg, seed=1), [SAMPLED, GREEDY, FILTERED] * 8
    lengths = [1 + i % 12 for i in range(24)]
    asked = {"max_new_tokens": lengths, "stop_ids": (3, 30, 60), "budget": ThinkingBudget(4, 90, (70, 90))}
    expected = Engine(cfg, p).generate(prompts, ways, **asked)
    for options, room in ((EngineOptions(page_size=64), 0), (EngineOptions(rows=7, chunk=64, page_size=4), 200)):
        engine = Engine(cfg, p, max_tokens=room, options=options)
        monkeypatch.setattr(engine._device, "overlaps", True)
        found = engine.generate(prompts, ways, **asked)
        assert [(one.ids, one.finish_reason) for one in found] == [(one.ids, one.finish_reason) for one in expected]
    assert {one.finish_reason for one in expected} == {"stop", "length"}


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, SamplingParams(1.0, top_k=5)], ids=["drawn", "greedy", "top_k"])
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(sampling):
    cfg, p = build()
    prompts = random_prompts(6, cfg, seed=2)
    for one, prompt in zip(Engine(cfg, p).generate(prompts, sampling, max_new_tokens=12), prompts):
        tokens = torch.tensor([prompt + one.ids])
        logits = model.apply(cfg, p, {"tokens": tokens}).logits[0, len(prompt) - 1 : -1] / (sampling.temperature or 1)
        if sampling.top_k:
            kept = logits.topk(sampling.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kept, -torch.inf)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), expected.float(), rtol=0, atol=2e-6)


def test_new_weights_leave_nothing_of_the_old_ones():
    cfg, p = build()
    other = build(seed=9)[1]
    prompts = random_prompts(5, cfg, seed=3)
    engine = Engine(cfg, p)
    before = engine.generate(prompts, max_new_tokens=8)
    engine.update(other)
    after = engine.generate(prompts, max_new_tokens=8)
    assert [one.ids for one in after] == [one.ids for one in Engine(cfg, other).generate(prompts, max_new_tokens=8)]
    assert [one.ids for one in after] != [one.ids for one in before]
    expected = [one.ids for one in after]
    first = params.LAYERS + "self_attn.q_proj.weight"
    for wrong, words in (
        ({path: leaf.float() for path, leaf in p.items()}, r"update: model\.embed_tokens\.weight is torch\.float32"),
        ({**p, first: p[first][:1]}, r"update: .*q_proj\.weight has 1 tensors, the engine 3; make a new engine"),
        (
            {**p, first: (*p[first][:2], p[first][2, :-1])},
            r"update: .*q_proj\.weight is torch\.float64 \[\d+, \d+\] on cpu",
        ),
        ({path: leaf for path, leaf in p.items() if path != first}, r"q_proj\.weight has 0 tensors, the engine 3"),
    ):
        with pytest.raises(UserError, match=words):
            engine.update(wrong)
        assert [one.ids for one in engine.generate(prompts, max_new_tokens=8)] == expected


def test_new_weights_while_answers_are_on_their_way():
    cfg, p = build()
    other = build(seed=9)[1]
    engine = Engine(cfg, p)
    prompt = random_prompts(1, cfg, seed=3)[0]
    (row,) = engine.submit([engine.request(prompt, 10)])
    while row.answered < 4:
        engine.step()
    engine.update(other)
    engine.run([row])
    rest = Engine(cfg, other).generate([row.tokens[: len(prompt) + 4]], max_new_tokens=6)[0].ids
    assert row.tokens[len(prompt) + 4 :] == rest


def test_stops_budgets_and_callbacks():
    cfg, p = build()
    prompt = random_prompts(1, cfg, seed=4)[0]
    engine = Engine(cfg, p, tokenizer=Letters())
    (free,) = engine.generate([prompt], SAMPLED, max_new_tokens=30, stop_ids=())
    seen = []
    (one,) = engine.generate(
        [prompt], SAMPLED, max_new_tokens=30, stop_ids=(free.ids[7],), on_token=lambda *pair: seen.append(pair)
    )
    end = free.ids.index(free.ids[7])
    assert (one.ids, one.finish_reason) == (free.ids[: end + 1], "stop")
    assert seen == list(zip(one.ids, one.logprobs))
    budget = ThinkingBudget(3, end_id=90, closing_ids=(70, 90, 71))
    (one,) = engine.generate([prompt], SAMPLED, max_new_tokens=8, stop_ids=(), budget=budget)
    assert one.ids[:6] == [*free.ids[:3], 70, 90, 71]
    logits = model.apply(cfg, p, {"tokens": torch.tensor([prompt + one.ids])}).logits[0, len(prompt) + 2]
    assert one.logprobs[3] == pytest.approx(float(logits.log_softmax(-1)[70]), abs=1e-5)
    assert engine.generate([prompt], max_new_tokens=0)[0].finish_reason == "length"


def test_stop_texts_are_found_across_tokens_and_half_characters_are_none():
    cfg, p = build()
    prompt = random_prompts(1, cfg, seed=5)[0]
    engine = Engine(cfg, p, tokenizer=Letters())
    (free,) = engine.generate([prompt], SAMPLED, max_new_tokens=30, stop_ids=())
    text = "".join(chr(33 + i % 90) for i in free.ids)
    (one,) = engine.generate([prompt], SAMPLED, max_new_tokens=30, stop_ids=(), stop_texts=("never", text[10:13]))
    assert one.finish_reason == "stop"
    assert len(one.ids) == text.index(text[10:13]) + 3
    halves = ThinkingBudget(0, end_id=90, closing_ids=(50, 51, 90))  # an é in two tokens
    (one,) = engine.generate([prompt], max_new_tokens=9, stop_ids=(), stop_texts=("é",), budget=halves)
    assert one.ids == [50, 51]
    (one,) = engine.generate([prompt], max_new_tokens=1, stop_ids=(), stop_texts=("Ã",), budget=halves)
    assert (one.ids, one.finish_reason) == ([50], "length")


def test_of_a_long_answer_only_its_end_is_searched_for_stop_texts():
    cfg, p = build()
    engine, seen = Engine(cfg, p, tokenizer=Letters()), []
    engine.generate(
        [[3, 4]],
        SAMPLED,
        max_new_tokens=40,
        stop_ids=(),
        stop_texts=("never", "no"),
        on_token=lambda *_: seen.extend(len(text) for _, text in engine._decoders.values()),
    )
    assert max(seen) == len("never") - 1


def test_rows_that_have_ended_are_not_looked_at_again_with_each_pass():
    cfg, p = build()
    engine, looks = Engine(cfg, p), []
    rows = engine.submit([engine.request([3, 4], 1) for _ in range(50)])
    engine.run(rows)
    last = engine.submit([engine.request([3, 4], 30)])

    class Ended:
        @property
        def finish_reason(self):
            looks.append(1)
            return "length"

    engine.run([*(Ended() for _ in rows), *last])
    assert last[0].answered == 30
    assert len(looks) == len(rows)


def test_a_presence_penalty_looks_at_each_token_of_an_answer_once():
    class Watched(list):
        looked = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Watched.looked += len(found) if isinstance(place, slice) else 1
            return found

    row = Row(Request((1, 2), 2000), 0)
    row.tokens = Watched(row.tokens)
    for number in range(1000):
        row.tokens.append(7 + number % 3)
        assert list(row.different) == [7, 8, 9][: number + 1]
    assert Watched.looked == 1000


def test_one_rows_nan_is_its_own():
    cfg, p = build()
    p = {**p, params.EMBED: p[params.EMBED].index_fill(0, torch.tensor(96), float("nan"))}
    prompts = [[5, 6, 96, 7], [5, 6, 8], [9, 10], [5, 6, 8, 11], [5, 6, 12]]
    for options in (EngineOptions(rows=2), EngineOptions(rows=2, page_size=4)):
        engine = Engine(cfg, p, num_ids=90, max_tokens=80, options=options)
        bad, *good = engine.generate(prompts, max_new_tokens=8)
        assert bad.finish_reason == "error: the model's logits are not finite at new token 1; check its weights"
        assert bad.ids == []
        for prompt, one in zip(prompts[1:], good):
            assert one.ids == Engine(cfg, p, num_ids=90).generate([prompt], max_new_tokens=8)[0].ids
            assert one.finish_reason == "length"


def test_cancelled_rows_end_and_give_their_room_back():
    cfg, p = build()
    engine = Engine(cfg, p, max_tokens=64, options=EngineOptions(page_size=4))
    rows = engine.submit([engine.request([3, 4, 5], 20), engine.request([6], 10), engine.request([7] * 9, 30)])
    for _ in range(4):
        engine.step()
    engine.cancel(rows[:1])
    engine.run(rows)
    assert [row.finish_reason for row in rows] == ["cancelled", "length", "length"]
    assert 0 < rows[0].answered < 20
    assert not engine.step()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"prompts": [[1] * 129]}, "a prompt has 129 tokens and the model's max_position_embeddings is 128"),
        ({"prompts": [[97]]}, "a prompt has token id 97, ids of this model are 0 to 96"),
        ({"prompts": [[-1]]}, "a prompt has token id -1"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative"),
        ({"max_new_tokens": 200}, "a request of 202 tokens, its answer included, does not fit the cache of 128"),
        ({"stop_ids": (97,)}, r"stop_ids: \[97\] must be token ids"),
        ({"stop_texts": ("x",)}, "stop_texts need the tokenizer"),
        ({"stop_texts": "x", "tokenizer": Letters()}, "stop_texts: 'x' must be a list of texts"),
        ({"budget": ThinkingBudget(1, 99, (99,))}, r"budget: \[99\] must be token ids"),
        ({"prompts": [[1.5]]}, "a prompt must be token ids"),
        ({"n": 0}, "n must be at least 1 answer to a prompt, got 0"),
        ({"sampling": [GREEDY, GREEDY]}, "sampling has 2 values for 1 prompts"),
        ({"seed": 2**63}, r"seed must be a whole number from -2\^63 to 2\^63 - 1, got 9223372036854775808"),
        ({"streams": [-(2**63) - 1]}, "stream must be a whole number from"),
        ({"streams": [1, 2]}, "streams has 2 values for 1 prompts with 1 answers each"),
    ],
)
def test_bad_requests_are_named_before_anything_is_computed(change, words):
    cfg, p = build()
    asked = {"prompts": [[1, 2]], "sampling": GREEDY, "max_new_tokens": 4, **change}
    engine = Engine(cfg, p, max_tokens=128, tokenizer=asked.pop("tokenizer", None))
    with pytest.raises(UserError, match=words):
        engine.generate(asked.pop("prompts"), asked.pop("sampling"), **asked)
    assert engine.generate([[1, 2]], max_new_tokens=2)[0].finish_reason == "length"  # it works on


def test_options_that_cannot_work_are_named():
    cfg, p = build()
    with pytest.raises(UserError, match="seed must be a whole number from"):
        Engine(cfg, p, seed=2**64)
    for option in ("rows", "chunk"):
        with pytest.raises(UserError, match=f"EngineOptions.{option} must be at least 1, got 0"):
            EngineOptions(**{option: 0})
    with pytest.raises(UserError, match=r"EngineOptions\.page_size must be at least 0, got -1"):
        EngineOptions(page_size=-1)
    with pytest.raises(UserError, match="max_tokens must be a number of tokens"):
        Engine(cfg, p, max_tokens=-5)
    assert Engine(cfg, p).generate([], max_new_tokens=3) == []
    assert Engine(cfg, p).generate(torch.tensor([[1, 2]]), max_new_tokens=3)[0].finish_reason == "length"


@pytest.mark.parametrize("more", [{}, {"qk_norm": "none"}], ids=["", "no qk_norm"])
def test_a_mixture_of_experts_answers_as_alone(more):
    cfg, p = build(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, mlp_only_layers=(1,), **more)
    prompts = random_prompts(7, cfg, seed=6)
    found = Engine(cfg, p, options=EngineOptions(rows=3)).generate(prompts, max_new_tokens=6)
    for prompt, one in zip(prompts, found):
        assert one.ids == Engine(cfg, p).generate([prompt], max_new_tokens=6)[0].ids


def test_a_longer_request_keeps_the_cache_as_small_as_was_asked():
    """Each row has one page. A longer request needs longer pages, and as many of them as before would exceed
    max_tokens. So all rows start over in fewer, longer pages. Their answers do not change."""
    cfg, p = build()
    prompts = random_prompts(9, cfg, longest=20, seed=7)
    expected = [Engine(cfg, p).generate([a], SAMPLED, max_new_tokens=20, streams=[i])[0] for i, a in enumerate(prompts)]
    engine = Engine(cfg, p, max_tokens=8 * 64)
    rows = engine.submit(engine.request(a, 20, sampling=SAMPLED, stream=i) for i, a in enumerate(prompts))
    for _ in range(8):
        engine.step()
    assert any(row.answered for row in rows)
    rows += engine.submit([engine.request(prompts[0], 100 - len(prompts[0]), sampling=SAMPLED)])
    assert (engine._pool.count, engine._pool.size) == (4, 128)
    engine.run(rows)
    engine._pool.check()
    for row, one in zip(rows, expected):
        assert row.tokens[len(row.request.prompt) :] == one.ids
    assert rows[-1].tokens[: len(rows[0].tokens)] == rows[0].tokens


def passes_of_32(engine, monkeypatch):
    """(the number of passes that 32 short prompts take, their answers)."""
    launched, launch = [], engine._device.launch
    with monkeypatch.context() as patch:
        patch.setattr(engine._device, "launch", lambda *plan: launched.append(None) or launch(*plan))
        found = engine.generate([[i + 1, 2] for i in range(32)], max_new_tokens=8)
    return len(launched), [one.ids for one in found]


def test_a_long_request_makes_later_short_ones_no_slower(monkeypatch):
    """Each row has one page. The cache holds 32 short rows, or one row of 2048 tokens. Short requests take as many
    passes as before after a long request was refused, answered or cancelled. They take more only while it runs."""
    cfg, p = build(num_hidden_layers=1)
    engine = Engine(cfg, p, max_tokens=2048)
    expected = passes_of_32(engine, monkeypatch)
    assert expected[0] == 9
    with pytest.raises(UserError, match="does not fit the cache of 2048"):
        engine.generate([[1]], max_new_tokens=10**6)
    assert passes_of_32(engine, monkeypatch) == expected
    engine.generate([[1]], max_new_tokens=2000, stop_ids=tuple(range(97)))
    assert engine._pool.size == 2048
    assert passes_of_32(engine, monkeypatch) == expected
    rows = engine.submit([engine.request([3, 4, 5], 600)])
    for _ in range(9):
        engine.step()
    passes, found = passes_of_32(engine, monkeypatch)
    assert engine._pool.size == 640  # room for three pages: the long row and two others at a time
    assert found == expected[1]
    assert passes > 9
    engine.cancel(rows)
    assert passes_of_32(engine, monkeypatch) == expected
    engine._pool.check()


def test_a_shared_cache_grows_with_what_is_asked(monkeypatch):
    """Without max_tokens the cache is as large as requests need. When it grows, open rows continue in the new one."""
    monkeypatch.setattr(device, "GPU_LEAST", 1 << 19)
    cfg, p = build()
    prompts = random_prompts(12, cfg)
    expected = [Engine(cfg, p).generate([a], SAMPLED, max_new_tokens=20, streams=[i])[0] for i, a in enumerate(prompts)]
    engine = Engine(cfg, p, options=EngineOptions(page_size=16))
    rows, pages = [], []
    for number in range(0, 12, 4):
        asked = prompts[number : number + 4]
        rows += engine.submit([engine.request(a, 20, sampling=SAMPLED, stream=number + i) for i, a in enumerate(asked)])
        pages.append(engine._pool.count)
        for _ in range(5):
            engine.step()
    engine.run(rows)
    assert [row.tokens[len(row.request.prompt) :] for row in rows] == [one.ids for one in expected]
    assert pages[0] < pages[-1] < 200
