"""Pages of the KV cache: which are free, which rows use them, which can be shared. On the host, without tensors.

A page holds the keys and values of `size` successive tokens of a row. Rows that begin with the same tokens share full
pages. If only part of a page is the same, the second row gets a copy of it. A page that no row uses any more keeps its
contents for later rows with the same beginning, until the page is needed: the least recently used is taken first.

Pages are shared only if their contents are known to be finite, which a row shows by drawing a token from them.
Otherwise one row with infinite or NaN values would break the others. The tokens of an answer can be shared once its row
has released its pages.
"""

import bisect
import dataclasses
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

ROOT = 0
"""Idle places of a batch write to page 0. No row has it; it counts as the parent of every row's first page."""


class Owner(Protocol):
    """A row whose keys are in a page. tokens: all of its tokens. cached: how many of them have their keys in pages.
    checked: whether these keys are known to be finite."""

    tokens: list[int]
    cached: int
    checked: bool


@dataclasses.dataclass(frozen=True)
class Match:
    """Pages that already hold the beginning of a row.

    Attributes:
      pages: full pages that the row can share, in order.
      partial: a page whose beginning holds the tokens after these, to be copied, or None.
      tokens: number of tokens of the row that these pages hold, `partial` included.
    """

    pages: tuple[int, ...]
    partial: int | None
    tokens: int


@dataclasses.dataclass
class _Content:
    """The contents of a page.

    While `owner` has the page, these are its tokens from `start` on. Once it has released the page, owner is None and
    `tokens` holds them. vouched: keys and values are finite, whatever owner.checked says.
    """

    parent: int
    owner: Owner | None
    start: int
    vouched: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)

    def held(self, size: int) -> list[int]:
        if self.owner is None:
            return self.tokens
        return self.owner.tokens[self.start : min(self.start + size, self.owner.cached)]

    @property
    def finite(self) -> bool:
        return self.vouched or (self.owner is not None and self.owner.checked)


_Known = tuple[list[int], int]  # tokens, and the page that holds them


class _Siblings:
    """Pages with the same parent, sorted by their tokens, so that pages with the same beginning are neighbours."""

    def __init__(self) -> None:
        self._sorted: list[_Known] = []
        self._keys: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def tokens(self, page: int) -> list[int]:
        return self._keys[page]

    def put(self, page: int, tokens: list[int]) -> None:
        """Add the page, or change its tokens."""
        self.remove(page)
        self._keys[page] = tokens
        bisect.insort(self._sorted, (tokens, page))

    def remove(self, page: int) -> None:
        if page in self._keys:
            del self._sorted[bisect.bisect_left(self._sorted, (self._keys.pop(page), page))]

    def walks(self, tokens: list[int]) -> tuple[Iterator[_Known], Iterator[_Known]]:
        """Iterators over the pages, forward and backward from the place where `tokens` would be inserted.

        In each of the two, the number of leading tokens that a page shares with `tokens` never increases.
        """
        middle = bisect.bisect_left(self._sorted, (tokens, 0))
        backward = (self._sorted[i] for i in range(middle - 1, -1, -1))
        return itertools.islice(self._sorted, middle, None), backward

    def nearest(self, tokens: list[int]) -> tuple[int, int]:
        """(the page that shares the most leading tokens with `tokens`, how many). There must be at least one page."""
        middle = bisect.bisect_left(self._sorted, (tokens, 0))
        beside = self._sorted[max(0, middle - 1) : middle + 1]
        return max(((page, common_length(known, tokens)) for known, page in beside), key=lambda found: found[1])


