"""The scheduler under random arrivals, lengths, stops and tiny caches, with a simulated device that checks every plan.

A key depends on all tokens up to its own. So the simulated device stores, for each place of each page, the tokens up to
the one whose key is there. If a page is lost, shared wrongly or copied too late, a row finds tokens that are not its
own.

The token BAD stands for NaN. Everything that a pass computes for a row with BAD is not finite. Masked slots take part
in products, so a page with one such value breaks every row that has it. A healthy row must never have such a page.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.infer.pages import PagePool, _Content
from qwen3f.infer.request import Request, Row
from qwen3f.infer.scheduler import Limits, Plan, Scheduler

VOCABULARY = 3  # few tokens, so that many rows begin with the same ones
BAD = -1


class Machine:
    """A scheduler with a simulated device. lag=1: results are read one plan late, as on a GPU."""

    def __init__(self, pages, size, rows, chunk, lag):
        self.pool = PagePool(pages, size)
        self.scheduler = Scheduler(self.pool, Limits(rows, chunk))
        self.size, self.rows, self.chunk, self.lag = size, rows, chunk, lag
        self.keys = {}  # (page, place) -> the tokens up to it
        self.broken = set()  # each (page, place) that is not finite
        self.pending, self.ended, self.number = [], [], 0
        self.computed = 0

    def add(self, prompt, new):
        row = Row(Request(tuple(prompt), new), self.number)
        self.number += 1
        self.scheduler.add(row)
        return row

    def step(self, stops):
        plan = self.scheduler.plan()
        self.pool.check()
        assert len(self.scheduler.active) <= self.rows
        used = [row.pages for row in self.scheduler.active]
        counts = {page: sum(page in pages for pages in used) for pages in used for page in pages}
        assert all(self.pool.users(page) == count for page, count in counts.items())
        for source, target, count in plan.copies:
            self.erase([target])
            for place in range(count):
                self.keys[target, place] = self.keys[source, place]
                assert (source, place) not in self.broken
        self.erase(plan.erase)
        assert sum(1 for _ in plan.chunks) * max((c.count for c in plan.chunks), default=0) <= self.chunk
        for chunk in plan.chunks:
            self.write(chunk.row, chunk.start, chunk.count, chunk.row.tokens)
        launched = []
        for row in plan.decode:
            tokens = row.tokens + [None] * (row.cached + 1 - len(row.tokens))
            self.write(row, row.cached, 1, tokens)
            launched.append((row, row.launched))
        self.scheduler.advance(plan)
        self.pending.append(launched)
        progress = bool(plan.copies or plan.chunks or plan.decode)
        while len(self.pending) > self.lag * progress:
            progress = self.hand_out(self.pending.pop(0), stops) or progress
        return progress

    def erase(self, pages):
        for at in [(page, place) for page in pages for place in range(self.size)]:
            self.keys.pop(at, None)
            self.broken.discard(at)

    def cancel(self, row):
        row.finish_reason = "cancelled"
        self.erase(self.scheduler.finish(row))

    def restart(self):
        self.erase(self.scheduler.restart())
        self.pool.clear()

    def write(self, row, start, count, tokens):
        broken = BAD in tokens[: start + count]
        assert broken or not any(page in row.pages for page, _ in self.broken)
        for at in range(count):
            place = start + at
            page = row.pages[place // self.size]
            if at == 0:  # the keys of all tokens before must be in the row's pages
                for before in range(start):
                    held = self.keys[row.pages[before // self.size], before % self.size]
                    assert _fits(held, tokens[: before + 1]), (row.number, before)
            assert self.pool.users(page) == 1  # nobody else sees what is written
            self.keys[page, place % self.size] = tokens[: place + 1]
            self.broken |= {(page, place % self.size)} if broken else set()
            self.computed += 1

    def hand_out(self, launched, stops):
        for row, number in launched:
            if row.finish_reason:
                continue
            assert number == row.answered
            row.checked = BAD not in row.tokens
            if not row.checked:
                row.finish_reason = "failed"
                self.erase(self.scheduler.finish(row))
                self.ended.append(row)
                continue
            token = (row.number + 7 * number) % VOCABULARY
            row.tokens.append(token)
            if stops(row) or row.answered == row.request.max_new_tokens:
                row.finish_reason = "done"
                self.erase(self.scheduler.finish(row))
                self.ended.append(row)
        return bool(launched)


def _fits(held, tokens):
    return len(held) == len(tokens) and all(a is None or b is None or a == b for a, b in zip(held, tokens))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_request_ends_and_no_page_is_lost_or_shared_wrongly(data):
    pages, size = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 2, 4, 16]))
    rows, chunk = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    machine = Machine(pages, size, rows, chunk, lag=data.draw(st.integers(0, 1)))
    chance = random.Random(data.draw(st.integers(0, 2**20)))
    total = data.draw(st.integers(1, 14))
    waiting = []
    for _ in range(total):
        length = chance.randint(1, max(1, pages * size - 1))
        new = chance.randint(1, max(1, min(12, pages * size - length)))
        if length + new <= pages * size:
            waiting.append(([chance.randrange(VOCABULARY) for _ in range(length)], new))
            if chance.random() < 0.2:
                waiting[-1][0][chance.randrange(length)] = BAD
    added = []
    for _ in range(20_000):
        if waiting and chance.random() < 0.5:
            prompt, new = waiting.pop()
            added += [machine.add(prompt, new) for _ in range(chance.randint(1, 3))]
        if chance.random() < 0.01:
            while machine.pending:
                machine.hand_out(machine.pending.pop(0), lambda row: False)
            machine.restart()
        if chance.random() < 0.05 and (left := [row for row in added if not row.finish_reason]):
            row = chance.choice(left)
            while machine.pending:
                machine.hand_out(machine.pending.pop(0), lambda row: False)
            if not row.finish_reason:
                machine.cancel(row)
                machine.ended.append(row)
        progress = machine.step(lambda row: chance.random() < 0.1)
        if not progress and not waiting:
            break
    assert not machine.scheduler.waiting
    assert not machine.scheduler.active
    assert sorted(row.number for row in machine.ended) == [row.number for row in added]
    assert machine.pool.available == pages


def test_answers_to_one_prompt_share_its_prefill():
    machine = Machine(pages=40, size=4, rows=16, chunk=64, lag=0)
    prompt = [0, 1, 2] * 7
    for _ in range(8):
        machine.add(prompt, 3)
    while machine.step(lambda row: False):
        pass
    assert machine.computed == (len(prompt) - 1) + 8 * 3  # the prompt once, then each answer's own tokens


def test_whether_there_is_room_is_counted_once_for_all_rows_that_arrive(monkeypatch):
    scheduler, counted = Scheduler(PagePool(1000, 16), Limits(rows=500, chunk=100_000)), []
    monkeypatch.setattr("qwen3f.infer.scheduler._length", lambda row: counted.append(1) or 32)
    for number in range(500):
        scheduler.add(Row(Request((1000 * number, *range(20)), 12), number))
    scheduler.plan()
    assert len(scheduler.active) == 500  # each needs two pages, and there are enough
    assert len(counted) <= 2 * 500


class Watched(list):
    """A list that counts how often its tokens are read."""

    looks = 0

    def __getitem__(self, place):
        Watched.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("stem", [[], [7] * 100], ids=["of their own", "begin alike"])
def test_of_rows_that_arrive_together_none_is_compared_with_all_others(monkeypatch, stem):
    scheduler = Scheduler(PagePool(5000, 16), Limits(rows=500, chunk=100_000))
    rows = [Row(Request((*stem, *[1000 * number] * 40), 9), number) for number in range(400)]
    for row in rows:
        row.tokens = Watched(row.tokens)
    for row in rows[:2]:
        scheduler.add(row)
        scheduler.advance(scheduler.plan())
        row.checked = True
    for row in rows[2:]:
        scheduler.add(row)
    finite, real = [], _Content.finite.fget
    monkeypatch.setattr(_Content, "finite", property(lambda content: finite.append(1) or real(content)))
    Watched.looks = 0
    scheduler.plan()
    assert len(scheduler.active) == 400
    assert Watched.looks <= 30 * len(rows)
    assert len(finite) <= 12 * len(rows)


def test_a_row_shares_its_pages_once_it_has_drawn_a_token():
    """A row with the same beginning waits for that, unless it would share only few tokens."""
    machine = Machine(pages=40, size=4, rows=16, chunk=64, lag=0)
    first, same, near = machine.add([0, 1, 2] * 7, 3), machine.add([0, 1, 2] * 7, 3), machine.add([0, 1, 2, 5], 3)
    machine.step(lambda row: False)
    assert (first.cached, same.pages, near.cached) == (20, [], 3)
    machine.step(lambda row: False)
    assert (first.answered, same.pages) == (1, [])
    machine.step(lambda row: False)
    assert same.pages[:5] == first.pages[:5]


def test_a_row_that_begins_as_an_earlier_one_computes_only_the_rest():
    machine = Machine(pages=40, size=4, rows=16, chunk=64, lag=0)
    machine.add(list(range(20)), 2)
    while machine.step(lambda row: False):
        pass
    machine.computed = 0
    machine.add([*range(18), 50, 51, 52], 2)
    while machine.step(lambda row: False):
        pass
    assert machine.computed == 2 + 2  # 18 were there: 50 and 51 are prefilled, 52 and the first new token decoded


def test_a_row_that_waits_for_room_keeps_the_beginning_of_what_it_will_share():
    """While it waits, another row may take the last of the pages that it could have shared, not the first ones."""
    machine = Machine(pages=10, size=4, rows=4, chunk=64, lag=0)
    machine.add(list(range(20)), 1)
    while machine.step(lambda row: False):
        pass
    other, waiting = machine.add([90, 91], 24), machine.add([*range(20), *range(50, 66)], 1)
    while not other.finish_reason:
        machine.step(lambda row: False)
        assert not waiting.pages
    machine.computed = 0
    while machine.step(lambda row: False):
        pass
    assert machine.computed == 36 - 12  # the other row took 2 of the 5 pages that it could have shared


def test_a_row_of_very_many_pages_can_be_given_up_before_it_has_drawn_a_token():
    scheduler = Scheduler(PagePool(1500, 1), Limits(rows=2, chunk=100))
    row = Row(Request(tuple(range(1400)), 9), 0)
    scheduler.add(row)
    scheduler.advance(scheduler.plan())
    assert len(scheduler.finish(row)) == 1400
    scheduler.pool.check()
    assert scheduler.pool.available == 1500


def test_the_youngest_loses_its_pages_and_comes_back():
    machine = Machine(pages=4, size=2, rows=4, chunk=64, lag=0)
    first, second = machine.add([0, 1], 6), machine.add([2, 2], 6)
    order = []
    while machine.step(lambda row: False):
        order.append((len(first.pages), len(second.pages)))
    assert machine.ended == [first, second]
    assert (3, 0) in order


@pytest.mark.parametrize("tokens, grows", [(4, True), (3, False)])
def test_a_row_waits_for_pages_that_another_one_may_need(tokens, grows):
    """Else the row that came last would lose its pages again. A page has room for four of the first row's tokens; the
    last token of its answer needs none."""
    machine = Machine(pages=3, size=4, rows=4, chunk=64, lag=0)
    first = machine.add([0] * tokens, 2)
    machine.step(lambda row: False)
    second = machine.add([1] * 8, 1)
    machine.step(lambda row: False)
    assert not first.finish_reason
    assert bool(second.pages) != grows
    while machine.step(lambda row: False):
        assert first.finish_reason or bool(second.pages) != grows
    assert second.finish_reason


def test_a_row_that_lost_its_pages_waits_for_its_token_in_flight():
    """That token says nothing about the pages that the row gets next."""
    scheduler = Scheduler(PagePool(4, 4), Limits(rows=2, chunk=64))
    row = Row(Request((0, 1, 2), 2), 0)
    scheduler.add(row)
    while not row.launched:
        scheduler.advance(scheduler.plan())
    scheduler.restart()
    assert not scheduler.plan()
    row.tokens.append(1)
    assert [chunk.row for chunk in scheduler.plan().chunks] == [row]


@pytest.mark.parametrize("field", [*Plan.__dataclass_fields__])
def test_a_plan_is_empty_if_there_is_nothing_to_compute(field):
    parts = {name: [] for name in Plan.__dataclass_fields__}
    assert not Plan(**parts)
    assert bool(Plan(**parts | {field: [1]})) == (field != "preempted")


def test_a_prefill_pass_takes_the_first_row_and_others_about_as_long():
    machine = Machine(pages=200, size=4, rows=8, chunk=64, lag=0)
    rows = [machine.add([7 + number] * length, 1) for number, length in enumerate((20, 5, 31, 19, 6))]
    first = machine.scheduler.plan()
    assert [rows.index(chunk.row) for chunk in first.chunks] == [0, 3, 4]  # the 30 tokens of row 2 would widen the pass
    machine.scheduler.advance(first)
    assert [rows.index(chunk.row) for chunk in machine.scheduler.plan().chunks] == [1, 2]
