"""Many texts to ids at once: their ASCII lines through a `PieceTable`, the others through a slower encoder.

No piece of Qwen's pattern crosses a line end into a line that begins with something other than white space, and NFC
composes nothing with a line end. So text can be cut there without changing its ids.
"""

import re
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

from qwen3f.data.tokenizers.ascii_pieces import MARK
from qwen3f.data.tokenizers.nfc import nfc
from qwen3f.data.tokenizers.piece_table import PieceTable
from qwen3f.data.tokenizers.token_text import check_encodable

# Python's \s holds all that the pattern's does (and U+001C to U+001F: fewer cuts).
_LINE_STARTS = re.compile(r"(?<=\n)(?=\S)")
_MARK = bytes([MARK])


def encode_texts(texts: list[str], table: PieceTable, encode_composed: Callable[[str], list[int]]) -> list[np.ndarray]:
    """Ids uint32 [n] of each text.

    Args:
        texts: any strings without surrogates.
        table: one of the same tokenizer; only one thread at a time may use it.
        encode_composed: ids of text in NFC, whatever it holds.

    Raises:
        UserError: a text holds a surrogate.
    """
    runs = [list(_runs(text)) for text in texts]
    plain = [run.encode() + _MARK for text in runs for run, fast in text if fast]
    ids, ends = table.encode(b"".join(plain)) if plain else (np.zeros(0, np.uint32), np.zeros(0, np.int64))
    parts = iter(np.split(ids, ends[:-1]))
    return [
        _joined([next(parts) if fast else np.array(encode_composed(run), np.uint32) for run, fast in text])
        for text in runs
    ]


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """The text in NFC, cut into what the table can take and what it cannot."""
    if _is_plain(text):
        yield text, True
        return
    check_encodable(text)
    for fast, lines in groupby(_LINE_STARTS.split(nfc(text)), _is_plain):
        yield "".join(lines), fast


def _is_plain(text: str) -> bool:
    return text.isascii() and "\0" not in text


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
