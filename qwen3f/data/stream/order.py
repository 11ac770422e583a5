"""Several parts in one order: rows as they come, or documents shuffled in blocks. Each document has a mark, from which
reading can resume.

The next item is taken from the part that has given the least for its weight (documents count by characters); among
equal parts from the first. A part that ends begins again, until its cap of epochs; then it is dropped, and the others
continue in the ratio of their weights.

The shuffle buffer is a block: it is filled, yielded in an order that is a function of (seed, block), and filled again.
So its state is the place where reading stood when the block began, and how many of the block's documents have been
yielded: a few numbers, no documents. (A buffer that is refilled one document at a time mixes a little better, but its
documents would have to be saved, or found again one by one.)
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from qwen3f.data.sampler import example_index
from qwen3f.data.sources.documents import Document
from qwen3f.data.stream.parts import START, ItemsPart
from qwen3f.errors import UserError

Item = TypeVar("Item")

MAX_BLOCK_CHARS = 2**25
"""A block ends when it holds this much text, so that books do not fill the memory."""

_UNSHUFFLED_BLOCK = 256


class Mark(NamedTuple):
    """A document's place in the order: the state of reading when its block began (JSON), and its number in it."""

    block: dict[str, Any]
    taken: int


def ordered_documents(
    parts: Sequence[ItemsPart[Document]],
    weights: Sequence[float],
    *,
    seed: int,
    buffer: int,
    max_epochs: Sequence[int | None],
    counts: Counter[str],
    start: Mark | None = None,
) -> Iterator[tuple[Document, Mark]]:
    """The documents in order. Resumed from `start`, it yields the same ones with the same marks.

    It holds one block and a few rows of each part in memory.

    Args:
        parts: what to read.
        weights: positive, one for each part: the ratio of their characters.
        seed: the seed of the shuffle.
        buffer: how many documents are shuffled together; 0 keeps the order.
        max_epochs: how often each part is read at most, None for no limit.
        counts: what was left out, by reason, is added here.
        start: the mark of the document to begin with, None for the first.

    Raises:
        UserError: a part has no document, or is broken.
    """
    mixer = _Mixer(parts, weights, max_epochs, _characters, counts, start.block if start else None)
    taken = start.taken if start else 0
    number = start.block["number"] if start else 0
    while True:
        block = {"number": number, **mixer.snapshot()}
        documents = _fill(mixer, buffer or _UNSHUFFLED_BLOCK)
        if not documents:
            return
        places = np.arange(len(documents))
        order = example_index(number * len(documents) + places, len(documents), seed) if buffer else places
        for place in range(taken, len(documents)):
            yield documents[order[place]], Mark(block, place)
        taken, number = 0, number + 1


def mixed(
    parts: Sequence[ItemsPart[Item]], weights: Sequence[float], size: Callable[[Item], float], counts: Counter[str]
) -> Iterator[tuple[int, Item]]:
    """(number of the part, item) of every item once, in the order of `ordered_documents` without a shuffle.

    Args:
        parts: what to read.
        weights: positive, one for each part: the ratio of the sizes taken from the parts, exact up to one item of each
            part while none has ended.
        size: gives the size of an item, at least 0.
        counts: what was left out, by reason, is added here.
    """
    mixer = _Mixer(parts, weights, [1] * len(parts), size, counts, None)
    while (found := mixer.next_item()) is not None:
        yield found


def _characters(document: Document) -> int:
    return len(document.text)


def _fill(mixer: "_Mixer[Document]", most: int) -> list[Document]:
    documents: list[Document] = []
    chars = 0
    while len(documents) < most and chars < MAX_BLOCK_CHARS:
        found = mixer.next_item()
        if found is None:
            break
        _, document = found
        documents.append(document)
        chars += len(document.text)
    return documents


class _Mixer(Generic[Item]):
    """Reads the parts in turn. Between two items, its state can be saved by `snapshot` and given to a new mixer."""

    def __init__(
        self,
        parts: Sequence[ItemsPart[Item]],
        weights: Sequence[float],
        max_epochs: Sequence[int | None],
        size: Callable[[Item], float],
        counts: Counter[str],
        state: dict[str, Any] | None,
    ) -> None:
        self._parts, self._weights, self._size, self._counts = parts, weights, size, counts
        self._caps = [math.inf if most is None else most for most in max_epochs]
        state = state or {"given": [0] * len(parts), "epochs": [0] * len(parts), "places": [START] * len(parts)}
        self._given, self._epochs = list(state["given"]), list(state["epochs"])
        self._places = [tuple(place) for place in state["places"]]
        self._found = [place != START for place in self._places]  # whether this epoch has had an item
        self._readers = [part.items(place, counts) for part, place in zip(parts, self._places)]

    def snapshot(self) -> dict[str, Any]:
        """For each part: the size of its items so far, its finished epochs, and where reading stands in this epoch."""
        return {"given": list(self._given), "epochs": list(self._epochs), "places": list(map(list, self._places))}

    def next_item(self) -> tuple[int, Item] | None:
        """The number of its part, and the item; None when every part has reached its cap."""
        while alive := [i for i, epochs in enumerate(self._epochs) if epochs < self._caps[i]]:
            i = min(alive, key=lambda n: self._given[n] / self._weights[n])
            for item, place_after in self._readers[i]:
                self._places[i] = place_after
                if item is not None:
                    self._found[i] = True
                    self._given[i] += self._size(item)
                    return i, item
            if not self._found[i]:
                raise UserError(f"Empty corpus: {self._parts[i].name} has no document to train on: give more text.")
            self._epochs[i] += 1
            self._places[i], self._found[i] = START, False
            self._readers[i] = self._parts[i].items(START, self._counts)
        return None
