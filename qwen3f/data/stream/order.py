"""Documents of several parts in one order, shuffled in blocks, with a mark at each from which to go on.

The next document is of the part that has given the fewest characters for its weight, of equals the first. A part that
ends begins again, until its cap of epochs; then it is dropped and the others go on in the ratio of their weights.

The shuffle buffer is a block: it is filled, given out in an order that is a function of (seed, block), and filled
again. So its state is where reading stood when the block began and how many documents of it are given: a few numbers,
no documents. (A buffer that is refilled one by one mixes a little further, but its documents would have to be saved or
found again one by one.)
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3f.data.sampler import example_index
from qwen3f.data.sources.documents import Document
from qwen3f.data.stream.parts import START, StreamPart
from qwen3f.errors import UserError

MAX_BLOCK_CHARS = 2**25
"""A block ends when it holds this much text, so that books do not fill the memory."""

_UNSHUFFLED_BLOCK = 256


class Mark(NamedTuple):
    """A document's place in the order: the state of reading when its block began (JSON), and its number in it."""

    block: dict[str, Any]
    taken: int


def ordered_documents(
    parts: Sequence[StreamPart],
    weights: Sequence[float],
    *,
    seed: int,
    buffer: int,
    max_epochs: Sequence[int | None],
    counts: Counter[str],
    start: Mark | None = None,
) -> Iterator[tuple[Document, Mark]]:
    """The documents in order; from `start` on the same ones with the same marks.

    In memory are one block and a few rows of each part.

    Args:
        parts: what to read.
        weights: positive, one a part: the ratio of their characters.
        seed: of the shuffle.
        buffer: documents that are shuffled together; 0 keeps the order.
        max_epochs: how often each part is read at most, None for no limit.
        counts: what was left out, by reason, is added here.
        start: the mark of the document to begin with, None for the first.

    Raises:
        UserError: a part has no document, or is broken.
    """
    mixer = _Mixer(parts, weights, max_epochs, counts, start.block if start else None)
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


def _fill(mixer: "_Mixer", most: int) -> list[Document]:
    documents: list[Document] = []
    chars = 0
    while len(documents) < most and chars < MAX_BLOCK_CHARS:
        document = mixer.next_document()
        if document is None:
            break
        documents.append(document)
        chars += len(document.text)
    return documents


class _Mixer:
    """Reads the parts in turn. Its state can be taken between two documents, and given to a new one."""

    def __init__(
        self,
        parts: Sequence[StreamPart],
        weights: Sequence[float],
        max_epochs: Sequence[int | None],
        counts: Counter[str],
        state: dict[str, Any] | None,
    ) -> None:
        self._parts, self._weights, self._counts = parts, weights, counts
        self._caps = [math.inf if most is None else most for most in max_epochs]
        state = state or {"given": [0] * len(parts), "epochs": [0] * len(parts), "places": [START] * len(parts)}
        self._given, self._epochs = list(state["given"]), list(state["epochs"])
        self._places = [tuple(place) for place in state["places"]]
        self._found = [place != START for place in self._places]  # whether this epoch has had a document
        self._readers = [part.documents(place, counts) for part, place in zip(parts, self._places)]

    def snapshot(self) -> dict[str, Any]:
        """By part: characters given, whole epochs, and where reading stands in this one."""
        return {"given": list(self._given), "epochs": list(self._epochs), "places": list(map(list, self._places))}

    def next_document(self) -> Document | None:
        """None when every part has reached its cap."""
        while alive := [i for i, epochs in enumerate(self._epochs) if epochs < self._caps[i]]:
            i = min(alive, key=lambda n: self._given[n] / self._weights[n])
            for document, behind in self._readers[i]:
                self._places[i] = behind
                if document is not None:
                    self._found[i] = True
                    self._given[i] += len(document.text)
                    return document
            if not self._found[i]:
                raise UserError(f"Empty corpus: {self._parts[i].name} has no document to train on: give more text.")
            self._epochs[i] += 1
            self._places[i], self._found[i] = START, False
            self._readers[i] = self._parts[i].documents(START, self._counts)
        return None
