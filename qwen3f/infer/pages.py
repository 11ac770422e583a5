"""Pages of the key/value cache: which are free, who uses them, and what can be shared. On the host; no tensors.

A page holds the keys and values of `size` successive tokens of a row. Rows that begin with the same tokens share their
full pages; of a page that two rows share in part, the second one gets a copy. A page that nobody uses any more keeps
what it holds, for a later row with the same beginning, until its room is needed: the least recently used goes first.

Only what is known to be finite is shared: of a row that has drawn a token from it. A row that is to fail would take
others with it. What a row draws is shared once it has given its pages back.
"""

import bisect
import dataclasses
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

ROOT = 0
"""Page 0 takes what idle places of a batch write. No row has it; it is the parent of every row's first page."""


class Owner(Protocol):
    """A row whose keys lie in a page. tokens: all of it. cached: how many of them have their keys in pages. checked:
    whether these are known to be finite."""

    tokens: list[int]
    cached: int
    checked: bool


@dataclasses.dataclass(frozen=True)
class Match:
    """What pages hold of a row already.

    Attributes:
      pages: full pages, in order, that the row may share.
      partial: the page to copy for what follows, or None.
      tokens: how many tokens these hold of the row, `partial` included.
    """

    pages: tuple[int, ...]
    partial: int | None
    tokens: int


@dataclasses.dataclass
class _Content:
    """Tokens start … of `owner`, while it has the page; what was left of them (`tokens`) when it gave the page back.

    vouched: whether these keys and values are finite, of which the owner otherwise tells.
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
    """Pages that follow on the same page, sorted by their tokens: those that begin as a row does lie side by side."""

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
        """Forward and backward from where `tokens` would lie: in each walk a page has no more of the beginning of
        `tokens` than the one before."""
        middle = bisect.bisect_left(self._sorted, (tokens, 0))
        backward = (self._sorted[i] for i in range(middle - 1, -1, -1))
        return itertools.islice(self._sorted, middle, None), backward

    def nearest(self, tokens: list[int]) -> tuple[int, int]:
        """(a page that has the most of the beginning of `tokens`, how many of them); there must be one page."""
        middle = bisect.bisect_left(self._sorted, (tokens, 0))
        beside = self._sorted[max(0, middle - 1) : middle + 1]
        return max(((page, common_length(known, tokens)) for known, page in beside), key=lambda found: found[1])


class PagePool:
    """`count` pages of `size` tokens each, numbered from 1; page 0 is none of them.

    Every page is either free, or used by some rows, or kept: used by none, holding what `match` can find.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(1, count + 1))
        self._users = [0] * (count + 1)
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, _Content] = {}
        self._children: dict[int, _Siblings] = {}
        self._offered: dict[int, _Siblings] = {}  # of the children those that `match` looks at

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """A page for one user, the lowest free one; if none is free, the kept one that was used the longest ago.

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
        """Count one user less. The last one leaves the page kept, or free if it holds nothing that `describe` told."""
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
        """Tell that `page` holds the keys of owner.tokens[start: start + size], as far as they are cached.

        parent: the page before, or ROOT. Nothing is noted behind a page that has been forgotten.
        """
        if parent == ROOT or parent in self._contents:
            self._contents[page] = _Content(parent, owner, start)
            self._children.setdefault(parent, _Siblings()).put(page, owner.tokens[start : start + self.size])
            if owner.checked:
                self.offer([page])

    def offer(self, pages: Iterable[int]) -> None:
        """Let `match` find these pages: their row has drawn a token. What a row that has, or that is vouched for, gets
        or leaves is offered without."""
        for page in pages:
            if page in self._contents:
                parent = self._contents[page].parent
                self._offered.setdefault(parent, _Siblings()).put(page, self._children[parent].tokens(page))

    def match(self, tokens: Sequence[int], most: int) -> Match:
        """The longest beginning of `tokens`, at most `most` of them, that pages hold and that is known to be finite."""
        pages: list[int] = []
        parent, at = ROOT, 0
        while True:
            best, length = self._longest(parent, list(tokens[at : min(at + self.size, most)]))
            if length < self.size:
                return Match(tuple(pages), best, at + length)
            pages.append(best)
            parent, at = best, at + length

    def promised(self, tokens: Sequence[int], found: Match, count: int) -> Owner | None:
        """The row that is to hold the first `count` of `tokens` and has drawn no token yet, or None. found: of them."""
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
        """Forget what pages hold, since the weights have changed. Rows keep the pages that they use."""
        self._contents.clear()
        self._children.clear()
        self._offered.clear()
        for page in self._kept:
            heapq.heappush(self._free, page)
        self._kept.clear()

    def grow(self, count: int, size: int) -> None:
        """More pages, or longer ones; longer only while no row has more than one page."""
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
        """Tell that what these pages hold now is finite."""
        pages = [page for page in pages if page in self._contents]
        for page in pages:
            self._contents[page].vouched = True
        self.offer(pages)

    def forget_doubtful(self, pages: Iterable[int]) -> list[int]:
        """Forget those of a row's pages that it has alone and that nobody vouched for. Returns them, to be erased."""
        contents = self._contents
        alone = (page for page in pages if self._users[page] == 1)
        doubtful = [page for page in alone if page not in contents or not contents[page].vouched]
        for page in reversed(doubtful):  # what follows on a page first, so that no long row nests calls without end
            self.forget(page)
        return doubtful

    def _longest(self, parent: int, tokens: list[int]) -> tuple[int | None, int]:
        """(the page behind `parent` that holds the most of the beginning of `tokens`, or None; how many of them)."""
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
        """Drop what a page holds and all that follows on it; of these pages the kept ones become free."""
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
    """How many tokens two sequences begin with alike."""
    if a == b:
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