class PagePool:
    """`count` pages of `size` tokens each, numbered from 1; page 0 is not one of them.

    A page is either free; or used by one or more rows; or kept: no row uses it, and `match` can find its contents.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(1, count + 1))
        self._users = [0] * (count + 1)
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, _Content] = {}
        self._children: dict[int, _Siblings] = {}
        self._offered: dict[int, _Siblings] = {}  # the part of _children that `match` looks at

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """A page for one user: the free page with the lowest number, or the least recently used of the kept pages.

        Raises IndexError if all pages are in use.
        """
        if not self._free:
            self.forget(next(iter(self._kept)))
        page = heapq.heappop(self._free)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count one more user of a page that `match` gave."""
        self._users[page] += 1
        self._kept.pop(page, None)

    def release(self, page: int, user: Owner | None = None) -> None:
        """Count one user less. Without users the page is kept if `describe` has told its contents, else it is free."""
        content = self._contents.get(page)
        if content is not None and content.owner is not None and content.owner is user:
            content.owner, content.tokens = None, content.held(self.size)
            for siblings in (self._children[content.parent], self._offered.get(content.parent, ())):
                if page in siblings:
                    siblings.put(page, content.tokens)
        self._users[page] -= 1
        if self._users[page]:
            return
        if content is not None and content.held(self.size):
            self._kept[page] = None
        else:
            self.forget(page)
            heapq.heappush(self._free, page)

    def describe(self, page: int, parent: int, owner: Owner, start: int) -> None:
        """Note that `page` holds the keys of owner.tokens[start: start + size], as far as they are cached.

        parent: the page of the tokens before, or ROOT. If the parent has been forgotten, nothing is noted.
        """
        if parent == ROOT or parent in self._contents:
            self._contents[page] = _Content(parent, owner, start)
            self._children.setdefault(parent, _Siblings()).put(page, owner.tokens[start : start + self.size])
            if owner.checked:
                self.offer([page])

    def offer(self, pages: Iterable[int]) -> None:
        """Let `match` find these pages. The caller knows that their row has drawn a token.

        `describe` does this itself for rows that are checked, and `vouch` for the pages that it is given.
        """
        for page in pages:
            if page in self._contents:
                parent = self._contents[page].parent
                self._offered.setdefault(parent, _Siblings()).put(page, self._children[parent].tokens(page))

    def match(self, tokens: Sequence[int], most: int) -> Match:
        """Pages with the longest beginning of `tokens` that is known to be finite, at most `most` tokens of it."""
        pages: list[int] = []
        parent, at = ROOT, 0
        while True:
            best, length = self._longest(parent, list(tokens[at : min(at + self.size, most)]))
            if length < self.size:
                return Match(tuple(pages), best, at + length)
            pages.append(best)
            parent, at = best, at + length

    def promised(self, tokens: Sequence[int], found: Match, count: int) -> Owner | None:
        """A row that will hold the first `count` of `tokens` but has drawn no token yet, or None.

        found: what `match` gave for `tokens`.
        """
        parent, at = found.pages[-1] if found.pages else ROOT, len(found.pages) * self.size
        while parent in self._children:
            page, length = self._children[parent].nearest(list(tokens[at : at + self.size]))
            if at + length >= count:
                return None if self._contents[page].finite else self._contents[page].owner
            if length < self.size:
                break
            parent, at = page, at + length
        return None

    def clear(self) -> None:
        """Forget the contents of all pages, since the weights have changed. Rows keep the pages that they use."""
        self._contents.clear()
        self._children.clear()
        self._offered.clear()
        for page in self._kept:
            heapq.heappush(self._free, page)
        self._kept.clear()

    def grow(self, count: int, size: int) -> None:
        """Set a larger number of pages, or a larger page size. The size may change only while no row has two pages."""
        for page in range(self.count + 1, count + 1):
            heapq.heappush(self._free, page)
            self._users.append(0)
        self.count, self.size = max(count, self.count), size

    def check(self) -> None:
        """AssertionError unless every page is in exactly one state; for tests."""
        free, kept = set(self._free), set(self._kept)
        used = {page for page in range(1, self.count + 1) if self._users[page] > 0}
        assert len(free) == len(self._free)
        assert free | kept | used == set(range(1, self.count + 1))
        assert len(free) + len(kept) + len(used) == self.count
        assert kept <= set(self._contents)
        assert not free & set(self._contents)
        for page, content in self._contents.items():
            assert page in self._children[content.parent]
            assert content.parent == ROOT or content.parent in self._contents
        assert set(itertools.chain(*self._children.values())) == set(self._contents)
        offered = set(itertools.chain(*self._offered.values()))
        assert {page for page in self._contents if self._contents[page].vouched} <= offered <= set(self._contents)

    def users(self, page: int) -> int:
        return self._users[page]

    def vouch(self, pages: Iterable[int]) -> None:
        """Note that the contents of these pages are finite."""
        pages = [page for page in pages if page in self._contents]
        for page in pages:
            self._contents[page].vouched = True
        self.offer(pages)

    def forget_doubtful(self, pages: Iterable[int]) -> list[int]:
        """Forget the row's pages that no other row uses and that nobody vouched for. Returns them, to be erased."""
        contents = self._contents
        alone = (page for page in pages if self._users[page] == 1)
        doubtful = [page for page in alone if page not in contents or not contents[page].vouched]
        for page in reversed(doubtful):  # children first: else `forget` would recurse once for each page of a long row
            self.forget(page)
        return doubtful

    def _longest(self, parent: int, tokens: list[int]) -> tuple[int | None, int]:
        """(the child of `parent` that holds the most leading tokens of `tokens`, or None; how many)."""
        best, length = None, 0
        if parent not in self._offered:
            return best, length
        for walk in self._offered[parent].walks(tokens):
            for known, page in walk:
                content = self._contents[page]
                if not content.finite:
                    continue
                if common_length(known, tokens) <= length:
                    break
                found = common_length(content.held(self.size), tokens)
                if found > length:
                    best, length = page, found
        return best, length

    def forget(self, page: int) -> None:
        """Drop the contents of a page and of all pages that follow on it. Those of them that are kept become free."""
        for child in list(self._children.pop(page, ())):
            self.forget(child)
        self._offered.pop(page, None)
        content = self._contents.pop(page, None)
        for family in (self._children, self._offered):
            if content is not None and content.parent in family:
                family[content.parent].remove(page)
                if not len(family[content.parent]):
                    del family[content.parent]
        if page in self._kept:
            del self._kept[page]
            heapq.heappush(self._free, page)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that the two sequences share."""
    if a == b:
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
