"""An engine over two ranks, which are gloo processes, gives the answers of one device.

Answers keep log-probabilities in float32. They are compared to 1e-6 for a model in float64. For one in fp32 it is 2e-5,
since its logits of ±20 have a few roundings of 2e-6. Log-probabilities of a prefill pass are float64, to 1e-10.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend
from qwen3f import model, params
from qwen3f.errors import UserError
from qwen3f.infer import device, tensor_parallel
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.fused import Constants, Places, make_fused_decode
from qwen3f.infer.sampling import GREEDY
from qwen3f.infer.scheduler import Scheduler
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.model.rope import rope_tables
from sharding.axes import ONE, Axis, axes_of, make_mesh
from sharding.mesh import parse_mesh
from sharding.state import cut_params
from tests.infer.test_engine import FILTERED, SAMPLED, build, random_prompts
from tests.infer.test_fused import build as build_fused
from tests.sharding.worlds import run_processes
from tests.vision.hf_vl import vl_config
from tests.vision.test_engine import answers as pictured_answers
from tests.vision.test_engine import prompts as pictured_prompts

MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": (1,)}
MODELS = {
    "dense": {},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "moe, one layer dense": MOE,
}
# (options, max_tokens). The last one has so little room that rows are preempted.
OPTIONS = {"one a row": ({}, 0), "of 16": ({"rows": 8, "chunk": 64, "page_size": 16}, 4096)}
OPTIONS["few of 4 tokens"] = ({"rows": 6, "chunk": 32, "page_size": 4}, 72)
ASKED = {"max_new_tokens": [1 + i % 24 for i in range(18)], "stop_ids": (3, 30)}
NUM_IDS = 91  # of 96. The rest lie on the second rank and must never be drawn.


def tp2():
    return axes_of(make_mesh(parse_mesh("tp2"), "cpu")).tp


def shards(cfg, whole, tp):
    return cut_params(cfg, whole, tensor_parallel.generation_layout(cfg, tp))


def answers(engine, cfg, **more):
    """Answers to prompts of mixed lengths, many with the same beginning, with three ways of sampling."""
    found = engine.generate(random_prompts(18, cfg, seed=1), [SAMPLED, GREEDY, FILTERED] * 6, **ASKED, **more)
    return [(one.ids, one.logprobs, one.finish_reason) for one in found]


def assert_same(found, expected, tolerance=1e-6):
    assert [(ids, reason) for ids, _, reason in found] == [(ids, reason) for ids, _, reason in expected]
    for (_, got, _), (_, wanted, _) in zip(found, expected):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=0, atol=tolerance)


def engines(tp):
    """(case, cfg, engine) of every case. With tp of two ranks, the engine has this rank's shards."""
    everything, smallest = [*OPTIONS], [*OPTIONS][-1:]
    for kind, changes in MODELS.items():
        for dtype in (torch.float64, torch.float32) if kind == "dense" else (torch.float64,):
            cfg, whole = build(dtype, vocab_size=96, **changes)
            for pages in everything if kind == "dense" and dtype == torch.float64 else smallest:
                options, room = OPTIONS[pages]
                engine = Engine(
                    cfg, shards(cfg, whole, tp), seed=5, num_ids=NUM_IDS, max_tokens=room,
                    options=EngineOptions(**options, tp=tp),
                )  # fmt: skip
                yield (kind, dtype, pages), cfg, engine


def of_rank(rank):
    tp = tp2()
    found = {}
    for case, cfg, engine in engines(tp):
        assert engine._device._cache is None
        found[case] = answers(engine, cfg)
        assert engine._device._cache.keys[0].shape[1] == cfg.num_key_value_heads // 2
    found["budget"] = answers(engine, cfg, budget=ThinkingBudget(2, 90, (70, 90)))
    cfg, whole = build(vocab_size=96, seed=9)
    engine = Engine(cfg, shards(cfg, build(vocab_size=96)[1], tp), options=EngineOptions(tp=tp))
    answers(engine, cfg)
    engine.update(shards(cfg, whole, tp))
    found["update"] = answers(engine, cfg)
    found["smallest"] = tensor_parallel.smallest(7 - rank, tp, torch.device("cpu"))
    found["passes"] = passes(tp)
    found["not finite"] = not_finite(tp)
    found["pictures"] = with_pictures(tp)
    found["fused"] = {case: fused_pass(tp, *case) for case in FUSED_CASES}
    return found


