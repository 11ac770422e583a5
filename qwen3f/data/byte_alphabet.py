"""GPT-2's byte alphabet, in which vocab.json, merges.txt and tokenizer.json spell tokens: one character a byte."""

from pathlib import Path
from typing import Any

from qwen3f.errors import UserError


def _alphabet() -> dict[int, int]:
    """GPT-2's character (a code point) for each byte: itself if printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {value: value for value in printable} | {value: 0x100 + n for n, value in enumerate(others)}


_CHARACTERS = _alphabet()
_BYTES: dict[int, int | None] = {i: None for i in _CHARACTERS} | {char: value for value, char in _CHARACTERS.items()}


def to_text(token: bytes) -> str:
    """How the files spell a token."""
    return token.decode("latin-1").translate(_CHARACTERS)


def to_bytes(path: Path, token: Any) -> bytes:
    """The bytes that a spelling in `path` stands for. Raises UserError if it is none."""
    try:
        content = token.translate(_BYTES).encode("latin-1")
    except (AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"{path} has the token {token!r}, which GPT-2's byte alphabet cannot spell.") from error
    if len(content) != len(token):
        raise UserError(f"{path} has the token {token!r}, which GPT-2's byte alphabet cannot spell.")
    return content
