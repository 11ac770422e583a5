"""What a source of text is: documents, two splits, a cheap fingerprint; and the stable hash that decides the split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from qwen3f.data.tokenizers.tokenizer import Tokenizer

Item = TypeVar("Item")
Split = Literal["train", "heldout"]

HOLDOUT = 0.05
"""Share of the questions that all stages hold out, by a hash of the question: pretraining, SFT, RL and evaluation."""


@dataclass(frozen=True)
class Document:
    """One text and where it comes from: `name` is "path" or "path:row" (rows and lines count from 1)."""

    text: str
    name: str

    @staticmethod
    def tokenise(
        documents: list["Document"], tokenizer: Tokenizer, num_threads: int
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """(ids, trained) of documents: ids uint32 [n], <|endoftext|> last; None: every token is trained."""
        end = np.array([tokenizer.eos_id], np.uint32)
        encoded = tokenizer.encode_batch([document.text for document in documents], num_threads)
        return [np.concatenate([ids, end]) for ids in encoded], None


class Source(Protocol):
    """A corpus in two disjoint splits. Iterating twice gives the same documents in the same order.

    Its documents are `Document`s, or of another class with `text`, `name` and `tokenise` (as `chat.samples.Sample`).
    """

    @property
    def name(self) -> str:
        """What the user wrote as `data.mixture`."""
        ...

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the non-empty documents of `split`; what was left out is added to `counts` by reason."""
        ...

    def fingerprint(self, split: Split) -> str:
        """Hex digest that changes when the documents may have changed; reads names, sizes and times, no content."""
        ...


@runtime_checkable
class OfFiles(Protocol):
    """A source that reads files, and may leave some out."""

    def other_files(self) -> Counter[str]:
        """How many files it leaves out, by what they are, such as ".md"."""
        ...


def other_files(source: object) -> Counter[str]:
    """Files that a source leaves out, as they are now, by what they are."""
    return source.other_files() if isinstance(source, OfFiles) else Counter()


def describe_other_files(sources: Mapping[str, object]) -> list[str]:
    """A line for each source, by name, that leaves files out."""
    found = {name: other_files(source) for name, source in sources.items()}
    return [
        f"data: {name}, files that are not read: {', '.join(f'{n:,} {kind}' for kind, n in sorted(kinds.items()))}"
        for name, kinds in found.items()
        if kinds
    ]


@dataclass(frozen=True)
class LimitedSource:
    """The first `most` documents of each split of a source."""

    source: Source
    most: int

    @property
    def name(self) -> str:
        """As in `Source`."""
        return self.source.name

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """As in `Source`."""
        return islice(self.source.documents(split, counts), self.most)

    def other_files(self) -> Counter[str]:
        """As in `OfFiles`."""
        return other_files(self.source)

    def fingerprint(self, split: Split) -> str:
        """As in `Source`."""
        return f"{stable_hash(f'{self.source.fingerprint(split)} {self.most}'.encode()):016x}"


def stable_hash(content: bytes) -> int:
    """A 64-bit hash, equal on every machine and in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def is_heldout(content: bytes, holdout: float) -> bool:
    """Whether the item identified by `content` belongs to the held-out split, a share `holdout` of all items."""
    return stable_hash(content) < holdout * 2.0**64


_FEW, _FEW_CHARS = 1000, 2**26  # documents and characters read at most to see whether both splits have some


def split_documents(documents: Iterable[Document], split: Split, holdout: float) -> Iterator[Document]:
    """The documents of `split` by `is_heldout`.

    If there are so few documents that one split would be empty, such as one long text, the last share `holdout` of all
    characters is held out instead, cut at a line end if there is one. (A text that occurs twice is then taken once, so
    that no text is in both splits; if a document was cut, its parts are named with "#1" and "#2".)
    """
    first: list[Document] = []
    kinds, chars = set(), 0
    for document in (stream := iter(documents)):
        first.append(document)
        kinds.add(is_heldout(document.text.encode(), holdout))
        chars += len(document.text)
        if len(kinds) == 2 or len(first) >= _FEW or chars >= _FEW_CHARS:
            break
    else:
        if holdout and chars:
            once: dict[str, Document] = {}
            for document in first:
                once.setdefault(document.text, document)
            yield from _by_position([*once.values()], split, round(sum(map(len, once)) * (1 - holdout)))
            return
    for document in chain(first, stream):
        if is_heldout(document.text.encode(), holdout) == (split == "heldout"):
            yield document


def _by_position(documents: list[Document], split: Split, place: int) -> Iterator[Document]:
    """What lies before character `place` of all the documents is the train split, the rest is held out."""
    for document in documents:
        cut = min(max(place, 0), len(document.text))
        place -= len(document.text)
        if 0 < cut < len(document.text):
            cut = document.text.rfind("\n", 0, cut) + 1 or cut
            parts = (document.text[:cut], f"{document.name}#1"), (document.text[cut:], f"{document.name}#2")
        else:
            parts = ((document.text[:cut], document.name), (document.text[cut:], document.name))
        text, name = parts[split == "heldout"]
        if text and not text.isspace():
            yield Document(text, name)


def distinct(
    items: Iterable[Item],
    content: Callable[[Item], bytes],
    split: Split,
    holdout: float,
    counts: Counter[str] | None,
    reason: str,
) -> Iterator[Item]:
    """The items of `split`, which a hash of their content decides. Each content comes once; repetitions are counted in
    `counts` under `reason`."""
    seen: set[int] = set()
    for item in items:
        own = content(item)
        if is_heldout(own, holdout) != (split == "heldout"):
            continue
        hashed = stable_hash(own)
        if hashed not in seen:
            seen.add(hashed)
            yield item
        elif counts is not None:
            counts[reason] += 1
