"""Which rows are computed next: admission by free pages, prefill in chunks, decoding of all other rows, preemption.

Runs on the host, without tensors. Prefill computes keys and values for all tokens of a prompt except the last. Decoding
feeds the last one, and that pass gives the first new token. So n answers to one prompt share its prefill, and each
feeds the last token itself.
"""

import dataclasses
from collections import deque

from qwen3f.infer.pages import ROOT, Match, PagePool
from qwen3f.infer.request import Row

WORTH_WAITING = 16  # a row waits for an unchecked row if it can share more than this many additional tokens with it


@dataclasses.dataclass(frozen=True)
class Limits:
    """rows: rows computed at a time, at most. chunk: tokens of a prefill pass, at most, padding included."""

    rows: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens start … start + count − 1 of a row, to be prefilled."""

    row: Row
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute, in this order.

    Attributes:
      copies: (from, to, tokens): copy the first `tokens` tokens of page `from` to page `to`.
      erase: pages to set to 0, since they may hold numbers that are not finite.
      chunks: the rows of one prefill pass.
      decode: rows that draw their next token.
      preempted: rows that have lost their pages and are back in the queue.
    """

    copies: list[tuple[int, int, int]]
    erase: list[int]
    chunks: list[Chunk]
    decode: list[Row]
    preempted: list[Row]

    def __bool__(self) -> bool:
        return bool(self.copies or self.erase or self.chunks or self.decode)


