"""Reads from a SentencePiece model file what the library's Python interface does not give.

The file is a protocol buffer. It is read here field by field, since the library's own class for it cannot be loaded in
one process with transformers' copy of it.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE = 3
_CHARS_MAP, _ESCAPE_SPACES = 2, 5

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """text: with U+2581 for a space. kind: NORMAL to BYTE."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """pieces: by id. algorithm: BPE, UNIGRAM or another number. has_chars_map: a table normalises text."""

    pieces: list[Piece]
    algorithm: int
    has_chars_map: bool
    escapes_spaces: bool


def read_model(content: bytes) -> Model:
    """The content of a .model file that the library has opened. Raises ValueError for what is no such file."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(content):
            if number == _PIECES:
                fields = dict(_fields(value))
                (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
                pieces.append(Piece(fields.get(_TEXT, b"").decode(), score, fields.get(_TYPE, NORMAL)))
            elif number == _TRAINER:
                trainer |= dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(value))
    except (TypeError, AttributeError, struct.error) as error:  # the library skips fields of an unknown kind
        raise ValueError(f"a field is of another kind than in a model: {error}") from error
    return Model(
        pieces,
        trainer.get(_MODEL_TYPE, UNIGRAM),
        bool(normalizer.get(_CHARS_MAP)),
        bool(normalizer.get(_ESCAPE_SPACES, 1)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an int for a varint, else its bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
        else:
            if kind == _BYTES:
                size, at = _varint(content, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"byte {at} begins a field of the unknown kind {kind}")
            value, at = content[at : at + size], at + size
        if at > len(content):
            raise ValueError("the last field is cut short")
        yield number, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number whose bytes begin at `at`, and where they end."""
    value = shift = 0
    while at < len(content):
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("the last number is cut short")
