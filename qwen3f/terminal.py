"""Text of strangers on a terminal: what a model, a file or its author wrote moves no cursor and writes no clipboard."""

from typing import TextIO

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    r"""The text with control characters, but for \n and \t, written out: an escape as the four characters \x1b."""
    return text.translate(_CONTROLS)


def shown(text: str, out: TextIO) -> str:
    """`printable` where `out` is a terminal; a file or a pipe gets the text as it is."""
    return printable(text) if out.isatty() else text
