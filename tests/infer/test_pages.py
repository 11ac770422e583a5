"""Pages without a scheduler: beginnings that are found equal those of a search one by one, with few comparisons."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.infer.pages import ROOT, Match, PagePool, common_length
from qwen3f.infer.request import Request, Row


def held_pages(size, prompts):
    """(a pool, its pages). Each page is the first page of a prompt, used by a row that has drawn a token."""
    pool, pages = PagePool(len(prompts), size), []
    for number, prompt in enumerate(prompts):
        row = Row(Request(tuple(prompt), 4), number)
        row.cached, row.checked = len(prompt), True
        pages.append(pool.take())
        pool.describe(pages[-1], ROOT, row, 0)
    return pool, pages


def test_of_many_prompts_that_begin_alike_few_are_compared(monkeypatch):
    stem = [7] * 20
    pool, pages = held_pages(64, [[*stem, i, j] for i in range(30) for j in range(10)])
    compared, real = [], common_length
    monkeypatch.setattr("qwen3f.infer.pages.common_length", lambda a, b: compared.append(a) or real(a, b))
    assert pool.match([*stem, 4, 5, 9, 9], 23) == Match((), pages[45], 22)
    assert pool.match([*stem, 99], 20).tokens == 20
    assert len(compared) <= 10


def test_of_pages_with_the_same_tokens_one_is_compared(monkeypatch):
    """As with many answers to one prompt."""
    pool, pages = held_pages(16, [list(range(10))] * 200)
    compared, real = [], common_length
    monkeypatch.setattr("qwen3f.infer.pages.common_length", lambda a, b: compared.append(a) or real(a, b))
    found = pool.match(list(range(10)), 9)
    assert found.partial in pages
    assert (found.pages, found.tokens) == ((), 9)
    assert len(compared) <= 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=20), st.data())
def test_the_longest_beginning_that_a_page_holds_is_found(prompts, data):
    """Compared with all pages one by one. Some pages are not known to be finite, some are computed only in part, and
    some have been released."""
    pool, pages = held_pages(8, prompts)
    rows = [pool._contents[page].owner for page in pages]
    finite = []
    for row, page, prompt in zip(rows, pages, prompts):
        row.checked, row.cached = data.draw(st.booleans()), data.draw(st.integers(0, len(row.tokens)))
        if row.cached == len(row.tokens):  # then it may have an answer
            row.tokens = [*prompt, *data.draw(st.lists(st.integers(0, 2), max_size=2))]
            row.cached = len(row.tokens)
        released = row.checked and data.draw(st.booleans())
        if released:
            pool.vouch([page])
            pool.release(page, row)
        if row.checked:
            finite.append((row.tokens if released else prompt)[: row.cached])
    pool.check()
    asked = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    found = pool.match(asked, len(asked))
    held = rows[pages.index(found.partial)] if found.partial else None
    assert found.tokens >= max((common_length(asked, p) for p in finite), default=0)
    assert found.tokens == (common_length(asked, held.tokens[: held.cached]) if held else 0)
    assert held is None or held.checked


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6),
    st.lists(st.integers(0, 1), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_a_row_that_will_hold_enough_of_the_beginning_is_found(prompts, asked, count):
    """Compared with all rows one by one. Rows share pages of two tokens; none has drawn a token yet."""
    pool, pages = PagePool(30, 2), {}
    for number, prompt in enumerate(prompts):
        row, parent = Row(Request(tuple(prompt), 1), number), ROOT
        for start in range(0, len(prompt), 2):
            beginning = tuple(prompt[: start + 2])
            if beginning not in pages:
                pages[beginning] = pool.take()
                pool.describe(pages[beginning], parent, row, start)
            parent = pages[beginning]
    found = pool.promised(asked, Match((), None, 0), count)
    assert (found is None) == (max(common_length(asked, prompt) for prompt in prompts) < count)
    assert found is None or common_length(asked, found.tokens) >= count


@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 9))
def test_a_pool_that_grows_keeps_its_pages_and_gets_the_rest(count, used, more):
    pool = PagePool(count, 4)
    taken = [pool.take() for _ in range(min(used, count))]
    pool.grow(more, 4)
    pool.check()
    assert (pool.count, pool.size) == (max(count, more), 4)
    left = [pool.take() for _ in range(pool.available)]
    assert sorted(taken + left) == list(range(1, max(count, more) + 1))


def test_an_answer_can_be_shared_once_its_row_has_released_its_pages():
    """Although another page begins as the answer does, and its row's prompt was longer."""
    pool, (first, _) = held_pages(8, [[0], [0, 1, 9]])
    row = pool._contents[first].owner
    row.tokens, row.cached = [0, 1, 2, 3], 4
    pool.vouch([first])
    pool.release(first, row)
    assert pool.match([0, 1, 2, 3, 4], 5) == Match((), first, 4)
