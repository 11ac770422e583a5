"""Token sequences that a model has to read, as a tree of shared beginnings: a beginning that several share is read
once.

A few-shot prefix stands in front of every question of a subject, a question in front of each of its choices. The tree
depends on the set of sequences alone, not on their order nor on a batch size.
"""

import dataclasses
from collections.abc import Iterator, Sequence

WORTH = 32  # tokens that sharing a beginning must save: a node of its own costs a pass of the model
LEVELS = 32  # branchings at most; below them each sequence is read alone, which bounds the depth of recursion


@dataclasses.dataclass(frozen=True)
class Scored:
    """A sequence to score: the log-probability of `targets` is wanted. The last target follows the last token.

    tokens: the model's input. targets[j] is predicted at place len(tokens) − len(targets) + j.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first(self) -> int:
        """The place that predicts targets[0]."""
        return len(self.tokens) - len(self.targets)


@dataclasses.dataclass(frozen=True)
class Want:
    """A target to score: `place` counts from the sequence's beginning, `sequence` and `index` say whose it is."""

    place: int
    target: int
    sequence: int
    index: int


@dataclasses.dataclass(frozen=True)
class Node:
    """Tokens that stand at places start … end−1 of every sequence below.

    wants: the targets to score at these places. children: the nodes of the tokens that follow.
    """

    start: int
    tokens: tuple[int, ...]
    wants: tuple[Want, ...]
    children: tuple["Node", ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def build(sequences: Sequence[Scored]) -> tuple[Node, ...]:
    """The tree's first nodes. Wants name a sequence by its place in `sequences`; equal inputs are read once."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].tokens, sequences[i].targets))
    return tuple(_nodes(sequences, order, 0, 0, ()))


def walk(nodes: Sequence[Node]) -> Iterator[Node]:
    """Every node, parents first."""
    stack = list(reversed(nodes))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def _nodes(
    sequences: Sequence[Scored], order: Sequence[int], start: int, depth: int, pending: tuple[Want, ...], level: int = 0
) -> Iterator[Node]:
    """Nodes of the sequences in sorted `order`. These agree before `depth`, and each has tokens after it.

    start: the first place that is in no node above. It is below depth if the shared tokens were too few for a node of
    their own; then each node here repeats them. pending: the targets to score at places start … depth − 1; only the
    first node scores them. level: number of branchings above.
    """
    for group in _by_token(sequences, order, depth) if level < LEVELS else ([i] for i in order):
        here, below, wants, pending = depth, group, pending, ()
        branches = 1
        while branches == 1:  # all sequences go on with the same token: extend the node
            group, first = below, sequences[below[0]].tokens
            end = _agree(first, sequences[below[-1]].tokens, here)
            wants = (*wants, *_wants(sequences, below, here, end))
            here, below = end, [i for i in below if len(sequences[i].tokens) > end]
            branches = len({sequences[i].tokens[end] for i in below})
        if not branches:
            yield Node(start, first[start:end], wants, ())
        elif (end - start) * (branches - 1) < WORTH:
            yield from _nodes(sequences, below, start, end, wants, level + 1)
        else:
            children = tuple(_nodes(sequences, below, end, end, (), level + 1))
            yield Node(start, first[start:end], wants, children)


def _wants(sequences: Sequence[Scored], group: Sequence[int], start: int, end: int) -> Iterator[Want]:
    for i in group:
        one = sequences[i]
        for place in range(max(start, one.first), min(end, len(one.tokens))):
            yield Want(place, one.targets[place - one.first], i, place - one.first)


def _by_token(sequences: Sequence[Scored], order: Sequence[int], depth: int) -> Iterator[list[int]]:
    group: list[int] = []
    for i in order:
        if group and sequences[i].tokens[depth] != sequences[group[0]].tokens[depth]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _agree(first: tuple[int, ...], last: tuple[int, ...], depth: int) -> int:
    """How many tokens the first and the last of sorted sequences, and so all between, share at their beginning."""
    most = min(len(first), len(last))
    while depth < most and first[depth] == last[depth]:
        depth += 1
    return depth
