"""Makes untrusted text safe to print: text of a model or a file must not control the terminal or its clipboard."""

from typing import TextIO

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    r"""The text with its control characters, except \n and \t, as codes: an escape becomes the four characters \x1b."""
    return text.translate(_CONTROLS)


def shown(text: str, out: TextIO) -> str:
    """`printable(text)` if `out` is a terminal. Files and pipes get the text unchanged."""
    return printable(text) if out.isatty() else text
