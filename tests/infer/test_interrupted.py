"""No row loses a token if a pass is stopped half-way: by Ctrl-C, by too little memory, or by an on_token that raises.

float64, so that a row's tokens are those of an engine that computes this row alone.
"""

import random

import pytest

from qwen3f.errors import UserError
from qwen3f.infer.device import Device, Pending
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.pages import PagePool
from qwen3f.infer.scheduler import Scheduler
from tests.infer.test_engine import FILTERED, SAMPLED, build, random_prompts

STEM = [11, 12, 13, 14, 15, 16, 17, 18]


def failing(function, error, chance=None):
    """The function, made to raise `error`. Without `chance`: at the first call only, before it does anything. With it:
    at a fifth of the calls, half of them before and half of them after its work."""
    left = [error]

    def call(*arguments, **named):
        if not left or (chance is not None and chance.random() > 0.2):
            return function(*arguments, **named)
        if chance is None:
            left.clear()
        elif chance.random() < 0.5:
            function(*arguments, **named)
        raise error

    return call


def test_all_rows_of_a_pass_may_cancel_themselves():
    """Each call of on_token would otherwise make the next one within itself."""
    cfg, p = build()
    engine, told = Engine(cfg, p), []

    def asked(number):
        def cancel(*_):
            told.append(number)
            engine.cancel([rows[number]])

        return engine.request([1, 2, number % 90], 5, stream=number, on_token=cancel)

    rows = engine.submit([asked(number) for number in range(400)])
    engine.run(rows)
    assert {row.finish_reason for row in rows} == {"cancelled"}
    assert sorted(told) == list(range(400))


@pytest.mark.parametrize("options, room", [(EngineOptions(rows=4), 0), (EngineOptions(rows=4, page_size=16), 256)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_page_whose_copy_never_ran_is_offered_to_no_row(monkeypatch, options, room, error):
    cfg, p = build()
    engine = Engine(cfg, p, max_tokens=room, options=options)
    engine.generate([[*STEM, 20]], max_new_tokens=5)
    monkeypatch.setattr(engine._device, "launch", failing(engine._device.launch, error))
    with pytest.raises(error):
        engine.generate([[*STEM[:6], 21, 22]], max_new_tokens=12)
    assert not engine.step()  # no row of the failed call is left
    for prompt in ([*STEM[:6], 21, 22], [*STEM[:6], 21, 22, 30]):
        expected = Engine(cfg, p).generate([prompt], max_new_tokens=6)[0]
        assert engine.generate([prompt], max_new_tokens=6)[0].ids == expected.ids


PLACES = [
    (PagePool, "take"),
    (PagePool, "match"),
    (Scheduler, "plan"),
    (Scheduler, "advance"),
    (Scheduler, "finish"),
    (Device, "launch"),
    (Device, "_launch_prefill"),
    (Device, "_launch_decode"),
    (Pending, "read"),
]


@pytest.mark.parametrize("late", [False, True], ids=["", "read a pass late"])
@pytest.mark.parametrize("owner, name", PLACES, ids=[name for _, name in PLACES])
def test_rows_go_on_wherever_a_step_was_stopped(monkeypatch, owner, name, late):
    cfg, p = build(num_hidden_layers=1)
    prompts, ways = random_prompts(12, cfg, seed=1), [SAMPLED, FILTERED, FILTERED] * 4
    expected = Engine(cfg, p).generate(prompts, ways, max_new_tokens=9)
    engine = Engine(cfg, p, max_tokens=160, options=EngineOptions(rows=5, chunk=24, page_size=8))
    monkeypatch.setattr(engine._device, "overlaps", late)
    rows = engine.submit(
        engine.request(prompt, 9, sampling=way, stream=i) for i, (prompt, way) in enumerate(zip(prompts, ways))
    )
    stopped = 0
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), KeyboardInterrupt, random.Random(name)))
        for _ in range(400):
            try:
                if not engine.step():
                    break
            except KeyboardInterrupt:
                stopped += 1
            engine._pool.check()
    engine.run(rows)
    assert stopped > 1
    assert [row.tokens[len(row.request.prompt) :] for row in rows] == [one.ids for one in expected]
    assert engine._pool.available == engine._pool.count