def passes(tp):
    """Log-probabilities after each token of a prompt, from one prefill pass; float64 [T, V]."""
    cfg, whole = build(vocab_size=96)
    own = shards(cfg, whole, tp)
    tokens = torch.tensor([random_prompts(1, cfg)[0]])
    places = torch.arange(tokens.shape[1])[None]
    forward = model.make_cached_forward(cfg, layout=tensor_parallel.generation_layout(cfg, tp))
    batch = {"tokens": tokens, "positions": places, "slots": 64 + places}
    hidden, _ = forward(own, model.init_cache(cfg, own, 1, 64), batch, table=1, span=64)
    logits = torch.nn.functional.linear(hidden[0], model.head_weight(cfg, own))
    return tensor_parallel.whole_logits(logits, tp).log_softmax(-1)


def not_finite(tp):
    """The embedding of token 48, the first on the second rank, is NaN. Only the request with this token must fail."""
    cfg, whole = build(vocab_size=96)
    whole = {**whole, params.EMBED: whole[params.EMBED].index_fill(0, torch.tensor(48), float("nan"))}
    engine = Engine(cfg, shards(cfg, whole, tp), options=EngineOptions(tp=tp))
    found = engine.generate([[5, 48, 7], [5, 6, 8], [9, 10]], max_new_tokens=5)
    return [(one.ids, one.finish_reason) for one in found]


def with_pictures(tp):
    """Every rank has the whole vision tower. Chunks of the prompt begin and end inside images."""
    cfg = vl_config(vocab_size=98)
    whole = params.init_params(cfg.replace(initializer_range=0.3), 0, dtype=torch.float64)
    rows, _, pictures = pictured_prompts(cfg, ["tit", "t", "it"])
    options = EngineOptions(rows=3, chunk=5, page_size=4, tp=tp)
    return pictured_answers(Engine(cfg, shards(cfg, whole, tp), max_tokens=60, options=options), rows, pictures)


FUSED = {
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "moe, every second layer": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2,
    },
}  # fmt: skip


FUSED_CASES = [(case, how) for case in FUSED for how in ("formula", "kernels")]


def fused_pass(tp, case, how):
    """(logits, ids, log-probs, finite, cache) of four rows' second decoding pass. The third row is idle."""
    dtype = torch.float64 if how == "formula" else torch.float32
    cfg, whole = build_fused(dtype, vocab_size=96, num_hidden_layers=2, **FUSED[case])
    own = shards(cfg, whole, tp)
    cache = model.init_cache(cfg, own, 6, 4)
    table = torch.tensor([[3, 1], [2, 5], [0, 0], [4, 6]], dtype=torch.int32)
    decode = make_fused_decode(cfg, model.EAGER, NUM_IDS, tp)
    angles = (x[0] for x in rope_tables(cfg, torch.arange(8)[None], dtype))
    allowed = torch.arange(96) % 7 != 5
    constants = Constants(*angles, allowed)
    last = torch.tensor([11, 60, 0, 90])
    inverse = torch.tensor([0.0, 1.0, 0.0, 1 / 0.7])
    drawn_by = torch.tensor([0.5, 0.1, 0.5, 0.6], dtype=torch.float64)
    for place, tokens in enumerate(([1, 47, 0, 95], [-2, 2, 0, -1])):
        positions = torch.tensor([1, 1, 0, 1]) * (4 if place else 3)  # a page's last place, and the next one's first
        places = Places(torch.tensor(tokens), positions, positions, drawn_by, inverse, table)
        with backend.interpreted() if place and how == "kernels" else torch.no_grad():
            result, cache = decode(own, cache, places, last, constants)
        assert allowed[result.ids].all()
    logits = tensor_parallel.whole_logits(result.logits, tp)
    assert torch.equal(result.packed, torch.stack([x.double() for x in (result.ids, result.log_probs, result.finite)]))
    return logits, result.ids, result.log_probs, result.finite, [x[1:] for x in (*cache.keys, *cache.values)]


@pytest.fixture(scope="module")
def two():
    """The results of `of_rank` on each of two ranks."""
    return run_processes(of_rank, 2)