class Scheduler:
    """Schedules rows from their arrival to their end. The caller computes each plan, then calls `plan` again."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self._unchecked: list[Row] = []  # rows that had drawn no token from their pages when the last plan was made

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def finish(self, row: Row) -> list[int]:
        """Remove the row and release its pages. They keep their contents for rows with the same beginning.

        Returns pages that the caller must erase before the next plan. These are the pages of a row that has drawn no
        token: their contents may not be finite, so they are forgotten.
        """
        if row not in self.active:
            self.waiting.remove(row)
            return []
        self.active.remove(row)
        return self._release(row)

    def restart(self) -> list[int]:
        """Take the pages away from all rows; the rows go back to the queue, in their order, and keep their tokens.

        Returns pages to erase, as `finish`.
        """
        rows = sorted(self.active, key=lambda row: row.number, reverse=True)
        return [page for row in rows for page in self._preempt(row)]

    def plan(self) -> Plan:
        """What to compute now. Its decode list is empty if no row is ready; all is empty when no row is left."""
        copies = self._admit()
        chunks = self._chunks()
        busy = {chunk.row.number for chunk in chunks}
        preempted: list[Row] = []
        erase: list[int] = []
        decode = []
        for row in list(self.active):
            ready = row.cached == len(row.request.prompt) - 1 + row.launched and row.number not in busy
            waits = row.launched >= row.request.max_new_tokens  # its last token is in flight
            if not ready or waits or (preempted and row in preempted):
                continue
            if row.cached < len(row.pages) * self.pool.size or self._make_room(row, preempted, erase):
                decode.append(row)
        if not preempted:
            return Plan(copies, erase, chunks, decode, preempted)
        gone = {row.number for row in preempted}
        return Plan(
            copies,
            erase,
            [chunk for chunk in chunks if chunk.row.number not in gone],
            [row for row in decode if row.number not in gone],
            preempted,
        )

    def advance(self, plan: Plan) -> None:
        """Note that the plan has been launched."""
        for chunk in plan.chunks:
            chunk.row.cached += chunk.count
        for row in plan.decode:
            row.cached += 1
            row.launched += 1

    def _admit(self) -> list[tuple[int, int, int]]:
        copies: list[tuple[int, int, int]] = []
        held: list[Row] = []
        for row in self._unchecked:
            if row.checked:
                self.pool.offer(row.pages)
        self._unchecked = [row for row in self._unchecked if row.pages and not row.checked]
        growing = sum(map(self._grows, self.active)) if self.waiting and len(self.active) < self.limits.rows else 0
        while self.waiting and len(self.active) < self.limits.rows and len(held) < self.limits.rows:
            row = self.waiting.popleft()
            in_flight = row.launched > row.answered  # it was preempted while its token was in flight
            if in_flight or (row.waits_for is not None and row.waits_for.pages and not row.waits_for.checked):
                held.append(row)
                continue
            found = self.pool.match(row.tokens, len(row.tokens) - 1)
            row.waits_for = self._awaited(row, found)
            if row.waits_for is not None:
                held.append(row)
                continue
            if not self._allocate(row, found, copies, growing):
                self.waiting.appendleft(row)
                break
            self.active.append(row)
            growing += self._grows(row)
            self._unchecked.append(row)
        self.waiting.extendleft(reversed(held))
        return copies

    def _awaited(self, row: Row, found: Match) -> Row | None:
        """A row that is not checked yet and shares many more tokens with `row` than the pages in `found`, or None."""
        enough = found.tokens + WORTH_WAITING
        return self.pool.promised(row.tokens, found, enough) if len(row.tokens) > enough else None

    def _grows(self, row: Row) -> bool:
        """Whether the row may need another page."""
        return _length(row) > len(row.pages) * self.pool.size

    def _allocate(self, row: Row, found: Match, copies: list[tuple[int, int, int]], growing: int) -> bool:
        """Give the row its pages, if enough remain for each of the `growing` rows to get one more; else False."""
        size = self.pool.size
        for page in found.pages:
            self.pool.share(page)
        if found.partial is not None:
            self.pool.share(found.partial)  # so that `take` does not give it away before it is copied
        needed = -(-len(row.tokens) // size) - len(found.pages)
        partial = found.partial
        enough = self.pool.available >= needed + growing
        if not enough and partial is not None:  # without the copy its page is free again, which may be enough
            self.pool.release(partial)
            partial = None
            enough = self.pool.available >= needed + growing
        if not enough:
            for page in reversed(found.pages):  # reversed, so that `take` gives the last pages of the row away first
                self.pool.release(page)
            return False
        own = [self.pool.take() for _ in range(needed)]
        row.pages = [*found.pages, *own]
        row.cached, row.checked = len(found.pages) * size, False
        if partial is not None:
            copies.append((partial, own[0], found.tokens - row.cached))
            self.pool.release(partial)
            row.cached = found.tokens
        for place in range(len(found.pages), len(row.pages)):
            self._describe(row, place)
        return True

    def _describe(self, row: Row, place: int) -> None:
        parent = row.pages[place - 1] if place else ROOT
        self.pool.describe(row.pages[place], parent, row, place * self.pool.size)

    def _chunks(self) -> list[Chunk]:
        """Chunks of one pass: the oldest row, and rows with a similar number of tokens left to prefill.

        A pass is as wide as its widest chunk, so similar lengths need little padding.
        """
        counts = [(min(len(row.tokens) - 1 - row.cached, self.limits.chunk), row) for row in self.active]
        counts = [(count, row) for count, row in counts if count > 0]
        if not counts:
            return []
        first, others = counts[0], counts[1:]
        others.sort(key=lambda pair: (pair[0] > first[0], abs(pair[0] - first[0])))  # shorter ones first: no wider pass
        chunks: list[Chunk] = []
        widest = 0
        for count, row in (first, *others):
            widest = max(widest, count)
            if chunks and widest * (len(chunks) + 1) > self.limits.chunk:
                break
            chunks.append(Chunk(row, row.cached, count))
        return chunks

    def _make_room(self, row: Row, preempted: list[Row], erase: list[int]) -> bool:
        """Give the row a page for its next token; False if the row was preempted instead.

        While no page is available, the row that came last loses its pages; that may be `row` itself.
        """
        while not self.pool.available:
            last = max(self.active, key=lambda other: other.number)
            erase += self._preempt(last)
            preempted.append(last)
            if last is row:
                return False
        row.pages.append(self.pool.take())
        self._describe(row, len(row.pages) - 1)
        return True

    def _preempt(self, row: Row) -> list[int]:
        self.active.remove(row)
        self.waiting.appendleft(row)
        return self._release(row)

    def _release(self, row: Row) -> list[int]:
        """Release the row's pages. Returns those whose contents may not be finite, if the row has drawn no token."""
        doubtful: list[int] = []
        if row.checked:
            self.pool.vouch(row.pages)
        else:
            doubtful = self.pool.forget_doubtful(row.pages)
        for page in reversed(row.pages):
            self.pool.release(page, row)
        row.pages, row.cached = [], 0
        return doubtful


def _length(row: Row) -> int:
    """Number of tokens whose keys the row may need, at most."""
    return len(row.request.prompt) + row.request.max_new_tokens - 1