def test_an_on_token_that_raises_costs_no_other_row_a_token(monkeypatch):
    cfg, p = build()
    expected = [one.ids for one in Engine(cfg, p).generate([[3, 4, 5], [6, 7], [9]], max_new_tokens=6)]
    for late in (False, True):
        engine, seen = Engine(cfg, p), []
        monkeypatch.setattr(engine._device, "overlaps", late)

        def broken(*_):
            raise ValueError("mine")

        asked = (broken, lambda token, _, seen=seen: seen.append(token), None)
        rows = engine.submit(
            engine.request(prompt, 6, on_token=call) for prompt, call in zip(([3, 4, 5], [6, 7], [9]), asked)
        )
        errors = 0
        while not all(row.finish_reason for row in rows):
            try:
                engine.step()
            except ValueError:
                errors += 1
        assert errors == 6
        assert [row.tokens[len(row.request.prompt) :] for row in rows] == expected
        assert seen == expected[1]
        with pytest.raises(ValueError, match="mine"):
            engine.generate([[3, 4, 5], [6, 7]], max_new_tokens=6, on_token=broken)
        assert engine.generate([[9]], max_new_tokens=6)[0].ids == expected[2]
        assert not engine.step()


@pytest.mark.parametrize("late", [False, True], ids=["", "read a pass late"])
@pytest.mark.parametrize("place", [0, 3, 7], ids=["first token", "stop id", "last token"])
def test_on_token_may_cancel_any_row(monkeypatch, late, place):
    """Also its own row, at its last token. The tokens of another row in the same pass still arrive, in order."""
    cfg, p = build()
    expected = [one.ids for one in Engine(cfg, p).generate([[3, 4], [6, 7]], max_new_tokens=8)]
    assert expected[0].index(expected[0][3]) == 3
    engine, told = Engine(cfg, p), []
    monkeypatch.setattr(engine._device, "overlaps", late)

    def cancel(*_):
        if rows[0].answered > place:
            engine.cancel(rows[:1])

    stops = expected[0][3:4] if place == 3 else []
    rows = engine.submit(
        [
            engine.request([3, 4], 8, on_token=cancel, stop_ids=tuple(stops)),
            engine.request([6, 7], 8, on_token=lambda token, _: told.append(token)),
        ]
    )
    engine.run(rows)
    assert rows[0].finish_reason == {0: "cancelled", 3: "stop", 7: "length"}[place]
    assert rows[0].tokens[2:] == expected[0][: rows[0].answered]
    assert told == rows[1].tokens[2:] == expected[1]
    assert not engine.step()


def test_a_token_of_an_interrupted_call_is_told_to_no_later_one(monkeypatch):
    """Ctrl-C after the engine has read the token of the first of two rows. No on_token of this call runs later."""
    cfg, p = build()
    engine, told, read = Engine(cfg, p), [], Pending.read

    def stopped(pending):
        yield from list(read(pending))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "read", stopped)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[3], [4]], max_new_tokens=4, on_token=lambda *pair: told.append(pair))
    assert engine.generate([[6, 7]], max_new_tokens=4)[0].finish_reason == "length"
    assert told == []


def test_an_on_token_may_ask_for_more():
    """on_token runs between two passes, so it may call the engine itself."""
    cfg, p = build()
    expected = Engine(cfg, p).generate([[3, 4], [6, 7]], max_new_tokens=4)
    engine, inner = Engine(cfg, p), []

    def ask(*_):
        if not inner:
            inner.append(None)
            inner[0] = engine.generate([[6, 7]], max_new_tokens=4)[0].ids

    assert engine.generate([[3, 4]], max_new_tokens=4, on_token=ask)[0].ids == expected[0].ids
    assert inner == [expected[1].ids]


def test_a_refused_request_leaves_rows_on_their_way():
    cfg, p = build()
    expected = Engine(cfg, p).generate([[3, 4]], max_new_tokens=8)[0].ids
    engine = Engine(cfg, p, max_tokens=128)
    rows = engine.submit([engine.request([3, 4], 8)])
    for _ in range(3):
        engine.step()
    held = rows[0].pages[:]
    with pytest.raises(UserError, match="a request of 1001 tokens, .* does not fit the cache of 128; raise max_tokens"):
        engine.submit([engine.request([1], 1000)])
    assert rows[0].pages == held
    engine.run(rows)
    assert rows[0].tokens[2:] == expected
