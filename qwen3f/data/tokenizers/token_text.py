"""What every tokenizer here does alike: cut trusted text at its special tokens, refuse surrogates, decode id by id."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from qwen3f.errors import UserError


class Segment(NamedTuple):
    """A part of a text. In markup the name of a special token stands for that token; anywhere else it is only text."""

    text: str
    is_markup: bool


class HasTokenBytes(Protocol):
    """The part of a tokenizer that decoding needs."""

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes that one id stands for."""
        ...


class StreamDecoder:
    """Text of ids that arrive one by one: a character is given out when its last byte is there.

    What `push` and `finish` return, joined, equals the tokenizer's `decode` of all ids.

    Args:
        tokenizer: whose ids they are.
        skip_special: as in its `decode`.
    """

    def __init__(self, tokenizer: HasTokenBytes, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, perhaps none. Raises UserError as the tokenizer's `decode` does."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def finish(self) -> str:
        """What is left of an unfinished character: "" or U+FFFD. The decoder can be used for a new text after it."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def special_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern with one group that finds any of `names`, the longest where several begin."""
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")


def encode_segments(
    segments: Iterable[tuple[str, bool]],
    pattern: re.Pattern[str],
    special_ids: Mapping[str, int],
    encode_plain: Callable[[str], list[int]],
) -> list[int]:
    """Ids of (text, is_markup) segments. Text between two special tokens is encoded as one, across segments.

    So the ids equal those of the joined text with all special tokens read, unless a segment of plain text names one.

    Args:
        segments: see `Segment`. A name that lies across two segments is text.
        pattern: `special_pattern` of the keys of `special_ids`.
        special_ids: id by name.
        encode_plain: ids of text without special tokens; [] for "".
    """
    ids: list[int] = []
    for text, is_special in _pieces(segments, pattern):
        ids.extend([special_ids[text]] if is_special else encode_plain(text))
    return ids


def encode_segments_batch(
    batch: Iterable[Iterable[tuple[str, bool]]],
    pattern: re.Pattern[str],
    special_ids: Mapping[str, int],
    encode_batch: Callable[[list[str]], list[np.ndarray]],
) -> list[np.ndarray]:
    """`encode_segments` of each as uint32 [n]. All texts are encoded in one call, a repeated text only once.

    Args:
        batch: segments of each.
        pattern, special_ids: as for `encode_segments`.
        encode_batch: uint32 [n] of each text without special tokens.
    """
    cut = [list(_pieces(segments, pattern)) for segments in batch]
    texts = dict.fromkeys(text for pieces in cut for text, is_special in pieces if not is_special)
    ids = dict(zip(texts, encode_batch(list(texts))))
    specials = {name: np.array([number], np.uint32) for name, number in special_ids.items()}
    nothing = np.zeros(0, np.uint32)
    return [
        np.concatenate([nothing, *(specials[text] if is_special else ids[text] for text, is_special in pieces)])
        for pieces in cut
    ]


def _pieces(segments: Iterable[tuple[str, bool]], pattern: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Names of special tokens (True), and the text between two of them as one (False), across segments."""
    plain: list[str] = []
    for text, is_markup in segments:
        for n, part in enumerate(pattern.split(text) if is_markup else [text]):
            if not n % 2:  # not the group of the pattern
                plain.append(part)
                continue
            if between := "".join(plain):
                yield between, False
            plain.clear()
            yield part, True
    if between := "".join(plain):
        yield between, False


def check_encodable(text: str) -> None:
    """Raises UserError if the text holds a surrogate (U+D800 to U+DFFF), which UTF-8 cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}: "
            "replace it, UTF-8 cannot carry it."
        ) from error
