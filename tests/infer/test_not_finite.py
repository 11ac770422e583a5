"""A row with NaN fails alone: no other row changes, whatever pages they share or get after it.

The embedding of token 96 is NaN. A pass with this token may then compute NaN for every token of the same chunk.
"""

import itertools

import pytest
import torch

from qwen3f import params
from qwen3f.infer.engine import Engine, EngineOptions
from tests.infer.test_engine import build

BAD = [5, 6, 96, 9, 9, 9, 9, 9, 9, 7]
FAILED = "error: the model's logits are not finite at new token 1; check its weights"
OPTIONS = pytest.mark.parametrize(
    "options", [EngineOptions(rows=2), EngineOptions(rows=2, page_size=16), EngineOptions(rows=2, page_size=4, chunk=4)]
)


def broken(token=96):
    cfg, p = build()
    return cfg, {**p, params.EMBED: p[params.EMBED].index_fill(0, torch.tensor(token), float("nan"))}


def check(cfg, p, prompts, found, new=8):
    for prompt, one in zip(prompts, found, strict=True):
        if 96 in prompt:
            assert (one.finish_reason, one.ids) == (FAILED, [])
        else:
            alone = Engine(cfg, p, num_ids=90).generate([prompt], max_new_tokens=new)[0]
            assert (one.finish_reason, one.ids) == ("length", alone.ids)


@OPTIONS
@pytest.mark.parametrize("late", [False, True], ids=["", "read a pass late"])
def test_rows_that_begin_alike_are_answered(monkeypatch, options, late):
    """Rows that begin as the bad row does. They arrive in the same pass, while its first token is computed, or after
    its end. In the last case more than a page is the same."""
    cfg, p = broken()
    for prompts in ([[4], BAD, [5, 6, 8]], [BAD, [*BAD[:2], 8], [5, 6, 9]], [[7] * 21 + [96, 3], [7] * 23, [7] * 30]):
        engine = Engine(cfg, p, num_ids=90, max_tokens=512, options=options)
        monkeypatch.setattr(engine._device, "overlaps", late)
        check(cfg, p, prompts, engine.generate(prompts, max_new_tokens=8))
        check(cfg, p, prompts[::-1], engine.generate(prompts[::-1], max_new_tokens=8))
        engine._pool.check()


@OPTIONS
@pytest.mark.parametrize("steps", [1, 2])
def test_a_row_that_is_cancelled_early_leaves_clean_pages(options, steps):
    cfg, p = broken()
    engine = Engine(cfg, p, num_ids=90, max_tokens=64, options=options)
    rows = engine.submit([engine.request(BAD, 8)])
    for _ in range(steps):
        engine.step()
    engine.cancel(rows)
    prompts = [[8, 8, 8], [3] * 30]
    check(cfg, p, prompts, engine.generate(prompts, max_new_tokens=8))


def test_a_row_that_is_preempted_early_leaves_clean_pages():
    """Two older rows, which need 22 pages together, take pages of a bad row that is still being prefilled. The shorter
    one gets such a page. It attends over as many slots as the longer one, so masked slots take part."""
    cfg, p = broken()
    engine = Engine(cfg, p, num_ids=90, max_tokens=88, options=EngineOptions(rows=3, chunk=1, page_size=4))
    prompts = [[1] * 40, [1, 2, 3]]
    rows = engine.submit(engine.request(prompt, new) for prompt, new in zip(prompts, (24, 20)))
    while not rows[1].answered:
        engine.step()
    bad = engine.submit([engine.request([5, 96, *[9] * 24], 1)])
    cached = []
    while not rows[1].finish_reason:
        engine.step()
        cached.append(bad[0].cached)
    assert max(cached) > 4
    assert cached[-1] == 0
    engine.run([*rows, *bad])
    assert bad[0].finish_reason == FAILED
    for prompt, row in zip(prompts, rows):
        alone = Engine(cfg, p, num_ids=90).generate([prompt], max_new_tokens=row.answered)[0].ids
        assert row.finish_reason == "length"
        assert row.tokens[len(prompt) :] == alone


def test_new_weights_while_a_row_is_prefilled_find_clean_pages():
    cfg, good = build()
    bad = broken()[1]
    engine = Engine(cfg, bad, num_ids=90, max_tokens=64, options=EngineOptions(chunk=4))
    rows = engine.submit([engine.request(BAD, 8)])
    engine.step()
    engine.update(good)
    engine.cancel(rows)
    prompts = [[8, 8, 8], [3] * 30]
    found = engine.generate(prompts, max_new_tokens=8)
    assert [one.ids for one in found] == [
        Engine(cfg, good, num_ids=90).generate([prompt], max_new_tokens=8)[0].ids for prompt in prompts
    ]


@pytest.mark.parametrize("order", itertools.permutations([[5, 96, 6], [9, 10], [7] * 20, [8] * 3]), ids=str)
def test_padding_of_a_pass_reaches_no_other_row(order):
    """In a prefill pass a shorter chunk is padded, and the padding is written to page 0. Rows
    have page tables of different lengths. The padding of a table must not be page 0, or NaN there would reach a row."""
    cfg, p = broken()
    engine = Engine(cfg, p, num_ids=90, max_tokens=512, options=EngineOptions(page_size=4))
    check(cfg, p, order, engine.generate(order, max_new_tokens=4), new=4)


def test_a_cancelled_prefill_keeps_what_an_earlier_row_had_left():
    """The earlier row has drawn tokens from its pages, so they are known to be finite, and cancelling keeps them."""
    cfg, p = build()
    engine = Engine(cfg, p, max_tokens=256, options=EngineOptions(page_size=4, chunk=4))
    stem = list(range(20, 36))
    engine.generate([[*stem, 1]], max_new_tokens=2)
    rows = engine.submit([engine.request([*stem, *range(40, 60)], 4)])
    engine.step()
    assert 16 <= rows[0].cached < 30
    engine.cancel(rows)
    rows = engine.submit([engine.request([*stem, 3], 4)])
    engine.step()
    assert rows[0].answered == 1  # nothing had to be prefilled