@pytest.mark.timeout(300)
def test_two_ranks_answer_as_one_device(two):
    for case, cfg, engine in engines(ONE.tp):
        expected = answers(engine, cfg)
        for found in two:
            assert_same(
                found[case], expected, 1e-6 if engine._device._params[params.EMBED].dtype == torch.float64 else 2e-5
            )
    assert {reason for *_, reason in expected} == {"stop", "length"}
    expected = answers(engine, cfg, budget=ThinkingBudget(2, 90, (70, 90)))
    for found in two:
        assert_same(found["budget"], expected)
    assert expected != answers(engine, cfg)


def test_rows_of_the_smallest_cache_are_preempted(monkeypatch):
    """Shows that the test above includes preemption."""
    preempted = []
    take = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda *a: preempted.append(a) or take(*a))
    *_, (_, cfg, engine) = engines(ONE.tp)
    answers(engine, cfg)
    assert preempted


def test_new_weights_leave_nothing_of_the_old_ones(two):
    cfg, whole = build(vocab_size=96, seed=9)
    expected = answers(Engine(cfg, whole), cfg)
    for found in two:
        assert_same(found["update"], expected)
        assert found["update"] != found["dense", torch.float64, "one a row"]


def test_log_probabilities_are_one_devices_to_1e_10(two):
    expected = passes(ONE.tp)
    for found in two:
        torch.testing.assert_close(found["passes"], expected, rtol=0, atol=1e-10)
    assert torch.equal(two[0]["passes"], two[1]["passes"])


def test_one_rows_nan_is_its_own(two):
    expected = not_finite(ONE.tp)
    assert [reason.partition(":")[0] for _, reason in expected] == ["error", "length", "length"]
    assert two[0]["not finite"] == two[1]["not finite"] == expected


def test_prompts_with_images_are_answered_as_on_one_device(two):
    assert two[0]["pictures"] == two[1]["pictures"] == with_pictures(ONE.tp)


@pytest.mark.parametrize("case, how", FUSED_CASES)
def test_the_fused_pass_equals_that_of_one_device(two, case, how):
    """Against the formulas on one device. how="kernels": kernels in Triton's interpreter, float32. how="formula": the
    formulas on two ranks, float64."""
    logits, ids, log_probs, finite, cache = fused_pass(ONE.tp, case, "formula in fp32" if how == "kernels" else how)
    rows, tolerance = [0, 1, 3], 1e-5 if how == "kernels" else 1e-12
    for rank in range(2):
        got = two[rank]["fused"][case, how]
        assert (got[0][rows] - logits[rows]).norm() <= tolerance * logits[rows].norm()
        assert torch.equal(got[1][rows], ids[rows])
        assert torch.equal(got[1], two[0]["fused"][case, how][1])
        torch.testing.assert_close(got[2][rows], log_probs[rows], rtol=0, atol=10 * tolerance)
        assert torch.equal(got[3], finite)
        for mine, whole in zip(got[4], cache):
            torch.testing.assert_close(mine, whole.chunk(2, 1)[rank], rtol=10 * tolerance, atol=10 * tolerance)
    assert finite.all()
    assert (ids[rows] < 48).any()  # ids of both ranks were drawn
    assert (ids[rows] >= 48).any()


def test_the_cache_is_as_large_as_the_smallest_rank_allows(two, monkeypatch):
    assert [found["smallest"] for found in two] == [6, 6]
    asked = []
    monkeypatch.setattr(device, "smallest", lambda number, tp, where: asked.append(number) or 640)
    cfg, whole = build()
    assert Engine(cfg, whole)._device.max_tokens == 640
    assert asked == [device.CPU_CACHE // model.kv_cache.bytes_of_token(cfg, whole)]


@pytest.mark.parametrize(
    "changes, size, words",
    [
        (
            {"vocab_size": 96},
            4,
            "tp=4 does not divide the model's 2 key/value heads; write --config.mesh=tp1 or tp2",
        ),
        ({}, 2, "tp=2 does not divide the model's 97 ids of the vocabulary; write --config.mesh=tp1"),
        (
            {"vocab_size": 96, **MOE, "moe_intermediate_size": 15},
            2,
            "15 columns of an expert.*; write --config.mesh=tp1",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes, size, words):
    cfg, whole = build(**changes)
    with pytest.raises(UserError, match=words):
        Engine(cfg, whole, options=EngineOptions(tp=Axis("tp", size)))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_two_gpus_answer_as_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    command = [sys.executable, "-m", "tests.infer.tensor_parallel_cases"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    try:
        assert process.wait(timeout=570) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # end ranks that hang, which would keep their GPUs
            os.killpg(process.pid, signal.SIGKILL)
